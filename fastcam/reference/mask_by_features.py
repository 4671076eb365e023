"""Reference of `fastcam.ops.mask_by_features`; formula and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype
from fastcam.reference.cam_map import min_max, resize


def mask_by_features(
    images: Tensor,
    features: Tensor,
    start: int = 0,
    count: int | None = None,
    *,
    noise: Tensor | None = None,
    scale: float = 1.0,
    order: str = "resize_then_minmax",
) -> Tensor:
    """(count,C,H,W); arguments as checked by the public function."""
    acc = accumulation_dtype(images.dtype)
    channels = features.shape[1]
    stop = features.shape[0] * channels if count is None else start + count
    pairs = torch.arange(start, stop, device=features.device)
    image, channel = pairs // channels, pairs % channels
    maps = features[image, channel].to(acc).unsqueeze(1)
    size = images.shape[2:]
    mask = min_max(resize(maps, size), maps) if order == "resize_then_minmax" else resize(min_max(maps, maps), size)
    mask = mask.masked_fill(~maps.isfinite().flatten(1).all(1)[:, None, None, None], torch.nan)
    if noise is not None:
        mask = mask + noise.to(acc).unsqueeze(1)
    masked = images[image].to(acc) * (scale * mask)
    return masked.to(images.dtype).clone(memory_format=result_format(images))


def result_format(images: Tensor) -> torch.memory_format:
    """channels_last for images that are channels_last and not also contiguous, else contiguous."""
    channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
