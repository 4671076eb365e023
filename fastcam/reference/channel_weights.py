"""Reference of `fastcam.ops.channel_weights`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype


def channel_weights(
    features: Tensor, multipliers: Tensor, reference: Tensor | None = None, mode: str = "mean"
) -> Tensor:
    """(B[,T],K); arguments as checked by the public function."""
    acc = accumulation_dtype(features.dtype)
    g = multipliers.to(acc)
    if mode == "mean":
        return g.mean((-2, -1))
    a = features.to(acc) if reference is None else features.to(acc) - reference.to(acc)
    if g.dim() == 5:
        a = a.unsqueeze(1)
    if mode == "sum":
        return (g * a).sum((-2, -1))
    s = a.sum((-2, -1))
    if mode == "xgrad":
        return guarded_ratio((g * a).sum((-2, -1)), s, a.abs().sum((-2, -1)))
    if mode == "grad_cam_pp":
        return (alpha(s[..., None, None], g) * g.relu()).sum((-2, -1))
    raise ValueError(f"unknown mode {mode!r}")


def guarded_ratio(numerator: Tensor, total: Tensor, magnitude: Tensor) -> Tensor:
    """numerator / total, 0 where total is cancellation noise: |total| <= 1e-6 * sum of the magnitudes."""
    guard = total.abs() <= 1e-6 * magnitude
    return torch.where(guard, 0, numerator / torch.where(guard, 1, total))


def alpha(total: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM++'s 1 / (2 + S G), 0 where the denominator is within 1e-6 of zero."""
    denominator = 2 + total * g
    guard = denominator.abs() < 1e-6
    return torch.where(guard, 0, 1 / torch.where(guard, 1, denominator))
