"""Registration of ops that nobody differentiates and that need nothing but their checks around the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcam._library import LIBRARY
from fastcam._tracing import graph_holds_ops
from fastcam.backends import implementation, register
from fastcam.ops import _checks

__all__ = ["check_alike", "register_plain", "run"]


def run(name: str, *arguments: Any, **options: Any) -> Any:
    """The op by the backend in force."""
    if graph_holds_ops():
        return getattr(torch.ops.fastcam, name).default(*arguments, **options)
    return implementation(name, _checks.device_type(arguments[0]))(*arguments, **options)


def register_plain(
    name: str, reference: Callable[..., Any], fake: Callable[..., Any], check: Callable[..., None]
) -> None:
    """Put the reference, behind the checks, and the fake of op `name` in place, then make the op known."""

    def checked(*arguments: Any, **options: Any) -> Any:
        check(*arguments, **options)  # the formula alone would broadcast what kernels refuse
        return reference(*arguments, **options)

    LIBRARY.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcam::{name}", fake, lib=LIBRARY)
    register(name, getattr(torch.ops.fastcam, name).default, reference)


def check_alike(op: str, names: str, first: Tensor, *others: Tensor | None) -> None:
    """Tensors (B,C,...) of one floating dtype, shape and device, none of which asks for a gradient.

    Only a factor may be None.
    """
    name, *rest = names.split()
    _checks.check_tensor(op, name, first)
    if first.dim() < 2:
        raise ValueError(f"{op}: {name} must be (B,C,...), got {first.dim()} dimensions: {tuple(first.shape)}")
    _checks.check_dtype(op, name, first)
    for other_name, other in zip(rest, others, strict=True):
        if other is not None or other_name != "factor":
            _checks.check_companion(op, other_name, other, first, or_accumulation=False, of=name)
            _checks.check_same_shape(op, other_name, other, first, of=name)
    _checks.check_no_grad(op, first, *others)
