"""How far maps move when images hardly do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam._network import check_images
from fastcam.methods._perturb import check_count, check_seed
from fastcam.program.targets import TargetSpec

__all__ = ["Explain", "maps_of", "max_sensitivity"]

#: What explains: a `fastcam.Explainer`, or a callable (images, targets) -> maps (B, *spatial) or an `Attribution`.
Explain = Callable[[Tensor, Any], Any]


def max_sensitivity(
    explain: Explain,
    images: Tensor,
    targets: TargetSpec = None,
    *,
    radius: float = 0.2,
    samples: int = 10,
    relative_to: Literal["map", "image", "nothing"] = "map",
    seed: int = 0,
) -> Tensor:
    """(B,) float64, at least 0: the farthest that a map moves among noisy copies of its image.

        max over samples of |E(x + e) - E(x)| / |E(x)|,  e uniform in [-radius, radius],  Euclidean norms

    explain      a `fastcam.Explainer`, or a callable (images, targets) -> maps (B, ...)
    images       (B, C, *spatial) as the model expects them; `radius` is in their units
    targets      as of `fastcam.attribute`; classes found for the images are kept for their copies
    samples      noisy copies of each image, a batch of them at a time
    relative_to  "map": as above · "image": over |x| instead · "nothing": over 1
    seed         of the noise, which is the same for all images, so no image's value depends on its neighbours

    NaN where the map is zero. Lower is better; a map that never changes has 0, and explains nothing.
    Raises TypeError or ValueError for arguments that do not fit. Cost: samples + 1 explanations an image.
    Source: Yeh et al. 2019; relative to the map as in Captum's sensitivity_max.
    """
    check_images(images)
    check_count("samples", samples)
    check_seed(seed)
    if not radius > 0:
        raise ValueError(f"radius must be positive; got {radius!r}")
    if relative_to not in ("map", "image", "nothing"):
        raise ValueError(f"relative_to must be 'map', 'image' or 'nothing'; got {relative_to!r}")
    generator = torch.Generator().manual_seed(seed)
    first = explain(images, targets)
    own, kept = maps_of(first, len(images)), getattr(first, "targets", targets)
    farthest = own.new_zeros(len(images), dtype=torch.float64)
    for _ in range(samples):
        noise = torch.rand(images.shape[1:], generator=generator, dtype=torch.float64) * (2 * radius) - radius
        moved = maps_of(explain(images + noise.to(images), kept), len(images))
        farthest = torch.maximum(farthest, _norm(moved - own))
    if relative_to == "nothing":
        return farthest
    return farthest / _norm(own if relative_to == "map" else images)


def maps_of(explained: Any, batch: int) -> Tensor:
    """Maps (B, ...) float64 of what an `Explain` returned."""
    maps = getattr(explained, "maps", explained)
    if not isinstance(maps, Tensor) or maps.ndim < 2 or len(maps) != batch:
        what = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise TypeError(f"explain must return maps ({batch}, ...), or something that holds them as .maps; got {what}")
    return maps.detach().double()


def _norm(values: Tensor) -> Tensor:
    return values.double().flatten(1).norm(dim=1)
