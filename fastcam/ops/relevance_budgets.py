"""`relevance_budgets`: what an image's positive and negative relevance add up to."""

from __future__ import annotations

from torch import Tensor

from fastcam import reference as references
from fastcam._dtypes import accumulation_dtype
from fastcam.backends import plain_call
from fastcam.ops._plain import check_alike, register_plain, run

__all__ = ["relevance_budgets"]


def relevance_budgets(relevance: Tensor) -> Tensor:
    """Totals of the positive and of the negative entries of R, image by image.

    Formula: p = sum max(R, 0), q = sum max(-R, 0), over all but the first dimension.
    Shapes: relevance (B,C,...), any number of dimensions from two on, any of them may be 0. Returns (B,2): p, q.
    Dtype and layout: float64, float32, float16 or bfloat16, any strides; the result is contiguous, in the dtype sums
    are formed in (float64 for float64, else float32). Deterministic: the order of additions depends on an image's shape
    and memory order alone, so its sums are those of any batch it is in.
    Not differentiable. Errors: TypeError for a wrong type, layout or dtype, ValueError for a wrong shape, RuntimeError
    for an input that requires grad.
    Cost: one read; two numbers an image written, the positive and the negative part never exist.
    Source: Nam & Lee 2024 (Attribution Equilibrium).
    """
    found = plain_call("relevance_budgets", relevance)
    if found is not NotImplemented:
        return found
    _check(relevance)
    return run("relevance_budgets", relevance)


def _check(relevance: Tensor) -> None:
    check_alike("relevance_budgets", "relevance", relevance)


def _fake(relevance: Tensor) -> Tensor:
    return relevance.new_empty((relevance.shape[0], 2), dtype=accumulation_dtype(relevance.dtype))


register_plain("relevance_budgets", references.relevance_budgets, _fake, _check)
