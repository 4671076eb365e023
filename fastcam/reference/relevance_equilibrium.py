"""Reference of `fastcam.ops.relevance_equilibrium`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype
from fastcam.reference.relevance_divide import quotient


def relevance_equilibrium(relevance: Tensor, budgets: Tensor, divisors: Tensor, ratio: float = 2.0) -> Tensor:
    """As empty_like(divisors); arguments as checked by the public function."""
    acc = accumulation_dtype(relevance.dtype)
    r, z = relevance.to(acc), divisors.to(acc)
    p, q = (x.reshape(-1, *(1,) * (r.dim() - 1)) for x in budgets.unbind(1))
    positive = quotient(r.clamp(min=0), p, 0.0)
    negative = quotient(r.clamp(max=0), q, 0.0)
    z = z.unflatten(0, (3, -1)) if z.shape[0] != 0 else z.reshape(3, *z.shape)
    parts = torch.stack([ratio * positive + negative, positive, negative])
    return torch.empty_like(divisors).copy_(quotient(parts, z, 0.0).flatten(0, 1))
