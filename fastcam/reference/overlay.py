"""Reference of `fastcam.ops.overlay`; formula and rules stand there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype

__all__ = ["overlay"]


def overlay(
    images: Tensor,
    maps: Tensor,
    table: Tensor,
    alpha: float = 0.8,
    signed: bool = False,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """(B[,T],H,W,3) uint8; arguments as checked by the public function."""
    acc = accumulation_dtype(images.dtype)
    values = images.to(acc)
    if mean is not None and std is not None:
        scale, shift = (torch.tensor(each, dtype=acc, device=images.device).view(-1, 1, 1) for each in (std, mean))
        values = values * scale + shift
    values = torch.where(values.isnan(), 0.0, values).clamp(0, 1)
    base = (values * 255).round().expand(-1, 3, -1, -1).movedim(1, -1)
    m = maps.to(acc)
    lowest = -1.0 if signed else 0.0
    m = torch.where(m.isnan(), 0.0, m).clamp(lowest, 1)
    entry = ((m - lowest) / (1 - lowest) * (len(table) - 1)).round().long()
    opacity = (alpha * m.abs().sqrt()).unsqueeze(-1)
    if maps.dim() == 4:
        base = base.unsqueeze(1)
    return (base + opacity * (table[entry] - base)).round().clamp(0, 255).to(torch.uint8).contiguous()
