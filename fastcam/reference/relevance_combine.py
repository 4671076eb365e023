"""Reference of `fastcam.ops.relevance_combine`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype


def relevance_combine(
    inputs: Tensor, parts: Tensor, budgets: Tensor, shift: bool = True, threshold: float = 0.0
) -> Tensor:
    """As empty_like(inputs); arguments as checked by the public function."""
    acc = accumulation_dtype(inputs.dtype)
    x = inputs.to(acc)
    shared, active, inactive = (parts.to(acc).reshape(3, *x.shape).select(0, i) for i in range(3))
    c = torch.where(x <= 0, 0.0, x * shared)
    if shift:
        touched = c != 0
        count = touched.flatten(1).sum(1)
        unit = torch.where((count > 0) & (budgets[:, 0] > 0), 1.0 / count.to(acc), 0.0)
        c = c - unit.reshape(x.shape[0], *(1,) * (x.dim() - 1)) * touched
    return torch.empty_like(inputs).copy_(c + torch.where(x > threshold, active, inactive))
