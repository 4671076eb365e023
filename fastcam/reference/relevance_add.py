"""Reference of `fastcam.ops.relevance_add`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype
from fastcam.reference.relevance_divide import quotient, scaled


def relevance_add(
    relevance: Tensor, first: Tensor, second: Tensor, factor: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Both as empty_like(relevance); arguments as checked by the public function."""
    acc = accumulation_dtype(relevance.dtype)
    one, other = first.to(acc), second.to(acc)
    share = quotient(scaled(relevance, factor), one + other, epsilon)
    found = torch.empty_like(relevance), torch.empty_like(relevance)
    return found[0].copy_(one * share), found[1].copy_(other * share)
