"""Whether models trained alike look at the same places: overlap of their thresholded maps."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

__all__ = ["map_iou", "map_stability"]

Mode = Literal["correct", "released"]


def map_iou(a: Tensor, b: Tensor, *, threshold: float = 100 / 255, mode: Mode = "correct") -> Tensor:
    """Intersection over union of where two maps exceed `threshold`, image by image.

        iou = |{a > t} & {b > t}| / |{a > t} | {b > t}|;   NaN where neither map exceeds it anywhere

    a, b  (N, H, W) in [0, 1];  returns (N,) float64
    mode  "correct" · "released": as LFI-CAM's public script has it, for comparison with published figures only: maps
          times 256 in eight bits, where a map's maximum wraps to 0; then (|and| + 1e-6) / (|or| + 1e-6) of each image
          row, averaged over rows, of which those empty in both maps count 1

    Raises ValueError for maps of different shapes, or an unknown mode.
    Source: stability protocol of Lee et al., LFI-CAM, ICCV 2021, and its released code.
    """
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"maps must share one shape (N, H, W); got {tuple(a.shape)} and {tuple(b.shape)}")
    if mode not in ("correct", "released"):
        raise ValueError(f"mode must be 'correct' or 'released'; got {mode!r}")
    if mode == "released":
        a, b = ((each.double() * 256).floor().remainder(256) / 255 for each in (a, b))
    over_a, over_b = a > threshold, b > threshold
    both, either = (over_a & over_b).double(), (over_a | over_b).double()
    if mode == "released":
        return ((both.sum(2) + 1e-6) / (either.sum(2) + 1e-6)).mean(1)
    return both.sum((1, 2)) / either.sum((1, 2))


def map_stability(maps: Tensor, *, threshold: float = 100 / 255, mode: Mode = "correct") -> tuple[float, float, int]:
    """Mean `map_iou` over images and pairs of models.

    maps  (M, N, H, W): maps of M models for the same N images, in [0, 1]

    Returns the mean over pairs of each pair's mean over images; its standard deviation over pairs; and how many
    (pair, image) had no place over the threshold in either map and were left out.
    Raises ValueError for fewer than two models, or for NaN.
    """
    if maps.ndim != 4 or len(maps) < 2:
        raise ValueError(f"maps must be (M, N, H, W) of at least two models; got {tuple(maps.shape)}")
    if bool(maps.isnan().any()):
        raise ValueError("maps must be numbers; some are NaN")
    found = torch.stack([map_iou(a, b, threshold=threshold, mode=mode) for a, b in combinations(maps, 2)])
    means = found.nanmean(1)
    means = means[means.isfinite()]  # a pair of models without a single image to compare says nothing
    spread = float(means.std(correction=0)) if len(means) else math.nan
    return float(means.mean()), spread, int(found.isnan().sum())
