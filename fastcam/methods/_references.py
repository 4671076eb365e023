"""References in pixel space: names, tensors and lists of them made into images as the model sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fastcam._tracing import tracing
from fastcam.program.forward import Reference

from ._method import Passage, Pixels

__all__ = ["NAMES", "ReferenceSpec", "check_reference", "reference_images", "references"]

ReferenceSpec: TypeAlias = str | Tensor | Sequence[str | Tensor]

NAMES = ("black", "white", "mean", "image_mean", "blur", "noise")
#: Names whose image is the same for all images of a size.
_SHARED = ("black", "white", "mean", "noise")


def check_reference(reference: Any) -> None:
    """Raise TypeError or ValueError unless `reference` is a name, a tensor, or a non-empty list of them."""
    several = isinstance(reference, (list, tuple))
    if several and not reference:
        raise ValueError("reference must name at least one reference; got an empty list")
    for one in reference if several else [reference]:
        if isinstance(one, str):
            if one not in NAMES:
                raise ValueError(
                    f"there is no reference {one!r}; references: {', '.join(NAMES)}, or a tensor of images"
                )
        elif not isinstance(one, Tensor):
            raise TypeError(f"reference must be a name, a tensor or a list of them; got {type(one).__name__}")


def references(passage: Passage, reference: ReferenceSpec, seed: int) -> list[Reference]:
    """The references' passes through the network; those that depend on no image are kept from call to call."""
    found = []
    for one in reference if isinstance(reference, (list, tuple)) else [reference]:
        images = reference_images(one, passage.images, passage.pixels, seed)
        shared = isinstance(one, str) and one in _SHARED
        shape = tuple(passage.images.shape[1:])
        found.append(passage.reference_image(images, key=(one, seed, shape) if shared else None))
    return found


def reference_images(reference: str | Tensor, images: Tensor, pixels: Pixels, seed: int) -> Tensor:
    """(1 or B, C, *spatial) reference images for `images`, normalised as they are.

    "black", "white"  pixels 0 and 1
    "mean"            the mean colour of the data set: 0 after normalisation
    "image_mean"      each image's mean colour
    "blur"            each image blurred by a Gaussian, sigma = 10 H / 224 pixels, 3 sigma wide, borders reflected
    "noise"           pixels uniform in [0, 1], drawn from `seed`, the same for all images
    tensor            (C, *spatial), (1, C, *spatial) or (B, C, *spatial), normalised as the images are

    Raises ValueError for a tensor of another shape, device or dtype, or that is not finite.
    """
    one = (1, *images.shape[1:])
    if isinstance(reference, Tensor):
        return _given(reference, images)
    if reference == "mean":
        return images.new_zeros(one)
    if reference == "image_mean":
        return images.mean(tuple(range(2, images.ndim)), keepdim=True).expand_as(images).contiguous()
    if reference == "blur":
        return _blurred(images)
    if reference == "noise":
        drawn = torch.rand(one, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return pixels.normalize(drawn.to(images), images)
    return pixels.normalize(images.new_full(one, float(reference == "white")), images)


def _given(reference: Tensor, images: Tensor) -> Tensor:
    if reference.shape == images.shape[1:]:
        reference = reference.unsqueeze(0)
    if reference.shape[1:] != images.shape[1:] or reference.shape[0] not in (1, images.shape[0]):
        shape = ", ".join(map(str, images.shape[1:]))
        raise ValueError(
            f"a reference must have the images' shape, ({shape}), (1, {shape}) or ({images.shape[0]}, {shape}); "
            f"got {tuple(reference.shape)}"
        )
    if reference.dtype != images.dtype or reference.device != images.device:
        raise ValueError(
            f"a reference must be {images.dtype} on {images.device} like the images; "
            f"got {reference.dtype} on {reference.device}"
        )
    if not tracing() and not bool(reference.isfinite().all()):
        raise ValueError("the reference is not finite: it holds NaN or infinity")
    return reference.detach()


def _blurred(images: Tensor) -> Tensor:
    """One dimension after the other, each with sigma from the height."""
    sigma = 10 * images.shape[2] / 224
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(images)
    found = images
    for dim in range(2, images.ndim):
        size = images.shape[dim]
        # Reflection that may go several times over a small image.
        at = (torch.arange(-radius, size + radius, device=images.device)).remainder(max(2 * size - 2, 1))
        at = torch.where(at < size, at, 2 * size - 2 - at)
        lines = found.index_select(dim, at).movedim(dim, -1)
        smooth = functional.conv1d(lines.reshape(-1, 1, lines.shape[-1]), kernel.reshape(1, 1, -1))
        found = smooth.reshape(*lines.shape[:-1], size).movedim(-1, dim)
    return found.contiguous()
