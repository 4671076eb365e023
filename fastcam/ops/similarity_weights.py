"""`similarity_weights`: what each channel contributes to the similarity of two embeddings."""

from __future__ import annotations

from torch import Tensor

from fastcam import reference as references
from fastcam._dtypes import accumulation_dtype
from fastcam.backends import plain_call
from fastcam.ops import _checks
from fastcam.ops._plain import register_plain, run

__all__ = ["TERMS", "WEIGHTINGS", "similarity_weights"]

TERMS = ("cosine", "dot", "neg_sq", "cross", "inverse")
WEIGHTINGS = ("minmax", "ratio", "raw")


def similarity_weights(
    first: Tensor, second: Tensor, term: str = "cosine", weighting: str = "minmax", dissimilarity: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The similarity of embeddings u and v, split over their channels, and channel weights made of it.

    Formula, row by row:
        term "cosine"   c_d = u_d v_d / (max(|u|, 1e-12) max(|v|, 1e-12))
        term "dot"      c_d = u_d v_d
        term "neg_sq"   c_d = -(u_d - v_d)^2
        term "cross"    c_d = 2 u_d v_d
        term "inverse"  c_d = 1 / (1 + |u_d - v_d|)
        c is negated for the dissimilarity; t = sum_d c_d
        weighting "minmax"  w_d = (c_d - min c) / (max c - min c), 1 throughout a row of equal c
        weighting "ratio"   w_d = c_d / |t|, c_d where t = 0
        weighting "raw"     w_d = c_d
    Shapes: first (B,D) or (1,D), second the same; one embedding goes with every row of the other. D >= 1, B may be 0.
    Returns contributions c (B,D), weights w (B,D), total t (B,).
    Dtype and layout: float64, float32, float16 or bfloat16, both alike, any strides; the results are contiguous, in
    the dtype sums are formed in (float64 for float64, else float32).
    Arithmetic: in float64 throughout, every result rounded once, so the squares and products of float32 embeddings of
    any magnitude neither overflow nor vanish on the way; those of float64 do from about 1e154 on. NaN or infinity in u
    or v, or a t that is not finite, makes that row's "minmax" weights NaN. Deterministic: a row's results are the same
    in any batch.
    Not differentiable. Errors: TypeError for a wrong type, layout or dtype, ValueError for a wrong shape, device, term
    or weighting, RuntimeError for an input that requires grad.
    Cost: each embedding read once (twice on a GPU, the second time from its cache), the results written once. Rows that
    are not dense are copied.
    Source: Liao et al., arXiv 2506.01636 (SFAM).
    """
    found = plain_call("similarity_weights", first, second, term, weighting, dissimilarity)
    if found is not NotImplemented:
        return found
    _check(first, second, term, weighting, dissimilarity)
    return run("similarity_weights", first, second, term, weighting, dissimilarity)


def _check(
    first: Tensor, second: Tensor, term: str = "cosine", weighting: str = "minmax", dissimilarity: bool = False
) -> None:
    op = "similarity_weights"
    _checks.check_tensor(op, "first", first)
    if first.dim() != 2:
        raise ValueError(f"{op}: first must be (B,D), got {first.dim()} dimensions: {tuple(first.shape)}")
    _checks.check_dtype(op, "first", first)
    b, d = first.shape
    if d == 0:
        raise ValueError(f"{op}: first needs at least one channel, got (B,D) = {(b, d)}")
    _checks.check_companion(op, "second", second, first, or_accumulation=False, of="first")
    shape = second.shape
    if len(shape) != 2 or shape[1] != d or (shape[0] != b and 1 not in (b, shape[0])):
        raise ValueError(
            f"{op}: second must be {tuple(first.shape)} like the first, or one of the two have batch 1, "
            f"got {tuple(second.shape)}"
        )
    _checks.check_mode(op, term, TERMS, "term")
    _checks.check_mode(op, weighting, WEIGHTINGS, "weighting")
    _checks.check_no_grad(op, first, second)


def _fake(
    first: Tensor, second: Tensor, term: str = "cosine", weighting: str = "minmax", dissimilarity: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    batch, acc = second.shape[0] if first.shape[0] == 1 else first.shape[0], accumulation_dtype(first.dtype)
    shape = (batch, first.shape[1])
    return first.new_empty(shape, dtype=acc), first.new_empty(shape, dtype=acc), first.new_empty(batch, dtype=acc)


register_plain("similarity_weights", references.similarity_weights, _fake, _check)
