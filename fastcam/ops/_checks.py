"""Argument checks shared by the ops: each message shows the offending value and the expected one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam._dtypes import ACCUMULATION, accumulation_dtype
from fastcam._tracing import transformed


def check_features(op: str, features: Tensor, name: str = "features", shape: str = "(B,K,H,W)") -> None:
    """A strided floating tensor of four dimensions, all but the first at least 1."""
    check_tensor(op, name, features)
    if features.dim() != 4:
        raise ValueError(f"{op}: {name} must be {shape}, got {features.dim()} dimensions: {tuple(features.shape)}")
    check_dtype(op, name, features)
    if 0 in features.shape[1:]:
        raise ValueError(
            f"{op}: {name} need at least one channel, row and column, got {shape} = {tuple(features.shape)}"
        )


def alike(features: object, other: object) -> bool:
    """Whether both are tensors of one shape, dtype and device that every check of features passes.

    Most calls are of this kind, and one question costs a fraction of the checks one by one.
    """
    if not (isinstance(features, Tensor) and isinstance(other, Tensor)):
        return False
    shape, dtype = features.shape, features.dtype
    return (
        len(shape) == 4
        and 0 not in shape
        and shape == other.shape
        and dtype in ACCUMULATION
        and dtype is other.dtype
        and features.layout is torch.strided is other.layout
        and same_device(features, other)
    )


def same_device(first: Tensor, second: Tensor) -> bool:
    """Whether both are on one device; of the CPU without making objects of devices."""
    return (first.is_cpu and second.is_cpu) or first.device == second.device


def device_type(x: Tensor) -> str:
    """x.device.type."""
    return "cpu" if x.is_cpu else x.device.type


def check_tensor(op: str, name: str, value: object) -> None:
    """A strided tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got layout {value.layout}; convert with .to_dense()")


def check_dtype(op: str, name: str, value: Tensor) -> None:
    """One of the dtypes kernels take."""
    if value.dtype not in ACCUMULATION:
        raise TypeError(
            f"{op}: {name} must be float64, float32, float16 or bfloat16, got {value.dtype}; convert with .float()"
        )


def check_companion(
    op: str, name: str, value: Tensor, features: Tensor, *, or_accumulation: bool, of: str = "features"
) -> None:
    """A tensor on the features' device, in their dtype or (where allowed) their accumulation dtype."""
    check_tensor(op, name, value)
    if not same_device(value, features):
        raise ValueError(f"{op}: {name} is on {value.device}, {of} on {features.device}; both must be on one device")
    if value.dtype is features.dtype:
        return
    acc = accumulation_dtype(features.dtype)
    if not (or_accumulation and value.dtype == acc):
        also = f" or {acc}" if or_accumulation and acc != features.dtype else ""
        raise TypeError(f"{op}: {name} must be {features.dtype}{also} like the {of}, got {value.dtype}")


def check_same_shape(op: str, name: str, value: Tensor, features: Tensor, *, of: str = "features") -> None:
    """A value for every element of the features."""
    if value.shape != features.shape:
        raise ValueError(f"{op}: {name} must be {tuple(features.shape)} like the {of}, got {tuple(value.shape)}")


def check_reference(op: str, reference: Tensor | None, features: Tensor, *, of: str = "features") -> None:
    """None, or the features' shape, with their batch or batch 1, in their dtype and on their device."""
    if reference is None:
        return
    check_companion(op, "reference", reference, features, or_accumulation=False, of=of)
    if reference.shape[1:] != features.shape[1:] or reference.shape[0] not in (1, features.shape[0]):
        raise ValueError(
            f"{op}: reference must be {tuple(features.shape)} like the {of} or have batch 1, "
            f"got {tuple(reference.shape)}"
        )


def check_positional(op: str, name: str, value: Tensor, features: Tensor) -> None:
    """(B,K,H,W) or (B,T,K,H,W) for features (B,K,H,W)."""
    b, k, h, w = features.shape
    if value.dim() not in (4, 5) or value.shape[0] != b or value.shape[-3:] != features.shape[1:]:
        raise ValueError(f"{op}: {name} must be {(b, k, h, w)} or ({b}, T, {k}, {h}, {w}), got {tuple(value.shape)}")


def check_size(op: str, size: Sequence[int] | None) -> None:
    """None or two positive integers."""
    if size is None:
        return
    if isinstance(size, (str, int)) or len(size) != 2:
        raise ValueError(f"{op}: size must be None or (height, width), got {size!r}")
    for value in size:
        if not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: size must hold two integers, got {size!r}")
        if value <= 0:
            raise ValueError(f"{op}: size must hold two positive integers, got {tuple(size)}")


def check_finite(op: str, name: str, value: float) -> None:
    """A finite number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a finite float, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # unlike isfinite, a comparison can be traced
        raise ValueError(f"{op}: {name} must be a finite float, got {value}")


def check_not_negative(op: str, name: str, value: float) -> None:
    """A finite number from zero on."""
    check_finite(op, name, value)
    if value < 0:
        raise ValueError(f"{op}: {name} must not be negative, got {value}")


def check_mode(op: str, mode: str, modes: Sequence[str], name: str = "mode") -> None:
    """One of the known modes (or of another choice called `name`)."""
    if mode not in modes:
        close = difflib.get_close_matches(str(mode), modes, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{op}: unknown {name} {mode!r}, expected one of {', '.join(modes)}{hint}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see this call."""
    if torch.is_grad_enabled():
        for t in tensors:  # faster than a generator
            if t is not None and t.requires_grad:
                return True
    return False


def refuse_grad(op: str, *tensors: Tensor | None) -> None:
    """A bare `torch.ops` call has no autograd formula: without this, the reference would differentiate and C++ not."""
    if needs_grad(*tensors):
        raise RuntimeError(
            f"torch.ops.fastcam.{op} is not differentiable; call fastcam.ops.{op}, detach the inputs, "
            "or call under torch.no_grad()"
        )


def refuse_transforms(op: str) -> None:
    """Kernels see through no tensor that a transform of torch.func has wrapped."""
    if transformed():
        raise RuntimeError(
            f"fastcam.ops.{op} does not run inside torch.func (vmap, grad, jvp, ...): call it outside, with vmap's "
            "axis folded into the batch, or write the formula of its docstring in plain PyTorch"
        )


def check_no_grad(op: str, *tensors: Tensor | None) -> None:
    """For an op without a gradient, however it is called."""
    if needs_grad(*tensors):
        raise RuntimeError(f"fastcam.ops.{op} is not differentiable; detach the inputs, or call under torch.no_grad()")


def spatially_constant(tensor: Tensor) -> bool:
    """Whether the last two dimensions are an expansion of one value, and nobody asks for their gradient."""
    strides, shape = tensor.stride(), tensor.shape
    if (strides[-1] != 0 and shape[-1] != 1) or (strides[-2] != 0 and shape[-2] != 1):
        return False
    return not (torch.is_grad_enabled() and tensor.requires_grad)
