"""Reference of the op `lfi_mask_backward`; the formula stands in `fastcam/ops/lfi_mask_backward.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype


def lfi_mask_backward(grad: Tensor, features: Tensor, grey: Tensor) -> Tensor:
    """As empty_like(features); arguments as checked by the op."""
    acc = accumulation_dtype(features.dtype)
    x = features.to(acc)
    passed = torch.where(x == 0, 0.0, grad.to(acc) * grey)
    return torch.empty_like(features).copy_(through_min_max(passed, x))


def through_min_max(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of (x - min) / (max - min) over positions: ties share it evenly, constant x has none."""
    hw = (2, 3)
    low, high = x.amin(hw, keepdim=True), x.amax(hw, keepdim=True)
    extent = high - low
    passed = grad / extent
    total = passed.sum(hw, keepdim=True)
    weighted = (passed * ((x - low) / extent)).sum(hw, keepdim=True)
    at_low, at_high = x == low, x == high
    from_low = torch.where(at_low, (weighted - total) / at_low.sum(hw, keepdim=True), 0.0)
    from_high = torch.where(at_high, weighted / at_high.sum(hw, keepdim=True), 0.0)
    return torch.where(low == high, 0.0, passed + from_low - from_high)
