"""`relevance_divide`: the division in the middle of most relevance rules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam.backends import plain_call
from fastcam.ops import _checks
from fastcam.ops._plain import check_alike, register_plain, run

__all__ = ["relevance_divide"]


def relevance_divide(relevance: Tensor, divisor: Tensor, factor: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    """Relevance R at a layer's output, divided by the layer's (modified) output d: the message that goes back.

    Formula, elementwise: R f / st(d), st(d) = d + epsilon for d >= 0, d - epsilon for d < 0; 0 where st(d) = 0.
        f is the factor of an R kept as a product (1 where left out). With epsilon = 0 the division is guarded: 0 where
        d is 0, whatever R is. Other NaN comes through.
    Shapes: all (B,C,...), any number of dimensions from two on, any of them may be 0. Returns the same.
    Dtype and layout: float64, float32, float16 or bfloat16, all tensors alike, any strides; the result has the dtype
    and the strides of empty_like(relevance). Arithmetic in float64 for float64, else float32.
    Not differentiable. Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes and an epsilon
    that is negative or not finite, RuntimeError for inputs that require grad.
    Cost: each tensor read once, the result written once. What does not lie in the result's memory order is copied.
    Source: Bach et al. 2015; Montavon et al. 2019 (LRP): R_j / (z_j + eps sign z_j).
    """
    found = plain_call("relevance_divide", relevance, divisor, factor, epsilon)
    if found is not NotImplemented:
        return found
    _check(relevance, divisor, factor, epsilon)
    return run("relevance_divide", relevance, divisor, factor, epsilon)


def _check(relevance: Tensor, divisor: Tensor, factor: Tensor | None = None, epsilon: float = 1e-6) -> None:
    check_alike("relevance_divide", "relevance divisor factor", relevance, divisor, factor)
    _checks.check_not_negative("relevance_divide", "epsilon", epsilon)


def _fake(relevance: Tensor, divisor: Tensor, factor: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    return torch.empty_like(relevance)


register_plain("relevance_divide", references.relevance_divide, _fake, _check)
