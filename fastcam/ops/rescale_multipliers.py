"""`rescale_multipliers`: DeepLIFT's Rescale rule for activations with one kink at zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam._dtypes import accumulation_dtype
from fastcam._library import LIBRARY
from fastcam._tracing import graph_holds_ops
from fastcam.backends import implementation, plain_call, register
from fastcam.ops import _checks
from fastcam.reference.rescale_multipliers import gain, rescale_factor

__all__ = ["rescale_multipliers"]


def rescale_multipliers(multipliers: Tensor, inputs: Tensor, reference: Tensor, negative_slope: float = 0.0) -> Tensor:
    """Multipliers g of an activation's outputs, walked back to its inputs u, whose reference is r.

    Formula, elementwise, f(x) = x for x > 0, else negative_slope x (ReLU for 0): g s with
        s = 1 where u > 0 and r > 0, negative_slope where u <= 0 and r <= 0,
        else (f(u) - f(r)) / (u - r), where u - r adds two magnitudes: nothing cancels and there is no epsilon.
        At u = r this is the gradient of torch's leaky_relu. NaN in u or r gives NaN.
    Shapes: inputs (B,...) of one dimension or more; multipliers the same; reference the same or (1,...).
    Returns (B,...). Every dimension may be 0.
    Dtype and layout: float64, float32, float16 or bfloat16 (multipliers may also be in the accumulation dtype), any
    strides; the result has the multipliers' dtype and the strides of empty_like(multipliers). Arithmetic in the
    accumulation dtype (float64 for float64, else float32).
    Differentiable in all three tensors; which of the cases an element falls into is constant.
    Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes and a negative_slope that is not
    finite.
    Cost: one pass over the three tensors. What does not lie in the result's memory order is copied to it first.
    Source: Shrikumar et al. 2017 (DeepLIFT), the Rescale rule.
    """
    found = plain_call("rescale_multipliers", multipliers, inputs, reference, negative_slope)
    if found is not NotImplemented:
        return found
    _check(multipliers, inputs, reference, negative_slope)
    if _checks.needs_grad(multipliers, inputs, reference):
        return _RescaleMultipliers.apply(multipliers, inputs, reference, negative_slope)
    return _run(multipliers, inputs, reference, negative_slope)


def _check(multipliers: Tensor, inputs: Tensor, reference: Tensor, negative_slope: float) -> None:
    op = "rescale_multipliers"
    _checks.check_tensor(op, "inputs", inputs)
    if inputs.dim() == 0:
        raise ValueError(f"{op}: inputs must be (B,...), got 0 dimensions")
    _checks.check_dtype(op, "inputs", inputs)
    _checks.check_companion(op, "multipliers", multipliers, inputs, or_accumulation=True, of="inputs")
    _checks.check_same_shape(op, "multipliers", multipliers, inputs, of="inputs")
    _checks.check_tensor(op, "reference", reference)  # not optional here
    _checks.check_reference(op, reference, inputs, of="inputs")
    _checks.check_finite(op, "negative_slope", negative_slope)


def _run(multipliers: Tensor, inputs: Tensor, *rest: Any) -> Tensor:
    if graph_holds_ops():
        return torch.ops.fastcam.rescale_multipliers.default(multipliers, inputs, *rest)
    return implementation("rescale_multipliers", _checks.device_type(inputs))(multipliers, inputs, *rest)


class _RescaleMultipliers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, multipliers: Tensor, inputs: Tensor, reference: Tensor, negative_slope: float) -> Tensor:
        ctx.save_for_backward(multipliers, inputs, reference)
        ctx.negative_slope = negative_slope
        return _run(multipliers, inputs, reference, negative_slope)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        multipliers, inputs, reference = ctx.saved_tensors
        acc, slope = accumulation_dtype(inputs.dtype), ctx.negative_slope
        grad, u, r = grads[0].to(acc), inputs.to(acc), reference.to(acc)
        factor, mixed, difference = rescale_factor(u, r, slope)
        grad_u = grad_r = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_secant = torch.where(mixed, grad * multipliers.to(acc) / difference, 0)
            grad_u = (grad_secant * (gain(u, slope) - factor)).to(inputs.dtype)
            grad_r = (grad_secant * (factor - gain(r, slope))).sum_to_size(reference.shape)
            grad_r = grad_r.to(reference.dtype)
        return (grad * factor).to(multipliers.dtype), grad_u, grad_r, None


def _reference(multipliers: Tensor, inputs: Tensor, reference: Tensor, negative_slope: float = 0.0) -> Tensor:
    _checks.refuse_grad("rescale_multipliers", multipliers, inputs, reference)
    _check(multipliers, inputs, reference, negative_slope)  # the formula alone would broadcast what kernels refuse
    return references.rescale_multipliers(multipliers, inputs, reference, negative_slope)


def _fake(multipliers: Tensor, inputs: Tensor, reference: Tensor, negative_slope: float = 0.0) -> Tensor:
    return torch.empty_like(multipliers)


LIBRARY.impl("rescale_multipliers", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastcam::rescale_multipliers", _fake, lib=LIBRARY)
register("rescale_multipliers", torch.ops.fastcam.rescale_multipliers.default, references.rescale_multipliers)
