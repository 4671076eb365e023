"""Whether a map lies on the object: maps against masks of ground truth, without a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .stability import map_iou

__all__ = ["average_precision", "energy_pointing", "localisation_iou", "outside_inside_ratio", "pointing_game"]


def pointing_game(maps: Tensor, masks: Tensor, *, tolerance: float = 0) -> Tensor:
    """(...,) float64: 1 where the highest pixel of a map lies on its object or near it, else 0.

        hit = a pixel of the mask is at the peak, or strictly nearer than `tolerance` pixels

    maps       (..., H, W) real; of equal maxima the first in row order is the peak, so a constant map points at the top
               left corner
    masks      (..., H, W) bool, of the same shape
    tolerance  in pixels; 15 is the usual one for photographs, 0 asks for the object itself

    NaN where the mask is empty or the map holds NaN. Higher is better.
    Raises TypeError or ValueError for arguments that do not fit. No forward pass, no host synchronisation.
    Source: Zhang et al. 2018; tolerance as in TorchRay.
    """
    _check(maps, masks)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a finite number of pixels, at least 0; got {tolerance!r}")
    height, width = maps.shape[-2:]
    peak = maps.flatten(-2).argmax(-1)[..., None, None]
    rows = torch.arange(height, device=maps.device)[:, None] - peak // width
    columns = torch.arange(width, device=maps.device) - peak % width
    square = rows**2 + columns**2
    near = (square < tolerance**2) | (square == 0)
    return _known((near & masks).flatten(-2).any(-1).double(), maps, masks)


def energy_pointing(maps: Tensor, masks: Tensor) -> Tensor:
    """(...,) float64 in [0, 1]: share of a map's positive values that lies on its object.

        sum of max(R, 0) on the mask / sum of max(R, 0)

    maps, masks  as of `pointing_game`
    NaN where nothing is positive, the mask is empty or the map holds NaN. Higher is better; a map without any idea gets
    the mask's share of the image.
    Source: Wang et al. 2020 (Score-CAM), energy-based pointing game.
    """
    _check(maps, masks)
    positive = maps.double().clamp(min=0)
    return _known((positive * masks).sum((-2, -1)) / positive.sum((-2, -1)), maps, masks)


def outside_inside_ratio(maps: Tensor, masks: Tensor) -> Tensor:
    """(...,) float64, at least 0: how strong a map is off its object, relative to on it.

        mean of max(R, 0) off the mask / mean of max(R, 0) on it

    maps, masks  as of `pointing_game`
    Infinite where nothing on the object is positive but something off it is, so report the median; NaN where nothing is
    positive, the mask is empty or the whole image, or the map holds NaN. Lower is better; a map without any idea has 1.
    Source: Lapuschkin et al. 2016; with means rather than sums, as in Attribution Equilibrium's evaluation.
    """
    _check(maps, masks)
    positive = maps.double().clamp(min=0)
    inside = (positive * masks).sum((-2, -1)) / masks.sum((-2, -1))
    outside = (positive * ~masks).sum((-2, -1)) / (~masks).sum((-2, -1))
    return _known(outside / inside, maps, masks)


def localisation_iou(maps: Tensor, masks: Tensor, *, threshold: float = 0.5) -> Tensor:
    """(...,) float64 in [0, 1]: intersection over union of where a map exceeds `threshold` and its object.

    maps       (..., H, W) in [0, 1], or whatever `threshold` is measured in
    masks      as of `pointing_game`

    NaN where the mask is empty or the map holds NaN. Higher is better. The threshold decides much: compare methods at
    several, or by `average_precision`, which needs none.
    """
    _check(maps, masks)
    _check_threshold(threshold)
    size = maps.shape[-2:]
    over = (maps > threshold).double()
    found = map_iou(over.reshape(-1, *size), masks.double().reshape(-1, *size), threshold=0.5)
    return _known(found.reshape(maps.shape[:-2]), maps, masks)


def average_precision(maps: Tensor, masks: Tensor, *, threshold: float | None = None) -> Tensor:
    """(...,) float64 in [0, 1]: average precision of a map as a detector of its object's pixels; the mAP is its mean.

        sum over distinct values v, from the highest, of (recall at v - recall before) x precision at v

    maps, masks  as of `pointing_game`
    threshold    None: over all thresholds, as above · a number: the protocol with two channels, pixels above it and
                 pixels not above it, whose 2 H W zeros and ones are compared with mask and background together. That
                 is a^2 + (1 - a) / 2 of the pixel accuracy a

    NaN where the mask is empty or the map holds NaN. Higher is better; a map without any idea gets the mask's share of
    the image, or 1/2 with a threshold.
    Source: definition of scikit-learn's average_precision_score; two channels as in AGF's evaluation (threshold 0).
    """
    _check(maps, masks)
    if threshold is not None:
        _check_threshold(threshold)
        right = ((maps > threshold) == masks).double().mean((-2, -1))
        return _known(right**2 + (1 - right) / 2, maps, masks)
    values, order = maps.flatten(-2).sort(dim=-1, descending=True)
    found = masks.flatten(-2).gather(-1, order).double().cumsum(-1)
    last = torch.ones_like(values, dtype=torch.bool)  # of the pixels of one value: the threshold takes all or none
    last[..., :-1] = values[..., 1:] != values[..., :-1]
    recalled = torch.where(last, found, 0).cummax(-1).values
    before = torch.cat([torch.zeros_like(recalled[..., :1]), recalled[..., :-1]], -1)
    precision = found / torch.arange(1, values.shape[-1] + 1, device=maps.device)
    gained = torch.where(last, found - before, 0)
    return _known((gained * precision).sum(-1) / found[..., -1], maps, masks)


def _check(maps: Tensor, masks: Tensor) -> None:
    for name, value in (("maps", maps), ("masks", masks)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if maps.shape != masks.shape or maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(
            f"maps and masks must share one shape (..., H, W); got {tuple(maps.shape)} and {tuple(masks.shape)}"
        )
    if not maps.is_floating_point():
        raise TypeError(f"maps must be floating point; got {maps.dtype}")
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be bool; got {masks.dtype}: compare them, as in masks > 0")
    if maps.device != masks.device:
        raise ValueError(f"maps are on {maps.device} and masks on {masks.device}; move one to the other")


def _check_threshold(threshold: float) -> None:
    if not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number; got {threshold!r}")


def _known(values: Tensor, maps: Tensor, masks: Tensor) -> Tensor:
    known = masks.flatten(-2).any(-1) & ~maps.flatten(-2).isnan().any(-1)
    return torch.where(known, values, math.nan)
