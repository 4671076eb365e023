"""Reference of the op `lfi_attend_backward`; the formula stands in `fastcam/ops/lfi_attend_backward.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype
from fastcam.reference.lfi_mask_backward import through_min_max


def lfi_attend_backward(
    grad_attended: Tensor,
    grad_attention: Tensor | None,
    grad_raw: Tensor | None,
    features: Tensor,
    importance: Tensor,
    attention: Tensor,
    raw: Tensor,
    constant_map: str = "raw",
) -> tuple[Tensor, Tensor]:
    """(grad_features, grad_importance); arguments as checked by the op."""
    acc = accumulation_dtype(features.dtype)
    x, grad = features.to(acc), grad_attended.to(acc)
    grad_a = (grad * x).sum(1, keepdim=True)
    if grad_attention is not None:
        grad_a = grad_a + grad_attention
    constant = raw.amin((2, 3), keepdim=True) == raw.amax((2, 3), keepdim=True)
    grad_p = torch.where(constant, grad_a if constant_map == "raw" else 0.0, through_min_max(grad_a, raw))
    grad_p = torch.where(attention.isnan(), torch.nan, grad_p)
    if grad_raw is not None:
        grad_p = grad_p + grad_raw
    grad_p = torch.where(raw <= 0, 0.0, grad_p)
    grad_x = (1 + attention) * grad + importance.to(acc)[:, :, None, None] * grad_p
    grad_importance = (grad_p * x).sum((2, 3)).to(importance.dtype)
    return torch.empty_like(features).copy_(grad_x), grad_importance
