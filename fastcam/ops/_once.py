"""Gradients that have no gradient themselves, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcam.backends import backend as forced

__all__ = ["differentiable_once"]

Gradients = tuple[Tensor | None, ...]


def differentiable_once(op: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorates backward(ctx, saved tensors, *gradients) of the autograd function of `op`: its results are constants,
    and a second backward pass through them is a RuntimeError. It runs by `ctx.backend`, that of the forward pass: on
    GPUs in a thread of autograd's own, where no `fastcam.backend(...)` of the caller's holds.

    `torch.autograd.function.once_differentiable` marks them only where the gradients that come in require one: not for
    the sum of the results, say, whose second derivative would silently miss this op's part.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def marked(ctx: Any, *gradients: Tensor | None) -> Gradients:
            saved = ctx.saved_tensors
            if torch.compiler.is_compiling():  # graphs refuse second derivatives themselves
                return backward(ctx, saved, *gradients)
            with torch.no_grad(), forced(ctx.backend):
                found = backward(ctx, saved, *gradients)
            if not torch.is_grad_enabled():
                return found
            sources = [each for each in (*saved, *gradients) if each is not None and each.requires_grad]
            return tuple(each if each is None or not sources else _Refusing.apply(op, each, *sources) for each in found)

        return marked

    return decorate


class _Refusing(torch.autograd.Function):
    """Hands a gradient on, as one that hangs on the tensors it was computed from."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        raise RuntimeError(
            f"fastcam.ops.{ctx.op} can be differentiated once, and this asks for a second derivative through it; "
            "detach its gradient where that may be a constant, or write the formula of its docstring in plain PyTorch"
        )
