"""`relevance_add`: relevance of a sum of two tensors, divided among them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam.backends import plain_call
from fastcam.ops import _checks
from fastcam.ops._plain import check_alike, register_plain, run

__all__ = ["relevance_add"]


def relevance_add(
    relevance: Tensor, first: Tensor, second: Tensor, factor: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Relevance R at the sum of two tensors, such as a residual connection, in proportion to what each adds.

    Formula, elementwise: (a s, b s) with s = R f / st(a + b), for the summands a = first, b = second;
        st as in `relevance_divide`, f the factor of an R kept as a product (1 where left out).
    Shapes: all (B,C,...), any number of dimensions from two on, any of them may be 0. Returns two of the same.
    Dtype and layout: float64, float32, float16 or bfloat16, all tensors alike, any strides; the results have the dtype
    and the strides of empty_like(relevance). Arithmetic in float64 for float64, else float32.
    Not differentiable. Errors: as `relevance_divide`.
    Cost: each tensor read once, the results written once. What does not lie in their memory order is copied.
    Source: Zennit's Norm rule for sums; Montavon et al. 2019.
    """
    found = plain_call("relevance_add", relevance, first, second, factor, epsilon)
    if found is not NotImplemented:
        return found
    _check(relevance, first, second, factor, epsilon)
    return run("relevance_add", relevance, first, second, factor, epsilon)


def _check(
    relevance: Tensor, first: Tensor, second: Tensor, factor: Tensor | None = None, epsilon: float = 1e-6
) -> None:
    check_alike("relevance_add", "relevance first second factor", relevance, first, second, factor)
    _checks.check_not_negative("relevance_add", "epsilon", epsilon)


def _fake(
    relevance: Tensor, first: Tensor, second: Tensor, factor: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(relevance), torch.empty_like(relevance)


register_plain("relevance_add", references.relevance_add, _fake, _check)
