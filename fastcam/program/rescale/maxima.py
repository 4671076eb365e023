"""Max pooling and maxima over dimensions.

The difference of two maxima goes to the position that explains it, where the larger of them stands: with p = u[i] and
p' = u'[j], a window adds g (p - p') / (u[s] - u'[s]) at s = i where p >= p', else at s = j. There |u[s] - u'[s]| >=
|p - p'|, so the ratio is in (0, 1]. Equal maxima leave g/2 at i and at j where u = u', which makes the rule symmetric
in the two passes and the plain gradient where they are equal. Overlapping windows add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..nodes import map_refs, op_name
from .step import Cotangents, Step

__all__ = ["max_pool", "maximum", "minimum"]


def max_pool(step: Step, given: Tensor) -> Cotangents:
    """Max pooling of one, two or three dimensions, any stride, padding and dilation, adaptive or not."""
    name = op_name(step.node.target).removesuffix("_with_indices")
    rank = int(name[-2])
    pool = getattr(torch.ops.aten, name if name.startswith("adaptive") else name + "_with_indices")
    settings = map_refs(step.node.args[1:], step.target.__getitem__)

    def windows(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, i = pool(u, *settings)
        return u.flatten(-rank), p.flatten(-rank), i.flatten(-rank)

    u, u_ref = step.operand()
    return {step.source(): _explained(given.flatten(-rank), *windows(u), *windows(u_ref)).reshape(u.shape)}


def maximum(step: Step, given: Tensor) -> Cotangents:
    """`amax` and `max` over dimensions: one window each."""
    return _over_dims(step, given, *step.operand())


def minimum(step: Step, given: Tensor) -> Cotangents:
    """`amin` and `min` over dimensions: min u = -max(-u), whose two signs cancel in the multipliers."""
    u, u_ref = step.operand()
    return _over_dims(step, given, -u, -u_ref)


def _over_dims(step: Step, given: Tensor, u: Tensor, u_ref: Tensor) -> Cotangents:
    dims = step.constant(1, ())
    dims = [d % u.ndim for d in ([dims] if isinstance(dims, int) else dims)] or list(range(u.ndim))
    order = [d for d in range(u.ndim) if d not in dims] + dims

    def windows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.permute(order).flatten(u.ndim - len(dims))
        return flat, *flat.max(-1, keepdim=True)

    flat = windows(u)
    found = _explained(given.reshape(flat[1].shape), *flat, *windows(u_ref)).unflatten(-1, [u.shape[d] for d in dims])
    return {step.source(): found.permute([order.index(d) for d in range(u.ndim)])}


def _explained(g: Tensor, u: Tensor, p: Tensor, i: Tensor, u_ref: Tensor, p_ref: Tensor, j: Tensor) -> Tensor:
    """Multipliers at u (..., n) from those at its maxima p (..., m), which stand at i and, in the other pass, at j."""
    u_ref, p_ref, j = u_ref.expand(u.shape), p_ref.expand(p.shape), j.expand(p.shape)
    at_i, at_j = p - u_ref.gather(-1, i), u.gather(-1, j) - p_ref
    first, difference = p >= p_ref, p - p_ref
    equal = difference == 0
    share = difference / torch.where(equal, 1, torch.where(first, at_i, at_j))
    to_winner = g * torch.where(equal, (at_i == 0).to(g.dtype) / 2, share)
    found = torch.zeros_like(u).scatter_add_(-1, torch.where(first, i, j), to_winner)
    return found.scatter_add_(-1, j, g * ((equal & (at_j == 0)).to(g.dtype) / 2))
