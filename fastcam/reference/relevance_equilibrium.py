"""Reference of `fastcam.ops.relevance_equilibrium`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype
from fastcam.reference.relevance_divide import quotient


def relevance_equilibrium(relevance: Tensor, budgets: Tensor, divisors: Tensor, ratio: float = 2.0) -> Tensor:
    """As empty_like(divisors); arguments as checked by the public function."""
    acc = accumulation_dtype(relevance.dtype)
    r, z = relevance.to(acc), divisors.to(acc).reshape(3, *relevance.shape)
    p, q = (budgets.select(1, i).reshape(r.shape[0], *(1,) * (r.dim() - 1)) for i in (0, 1))
    positive = quotient(r.clamp(min=0), p, 0.0)
    negative = quotient(r.clamp(max=0), q, 0.0)
    parts = torch.stack([ratio * positive + negative, positive, negative])
    return torch.empty_like(divisors).copy_(quotient(parts, z, 0.0).flatten(0, 1))
