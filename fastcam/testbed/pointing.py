"""The pointing game: does the highest pixel of a map lie on the object that the map is about?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pointing_accuracy", "pointing_hits"]


def pointing_hits(maps: Tensor, masks: Tensor) -> Tensor:
    """hit = mask[argmax over (H,W) of the map]; maps (...,H,W) real, masks (...,H,W) bool, result (...) bool.

    Of equal maxima the first in row order counts, so a constant map points at the top left corner.
    Errors: ValueError where the shapes differ or a map has no pixels, TypeError for masks that are not bool.
    """
    if maps.shape != masks.shape or maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(
            f"maps and masks must share one shape (...,H,W), got {tuple(maps.shape)}, {tuple(masks.shape)}"
        )
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be bool, got {masks.dtype}")
    top = maps.flatten(-2).argmax(-1, keepdim=True)
    return masks.flatten(-2).gather(-1, top).squeeze(-1)


def pointing_accuracy(maps: Tensor, masks: Tensor) -> float:
    """Fraction of maps that point into their mask; in [0,1], NaN for no maps. Shapes and errors as `pointing_hits`."""
    return pointing_hits(maps, masks).double().mean().item()
