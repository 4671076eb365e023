"""Reference of `fastcam.ops.relevance_split`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype
from fastcam.reference.relevance_divide import quotient, scaled

__all__ = ["relevance_split", "result_format"]


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
    """(B, 2C, ...); arguments as checked by the public function."""
    acc = accumulation_dtype(relevance.dtype)
    r, z, p = scaled(relevance, factor), output.to(acc), positive.to(acc)
    n = z - p
    # What is left of a cancellation by rounding alone; never a divisor.
    n = torch.where(n >= -8 * torch.finfo(relevance.dtype).eps * p, 0.0, n)
    if rule == "alpha_beta":
        u, v = first * quotient(r, p, epsilon), torch.where(n >= 0, 0.0, -second * (r / (n - epsilon)))
    elif rule == "gamma":
        u = quotient(torch.where(z <= 0, 0.0, r), z + first * p, epsilon)  # NaN comes through
        v = torch.where(z >= 0, 0.0, r / (z + first * n - epsilon))
    else:  # rap
        u = quotient(r.clamp(min=0), p, 0.0)
        v = quotient(r.clamp(max=0), -n, 0.0) + quotient(r, p - n, 0.0)
    shape = (relevance.shape[0], 2 * relevance.shape[1], *relevance.shape[2:])
    like = {"dtype": relevance.dtype, "device": relevance.device, "memory_format": result_format(relevance)}
    return torch.empty(shape, **like).copy_(torch.cat([u, v], 1))


def result_format(relevance: Tensor) -> torch.memory_format:
    """channels_last (in two or three dimensions) where the relevance is and is not contiguous too."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(relevance.dim(), torch.contiguous_format)
    if relevance.is_contiguous() or not relevance.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last
