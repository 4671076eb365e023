"""Softmax, norms and attention, taken apart into sums, products and elementwise functions, each by its own rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .step import Cotangents, Step

__all__ = ["attention", "group_norm", "instance_norm", "layer_norm", "log_softmax", "rms_norm", "softmax"]


def softmax(step: Step, given: Tensor) -> Cotangents:
    """exp(u) / sum exp(u)."""
    return {step.source(): _through_softmax(given, *step.operand(), step.constant(1))}


def log_softmax(step: Step, given: Tensor) -> Cotangents:
    """u - log sum exp(u)."""
    dim = step.constant(1)
    (e, e_ref), slope = _exponentials(*step.operand(), dim)
    total, total_ref = e.sum(dim, keepdim=True), e_ref.sum(dim, keepdim=True)
    found = given - given.sum(dim, keepdim=True) * _log_slope(total, total_ref) * slope
    return {step.source(): found.to(given.dtype)}


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
    (e, e_ref), slope = _exponentials(u, u_ref, dim)
    total, total_ref = e.sum(dim, keepdim=True), e_ref.sum(dim, keepdim=True)
    at_total = -(given * (e + e_ref) / 2).sum(dim, keepdim=True) / (total * total_ref)
    return ((given * (1 / total + 1 / total_ref) / 2 + at_total) * slope).to(given.dtype)


def _exponentials(u: Tensor, u_ref: Tensor, dim: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """exp of both passes and the slope between them without cancellation.

    Both are shifted alike, so nothing overflows; in float64, where what is 700 below the largest is still not zero.
    """
    u, u_ref = u.double(), u_ref.double()
    shift = torch.maximum(u, u_ref).amax(dim, keepdim=True)
    e, e_ref = (u - shift).exp(), (u_ref - shift).exp()
    gap = (u - u_ref).abs()
    slope = torch.maximum(e, e_ref) * torch.where(gap == 0, 1, -torch.expm1(-gap) / torch.where(gap == 0, 1, gap))
    return (e, e_ref), slope


def _log_slope(x: Tensor, x_ref: Tensor) -> Tensor:
    """(log x - log x') / (x - x') without cancellation."""
    least, gap = torch.minimum(x, x_ref), (x - x_ref).abs()
    return torch.where(gap == 0, 1 / least, torch.log1p(gap / least) / torch.where(gap == 0, 1, gap))
