"""Reference of `fastcam.ops.lfi_attend`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype


def lfi_attend(features: Tensor, importance: Tensor, constant_map: str = "raw") -> tuple[Tensor, Tensor, Tensor]:
    """(attended, attention, raw); arguments as checked by the public function."""
    acc = accumulation_dtype(features.dtype)
    x = features.to(acc)
    m = (importance.to(acc)[:, :, None, None] * x).sum(1, keepdim=True)
    raw = torch.where(m <= 0, 0.0, m)
    low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
    constant = raw if constant_map == "raw" else 0.0
    attention = torch.where(low == high, constant, (raw - low) / (high - low))
    attention = torch.where((low - high).isfinite(), attention, torch.nan)
    return torch.empty_like(features).copy_((1 + attention) * x), attention, raw
