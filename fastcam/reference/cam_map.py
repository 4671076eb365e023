"""Reference of `fastcam.ops.cam_map_with_raw`; formula and rules stand there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype


def cam_map(
    features: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
    relu: bool = True,
    normalize: bool = True,
    size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(maps, raw, finite); arguments as checked by the public function."""
    acc = accumulation_dtype(features.dtype)
    d = features.to(acc) if reference is None else features.to(acc) - reference.to(acc)
    w = weights.to(acc)
    if w.dim() in (2, 4):  # no target dimension
        w = w.unsqueeze(1)
    m = torch.einsum("btk,bkhw->bthw", w, d) if w.dim() == 3 else (w * d.unsqueeze(1)).sum(2)
    finite = m.isfinite().flatten(2).all(2)
    raw = (m.relu() if relu else m).contiguous()
    maps = resize(raw, size) if size is not None else raw.clone()
    if normalize:
        maps = min_max(maps, raw).masked_fill(~finite[..., None, None], torch.nan)
    if weights.dim() in (2, 4):
        return maps.squeeze(1), raw.squeeze(1), finite.squeeze(1)
    return maps, raw, finite


def resize(raw: Tensor, size: Sequence[int]) -> Tensor:
    """(B,T,H,W) to (B,T,*size): bilinear, align_corners=False, no antialiasing."""
    one_channel = raw.reshape(-1, 1, *raw.shape[2:])  # aten refuses zero channels, not a zero batch
    return torch.ops.aten.upsample_bilinear2d(one_channel, size, False).reshape(*raw.shape[:2], *size)


def min_max(u: Tensor, raw: Tensor) -> Tensor:
    """(u - min) / (max - min) per map, zeros where the map is constant.

    Constancy is also asked of `raw`: the rounding of a bilinear resize turns a constant map into one that differs by
    an ulp here and there, which min-max scaling would blow up to the full range.
    """
    low, high = u.amin((2, 3), keepdim=True), u.amax((2, 3), keepdim=True)
    flat = (low == high) | (raw.amin((2, 3), keepdim=True) == raw.amax((2, 3), keepdim=True))
    span = torch.where(flat, 1, high - low)
    return torch.where(flat, 0, (u - low) / span)
