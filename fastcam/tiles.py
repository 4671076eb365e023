"""Images larger than a network is run on: explained tile by tile, and put together again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcam._network import check_images
from fastcam.explainer import Attribution, Explainer
from fastcam.methods._maps import finish
from fastcam.methods._method import Evidence
from fastcam.program.targets import TargetSpec

__all__ = ["attribute_tiles"]


def attribute_tiles(
    model: nn.Module,
    images: Tensor,
    method: str = "lift_cam",
    *,
    tile: Sequence[int],
    overlap: float = 0.5,
    targets: TargetSpec,
    normalize: bool = True,
    **settings: Any,
) -> Attribution:
    """`fastcam.attribute` of every tile; where tiles overlap their maps are averaged before anything is scaled.

        result = fastcam.attribute_tiles(model, slides, "grad_cam", tile=(224, 224), targets=3)    # maps: (B, H, W)

    tile     size of a tile in pixels, one number for each spatial dimension, none larger than the images'
    overlap  in [0, 1): the part of a tile that the next one shares. The last tile of a row ends at the border, and may
             share more
    targets  as `fastcam.attribute`'s, but told: an int, a list, a tensor (B,) or (B, T), or a callable

    The other arguments are those of `fastcam.attribute`. `maps` and `raw` are (B, *images) or (B, T, *images), unscaled
    in `raw`; `scores` (tiles, B, ...) the model's output for each tile, in reading order; an image is `valid` where all
    its tiles are, and else has a map of zeros. Channel weights and residuals are each tile's own, and are left out.

    Raises ValueError for a tile or overlap that does not fit or targets that are not told, TypeError for a model that
    gives more than one tensor.
    Cost: an attribution of each tile, one batch of tiles at a time.
    """
    check_images(images)
    if targets is None or isinstance(targets, str):
        raise ValueError(f"each tile would choose its own class for targets={targets!r}; say which class to explain")
    spatial = tuple(images.shape[2:])
    tile = tuple(tile)
    if len(tile) != len(spatial) or not all(1 <= t <= s for t, s in zip(tile, spatial, strict=True)):
        raise ValueError(f"tile must hold {len(spatial)} sizes from 1 up to the images' {spatial}; got {tile}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be in [0, 1); got {overlap!r}")
    explainer = Explainer(model, method, normalize=False, size="input", **settings)
    total: Tensor | None = None
    count = images.new_zeros(spatial)
    found: list[Attribution] = []
    for place in itertools.product(*(_starts(s, t, overlap) for s, t in zip(spatial, tile, strict=True))):
        where = (..., *(slice(start, start + t) for start, t in zip(place, tile, strict=True)))
        one = explainer(images[where], targets)
        if total is None:
            total = one.maps.new_zeros((*one.maps.shape[: -len(spatial)], *spatial))
        total[where] += one.maps
        count[where] += 1
        found.append(one)
    assert total is not None
    valid = torch.stack([one.valid for one in found]).all(0)
    raw = total / count.to(total.dtype)
    raw = torch.where(valid.reshape(-1, *(1,) * (raw.ndim - 1)), raw, 0)
    if not isinstance(found[0].scores, Tensor):
        raise TypeError(f"tiles need a model that gives one tensor; this one gives {type(found[0].scores).__name__}")
    signed = explainer.method.signed
    features = images.new_empty((len(images), 1, *spatial))  # for its number of dimensions
    maps, _, _ = finish(features, Evidence(projection=raw), False, normalize, None, signed)
    return dataclasses.replace(
        found[0],
        maps=maps,
        raw=raw,
        scores=torch.stack([one.scores for one in found]),
        weights=None,
        delta=None,
        valid=valid,
        extra={},
    )


def _starts(size: int, tile: int, overlap: float) -> list[int]:
    step = max(1, round(tile * (1 - overlap)))
    return [*range(0, size - tile, step), size - tile]
