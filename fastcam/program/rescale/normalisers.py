"""Softmax, norms and attention, taken apart into sums, products and elementwise functions, each by its own rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .step import Cotangents, Step

__all__ = ["attention", "group_norm", "instance_norm", "layer_norm", "log_softmax", "rms_norm", "softmax"]


def softmax(step: Step, given: Tensor) -> Cotangents:
    """exp(u) / sum exp(u) = exp(u - log sum exp(u))."""
    return {step.source(): _through_softmax(given, *step.operand(), step.constant(1))}


def log_softmax(step: Step, given: Tensor) -> Cotangents:
    """u - log sum exp(u)."""
    dim = step.constant(1)
    _, _, share = _shares(*step.operand(), dim)
    return {step.source(): (given - given.sum(dim, keepdim=True) * share).to(given.dtype)}


def attention(step: Step, given: Tensor) -> Cotangents:
    """Scaled dot-product attention: softmax(q k^T scale) v."""
    node = step.node
    if any(node.args[3:]) or any(node.kwargs.get(key) for key in ("attn_mask", "dropout_p", "is_causal", "enable_gqa")):
        raise NotImplementedError("attention with a mask, dropout or grouped queries")
    (q, q_ref), (k, k_ref), (v, v_ref) = (step.operand(position) for position in range(3))
    scale = node.kwargs.get("scale") or q.shape[-1] ** -0.5
    scores, scores_ref = (q @ k.mT) * scale, (q_ref @ k_ref.mT) * scale
    a, a_ref = scores.softmax(-1), scores_ref.softmax(-1)
    to_scores = _through_softmax(given @ ((v + v_ref) / 2).mT, scores, scores_ref, -1) * scale
    parts = (
        to_scores @ ((k + k_ref) / 2),
        to_scores.mT @ ((q + q_ref) / 2),
        ((a + a_ref) / 2).mT @ given,
    )
    found: Cotangents = {}
    for position, part in enumerate(parts):
        ref = step.source(position)
        if ref in step.active:
            found[ref] = found[ref] + part if ref in found else part
    return found


def layer_norm(step: Step, given: Tensor) -> Cotangents:
    """(u - mean) / sqrt(variance + eps) over the last dimensions."""
    dims = tuple(range(-len(step.constant(1)), 0))
    weight = step.constant(2)
    return _standardised(step, given if weight is None else given * weight, step.constant(4, 1e-5), dims)


def rms_norm(step: Step, given: Tensor) -> Cotangents:
    """u / sqrt(mean u^2 + eps) over the last dimensions."""
    dims = tuple(range(-len(step.constant(1)), 0))
    weight, eps = step.constant(2), step.constant(3)
    eps = torch.finfo(given.dtype).eps if eps is None else eps
    return _standardised(step, given if weight is None else given * weight, eps, dims, center=False)


def group_norm(step: Step, given: Tensor) -> Cotangents:
    """(u - mean) / sqrt(variance + eps) over each group of channels."""
    return _by_groups(step, given, step.constant(1), step.constant(2), step.constant(4, 1e-5))


def instance_norm(step: Step, given: Tensor) -> Cotangents:
    """(u - mean) / sqrt(variance + eps) over each channel."""
    if not step.constant(5):
        raise NotImplementedError("instance norm on running statistics")
    return _by_groups(step, given, given.shape[1], step.constant(1), step.constant(7))


def _by_groups(step: Step, given: Tensor, groups: int, weight: Tensor | None, eps: float) -> Cotangents:
    scaled = given if weight is None else given * weight.reshape(1, -1, *(1,) * (given.ndim - 2))
    return _standardised(step, scaled, eps, (-1,), lambda x: x.reshape(x.shape[0], groups, -1))


def _standardised(
    step: Step,
    given: Tensor,
    eps: float,
    dims: tuple[int, ...],
    arrange: Callable[[Tensor], Tensor] = lambda x: x,
    center: bool = True,
) -> Cotangents:
    """d r with d = u - mean, q = mean d^2 + eps, r = q^(-1/2): product, power, square and mean, last to first."""
    d, d_ref = (arrange(x) for x in step.operand())
    if center:
        d, d_ref = (x - x.mean(dims, keepdim=True) for x in (d, d_ref))
    g = arrange(given)
    q, q_ref = (x.square().mean(dims, keepdim=True) + eps for x in (d, d_ref))
    r, r_ref = q.rsqrt(), q_ref.rsqrt()
    # (r - r') / (q - q'), without the cancellation
    slope = -r * r_ref / (q.sqrt() + q_ref.sqrt())
    at_q = (g * (d + d_ref) / 2).sum(dims, keepdim=True) * slope
    at_d = g * (r + r_ref) / 2 + at_q * (d + d_ref) * (q.numel() / d.numel())
    found = at_d - at_d.mean(dims, keepdim=True) if center else at_d
    return {step.source(): found.reshape(given.shape)}


def _through_softmax(given: Tensor, u: Tensor, u_ref: Tensor, dim: int) -> Tensor:
    """exp of log_softmax, so that no multiplier exceeds the largest given, whatever the two passes' levels."""
    total, total_ref, share = _shares(u, u_ref, dim)
    at_log = given * _exponential_slope(u.double() - total, u_ref.double() - total_ref)
    return (at_log - at_log.sum(dim, keepdim=True) * share).to(given.dtype)


def _shares(u: Tensor, u_ref: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """l = log sum exp(u) in both passes, and the multipliers of l: the slope of exp over that of exp(l), at most 1.

    In float64, where numbers 700 below the largest still count.
    """
    u, u_ref = u.double(), u_ref.double()
    total, total_ref = u.logsumexp(dim, keepdim=True), u_ref.logsumexp(dim, keepdim=True)
    shift = torch.maximum(total, total_ref)
    share = _exponential_slope(u - shift, u_ref - shift) / _exponential_slope(total - shift, total_ref - shift)
    return total, total_ref, share


def _exponential_slope(a: Tensor, a_ref: Tensor) -> Tensor:
    """(exp a - exp a') / (a - a') without cancellation, also where both are minus infinity."""
    equal = a == a_ref
    gap = torch.where(equal, 1, (a - a_ref).abs())
    return torch.maximum(a, a_ref).exp() * torch.where(equal, 1, -torch.expm1(-gap) / gap)
