"""Reference of `fastcam.ops.relevance_budgets`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype


def relevance_budgets(relevance: Tensor) -> Tensor:
    """Contiguous (B, 2); arguments as checked by the public function."""
    r = relevance.to(accumulation_dtype(relevance.dtype)).flatten(1)
    return torch.stack([r.clamp(min=0).sum(1), (-r).clamp(min=0).sum(1)], dim=1)
