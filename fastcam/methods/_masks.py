"""Images seen through their own feature maps, for any number of spatial dimensions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastcam import ops
from fastcam._dtypes import accumulation_dtype

from ._perturb import Distinct

__all__ = ["MaskedImages"]


class MaskedImages:
    """Images times their feature maps, a chunk at a time; scaling, order and errors are `ops.mask_by_features`'s.

    images    (B, C, *spatial)
    features  (B, K, *its spatial), as many spatial dimensions
    order     "resize_then_minmax" or "minmax_then_resize"
    dtype     of the arithmetic, and of noise
    align_corners  of the resize, for "resize_then_minmax"

    One and two dimensions take the fused op; three, which it does not know, PyTorch's resize.
    """

    def __init__(self, images: Tensor, features: Tensor, order: str, align_corners: bool = False):
        wide = torch.promote_types(images.dtype, features.dtype)
        self._order = order
        self._align_corners = align_corners
        self._rank = images.ndim - 2
        if self._rank == 1:
            images, features = images.unsqueeze(-2), features.unsqueeze(-2)
        self._size = images.shape[2:]
        self._images, self._features = images.to(wide), features.to(wide)
        self.dtype = accumulation_dtype(wide)

    def chunk(
        self, start: int, count: int, only: Distinct | None, noise: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """(count, C, *spatial) masked images of pairs b K + k from `start` on, all of them or those in `only`.

        noise  (*spatial), added to every mask
        """
        images, features = self._images, self._features
        if only is not None:
            pairs = only.pairs[start : start + count]
            images = images[pairs // features.shape[1]]
            features, start = features.flatten(0, 1)[pairs].unsqueeze(1), 0
        if self._rank == 3:
            return self._volumes(images, features, start, count, noise, scale)
        if self._align_corners:  # resized here, so that the op has nothing left to resize
            pairs = torch.arange(start, start + count, device=images.device)
            images, maps = images[pairs // features.shape[1]], features.flatten(0, 1)[pairs].unsqueeze(1)
            flat = (maps.amax((-2, -1), keepdim=True) == maps.amin((-2, -1), keepdim=True)).expand(-1, 1, *self._size)
            features, start = torch.where(flat, 0, self._resized(maps.to(self.dtype)).to(maps.dtype)), 0
        if noise is not None:
            noise = noise.reshape(1, *images.shape[2:]).expand(count, -1, -1)
        found = ops.mask_by_features(images, features, start, count, noise=noise, scale=scale, order=self._order)
        return found.squeeze(-2) if self._rank == 1 else found

    def _volumes(
        self, images: Tensor, features: Tensor, start: int, count: int, noise: Tensor | None, scale: float
    ) -> Tensor:
        pairs = torch.arange(start, start + count, device=images.device)
        maps = features.flatten(0, 1)[pairs].unsqueeze(1).to(self.dtype)
        flat = maps.flatten(1).amax(1) == maps.flatten(1).amin(1)
        if self._order == "resize_then_minmax":
            mask = _min_max(self._resized(maps), flat)
        else:
            mask = self._resized(_min_max(maps, flat))
        if noise is not None:
            mask = mask + noise
        return (images[pairs // features.shape[1]] * (scale * mask)).to(images.dtype)

    def _resized(self, maps: Tensor) -> Tensor:
        mode = "trilinear" if self._rank == 3 else "bilinear"
        return functional.interpolate(maps, size=self._size, mode=mode, align_corners=self._align_corners)


def _min_max(maps: Tensor, flat: Tensor) -> Tensor:
    """(u - min) / (max - min) for each row; zeros where it is constant, or was before it was resized."""
    low, high = (extreme.reshape(-1, 1, 1, 1, 1) for extreme in torch.aminmax(maps.flatten(1), dim=1))
    flat = flat.reshape(low.shape) | (low == high)
    return torch.where(flat, 0, (maps - low) / torch.where(flat, 1, high - low))
