"""Reference of `fastcam.ops.similarity_weights`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype


def similarity_weights(
    first: Tensor, second: Tensor, term: str = "cosine", weighting: str = "minmax", dissimilarity: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous (B,D), (B,D), (B,); arguments as checked by the public function."""
    u, v = first.double().contiguous(), second.double().contiguous()
    c = _contributions(u, v, term)
    c = -c if dissimilarity else c
    t = c.sum(1)
    size = t.abs()[:, None]
    if weighting == "minmax":
        low, high = c.amin(1, keepdim=True), c.amax(1, keepdim=True)
        w = torch.where(low == high, 1.0, (c - low) / (high - low))
        finite = (u - v).isfinite().all(1) & t.isfinite()
        w = torch.where(finite[:, None], w, torch.nan)
    else:
        w = c if weighting == "raw" else torch.where(size == 0, c, c / size)
    acc = accumulation_dtype(first.dtype)
    return c.to(acc), w.to(acc, copy=True), t.to(acc)


def _contributions(u: Tensor, v: Tensor, term: str) -> Tensor:
    if term == "cosine":
        return u * v / (u.norm(dim=1, keepdim=True).clamp(min=1e-12) * v.norm(dim=1, keepdim=True).clamp(min=1e-12))
    if term == "neg_sq":
        return -((u - v) ** 2)
    if term == "inverse":
        return 1 / (1 + (u - v).abs())
    return u * v if term == "dot" else 2 * u * v
