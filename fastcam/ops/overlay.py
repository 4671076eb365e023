"""`overlay`: images as pixels under the colours of their maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam._dtypes import accumulation_dtype
from fastcam.backends import plain_call
from fastcam.ops import _checks
from fastcam.ops._plain import register_plain, run

__all__ = ["overlay"]

MOST_COLOURS = 65536


def overlay(
    images: Tensor,
    maps: Tensor,
    table: Tensor,
    alpha: float = 0.8,
    signed: bool = False,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Pixels of images, coloured where their maps say so: no evidence, no colour.

    Formula, for a pixel x of a channel and the map's value m there, with l = -1 for signed maps and 0 for others:
        p = round(255 clamp(x std + mean, 0, 1))              std = 1 and mean = 0 where left out
        v = clamp(m, l, 1), colour = table[round((v - l) / (1 - l) (L - 1))], o = alpha sqrt|v|
        result = clamp(round(p + o (colour - p)), 0, 255)     halves are rounded to even
    NaN in an image is black; NaN in a map shows the image alone.
    Shapes: images (B,3,H,W) or (B,1,H,W); maps (B,H,W), or (B,T,H,W) for T maps of each image; table (L,3), L in
    1..65536, colours in [0,255]; mean and std one number or three. Returns (B,H,W,3) or (B,T,H,W,3). B and T may be 0.
    Dtype and layout: images float64, float32, float16 or bfloat16, maps in the images' dtype or their accumulation
    dtype (float64 for float64, else float32), which is the table's dtype and that of the arithmetic; any strides. The
    result is contiguous uint8.
    Not differentiable. Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes or devices, an
    alpha outside [0,1], one of mean and std alone or not finite, RuntimeError for inputs that require grad.
    Cost: images read once a map (from cache after the first), maps once, the result written once. No host
    synchronisation.
    Source: what CAM packages draw (a colour map blended with the image), with an opacity that follows the evidence.
    """
    found = plain_call("overlay", images, maps, table, alpha, signed, mean, std)
    if found is not NotImplemented:
        return found
    _check(images, maps, table, alpha, signed, mean=mean, std=std)
    return run("overlay", images, maps, table, alpha, signed, mean=mean, std=std)


def _check(
    images: Tensor,
    maps: Tensor,
    table: Tensor,
    alpha: float = 0.8,
    signed: bool = False,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    op = "overlay"
    _checks.check_features(op, images, "images", "(B,3,H,W) or (B,1,H,W)")
    b, channels, h, w = images.shape
    if channels not in (1, 3):
        raise ValueError(f"{op}: images must be (B,3,H,W) or (B,1,H,W), got {tuple(images.shape)}")
    _checks.check_companion(op, "maps", maps, images, or_accumulation=True, of="images")
    if maps.dim() not in (3, 4) or maps.shape[0] != b or maps.shape[-2:] != (h, w):
        raise ValueError(f"{op}: maps must be {(b, h, w)} or ({b}, T, {h}, {w}), got {tuple(maps.shape)}")
    _checks.check_tensor(op, "table", table)
    if table.device != images.device:
        raise ValueError(f"{op}: table is on {table.device}, images on {images.device}; both must be on one device")
    if table.dtype != accumulation_dtype(images.dtype):
        raise TypeError(f"{op}: table must be {accumulation_dtype(images.dtype)}, got {table.dtype}")
    if table.dim() != 2 or table.shape[1] != 3 or not 1 <= table.shape[0] <= MOST_COLOURS:
        raise ValueError(f"{op}: table must be (L,3) with L in 1..{MOST_COLOURS}, got {tuple(table.shape)}")
    _checks.check_finite(op, "alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha must lie in [0,1], got {alpha}")
    if not isinstance(signed, bool):
        raise TypeError(f"{op}: signed must be a bool, got {signed!r}")
    if (mean is None) != (std is None):
        raise ValueError(f"{op}: give both mean and std or neither, got mean={mean}, std={std}")
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if isinstance(values, (str, float, int)) or len(values) not in (1, 3):
            raise ValueError(f"{op}: {name} must hold one number or three, got {values!r}")
        for value in values:
            _checks.check_finite(op, name, value)
    _checks.check_no_grad(op, images, maps, table)


def _fake(
    images: Tensor,
    maps: Tensor,
    table: Tensor,
    alpha: float = 0.8,
    signed: bool = False,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    return images.new_empty((*maps.shape, 3), dtype=torch.uint8)


register_plain("overlay", references.overlay, _fake, _check)
