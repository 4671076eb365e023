"""`relevance_split`: messages of the rules that treat positive and negative contributions apart."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam.backends import plain_call
from fastcam.ops import _checks
from fastcam.ops._plain import check_alike, register_plain, run
from fastcam.reference.relevance_split import result_format

__all__ = ["RULES", "relevance_split"]

RULES = ("alpha_beta", "gamma", "rap")


def relevance_split(
    relevance: Tensor,
    output: Tensor,
    positive: Tensor,
    factor: Tensor | None = None,
    *,
    rule: str,
    first: float = 2.0,
    second: float = 1.0,
    epsilon: float = 1e-6,
) -> Tensor:
    """Two messages for the relevance R at a layer's output z: u for its positive weights, v for its negative ones.

    Formula, elementwise, with p what the positive contributions (and the positive bias) add up to, n = z - p <= 0 the
    rest, r = R f for the factor f of an R kept as a product (1 where left out), st and its guard as in
    `relevance_divide`:
        rule "alpha_beta"  u = first r / st(p)                             v = -second r / st(n), 0 where n = 0
        rule "gamma"       u = r / st(z + first p) where z > 0, else 0     v = r / st(z + first n) where z < 0, else 0
        rule "rap"         u = max(r,0) / p                                v = min(r,0) / |n| + r / (p + |n|)
        n counts as 0 where |n| <= 8 eps p, eps that of the tensors' dtype: it is then rounding alone.
    Shapes: all (B,C,...), any number of dimensions from two on, any of them may be 0. Returns (B,2C,...), u before v.
    Dtype and layout: float64, float32, float16 or bfloat16, all tensors alike, any strides; the result has their dtype
    and is channels_last where the relevance is (and not also contiguous), else contiguous. Arithmetic in float64 for
    float64, else float32.
    Not differentiable. Errors: as `relevance_divide`, and ValueError for an unknown rule or numbers that are negative
    or not finite.
    Cost: each tensor read once, the result written once. What does not lie in its memory order is copied.
    Source: Bach et al. 2015 (alpha-beta); Andeol et al. 2021 (gamma); Nam et al., arXiv 1904.00605 (RAP).
    """
    found = plain_call("relevance_split", relevance, output, positive, factor, rule, first, second, epsilon)
    if found is not NotImplemented:
        return found
    _check(relevance, output, positive, factor, rule=rule, first=first, second=second, epsilon=epsilon)
    numbers = {"first": first, "second": second, "epsilon": epsilon}
    return run("relevance_split", relevance, output, positive, factor, rule=rule, **numbers)


def _check(
    relevance: Tensor,
    output: Tensor,
    positive: Tensor,
    factor: Tensor | None = None,
    *,
    rule: str,
    first: float = 2.0,
    second: float = 1.0,
    epsilon: float = 1e-6,
) -> None:
    op = "relevance_split"
    check_alike(op, "relevance output positive factor", relevance, output, positive, factor)
    _checks.check_mode(op, rule, RULES, "rule")
    for name, value in (("first", first), ("second", second), ("epsilon", epsilon)):
        _checks.check_not_negative(op, name, value)


def _fake(
    relevance: Tensor,
    output: Tensor,
    positive: Tensor,
    factor: Tensor | None = None,
    *,
    rule: str,
    first: float = 2.0,
    second: float = 1.0,
    epsilon: float = 1e-6,
) -> Tensor:
    shape = (relevance.shape[0], 2 * relevance.shape[1], *relevance.shape[2:])
    return torch.empty(shape, dtype=relevance.dtype, device=relevance.device, memory_format=result_format(relevance))


register_plain("relevance_split", references.relevance_split, _fake, _check)
