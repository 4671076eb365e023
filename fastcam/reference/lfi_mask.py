"""Reference of `fastcam.ops.lfi_mask`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype


def lfi_mask(features: Tensor, grey: Tensor) -> Tensor:
    """As empty_like(features); arguments as checked by the public function."""
    return torch.empty_like(features).copy_(normalized(features) * grey)


def normalized(features: Tensor) -> Tensor:
    """N, in the accumulation dtype."""
    x = features.to(accumulation_dtype(features.dtype))
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    found = torch.where(low == high, 1.0, (x - low) / (high - low))
    return torch.where((x == 0) & ~low.isnan(), 0.0, found)
