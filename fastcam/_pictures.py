"""Opened pictures of any kind as upright RGB of 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["UnknownWhite", "upright_rgb"]


class UnknownWhite(ValueError):
    """Pixels have values of which it is not known what is white."""


def upright_rgb(picture: Image) -> Image:
    """A new picture, turned as EXIF says: palettes and CMYK converted, what is transparent laid on white, grey of 16
    bits scaled to 8 (v / 257, rounded), floating point from [0, 1].

    Raises UnknownWhite for integers beyond 16 bits and floating point beyond [0, 1], and what Pillow's decoders raise.
    """
    from PIL import Image

    picture = _upright(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(_eight_bits(picture))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    # A copy in any case: the opened file's own object is closed.
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()


def _upright(picture: Image) -> Image:
    """As the camera was held; pixels whose EXIF block is damaged are taken as they lie."""
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except MemoryError:
        raise
    except Exception:
        return picture
    return picture


def _eight_bits(picture: Image) -> np.ndarray:
    """Grey values of 16-bit, 32-bit and floating-point pictures as uint8."""
    values = np.asarray(picture)
    low, high = values.min(), values.max()  # NaN fails both comparisons below
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):
            raise UnknownWhite(f"floating-point pixels from {low:.3g} to {high:.3g}; only [0, 1] has a known white")
        return (values * 255 + 0.5).astype(np.uint8)
    if not (low >= 0 and high <= 65535):
        raise UnknownWhite(f"integer pixels from {low} to {high}; only 8 and 16 bits have a known white")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
