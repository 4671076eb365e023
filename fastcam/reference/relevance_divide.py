"""Reference of `fastcam.ops.relevance_divide`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype

__all__ = ["quotient", "relevance_divide", "scaled"]


def relevance_divide(relevance: Tensor, divisor: Tensor, factor: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    """As empty_like(relevance); arguments as checked by the public function."""
    found = quotient(scaled(relevance, factor), divisor.to(accumulation_dtype(divisor.dtype)), epsilon)
    return torch.empty_like(relevance).copy_(found)


def scaled(relevance: Tensor, factor: Tensor | None) -> Tensor:
    """Relevance times its factor, in the accumulation dtype."""
    acc = accumulation_dtype(relevance.dtype)
    return relevance.to(acc) if factor is None else relevance.to(acc) * factor.to(acc)


def quotient(relevance: Tensor, divisor: Tensor, epsilon: float) -> Tensor:
    """relevance / (divisor moved away from zero by epsilon), 0 where even that is 0; no gradient of it has 0 / 0."""
    moved = torch.where(divisor >= 0, divisor + epsilon, divisor - epsilon) if epsilon else divisor
    empty = moved == 0
    return torch.where(empty, 0.0, relevance / torch.where(empty, 1.0, moved))
