"""Triton kernel of `overlay`: images as pixels under the colours of their maps.

    p = round(255 clamp(x std + mean, 0, 1)), v = clamp(m, l, 1), o = alpha sqrt|v|
    result = round(p + o (table[round((v - l) / (1 - l) (L - 1))] - p))

One launch, one program some pixels of a map. NaN counts as 0 in maps and images.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import _launch

__all__ = ["launch"]

BLOCK, WARPS = 512, 4  # 4 pixels a thread, of three channels


@triton.jit
def _rounded(x, ACC: tl.constexpr):
    """To the nearest integer, halves to even: beyond this number, floats are integers."""
    if tl.float64 == ACC:
        return (x + 6755399441055744.0) - 6755399441055744.0
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _within(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _overlay(
    images, maps, table, out,
    targets, pixels, tiles, last, image_stride, channel_stride, pixel_stride,
    # declared: a float32, which Python floats become otherwise, would round them for float64
    alpha: tl.float64, scale_0: tl.float64, scale_1: tl.float64, scale_2: tl.float64,
    shift_0: tl.float64, shift_1: tl.float64, shift_2: tl.float64,
    SIGNED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    number = program // tiles
    image = (number // targets).to(tl.int64)
    number = number.to(tl.int64)
    pixel = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    lowest = -1.0 if SIGNED else 0.0
    m = tl.load(maps + number * pixels + pixel, mask=inside, other=0.0).to(ACC)
    value = _within(tl.where(m == m, m, 0.0), tl.full((), lowest, ACC), tl.full((), 1.0, ACC))
    entry = _rounded((value - lowest) / (1.0 - lowest) * last, ACC).to(tl.int32)
    opacity = tl.full((), alpha, ACC) * tl.sqrt(tl.abs(value))
    images += image * image_stride
    at = pixel.to(tl.int64) * pixel_stride
    out += 3 * (number * pixels + pixel)
    zero, one, most = tl.full((), 0.0, ACC), tl.full((), 1.0, ACC), tl.full((), 255.0, ACC)
    for channel in tl.static_range(3):
        scale = scale_0 if channel == 0 else scale_1 if channel == 1 else scale_2
        shift = shift_0 if channel == 0 else shift_1 if channel == 1 else shift_2
        x = tl.load(images + at, mask=inside, other=0.0).to(ACC)
        x = x * tl.full((), scale, ACC) + tl.full((), shift, ACC)
        base = _rounded(_within(tl.where(x == x, x, 0.0), zero, one) * 255.0, ACC)
        colour = tl.load(table + 3 * entry + channel, mask=inside, other=0.0)
        blended = _within(_rounded(base + opacity * (colour - base), ACC), zero, most)
        tl.store(out + channel, blended.to(tl.int32).to(tl.uint8), mask=inside)
        images += channel_stride


def launch(
    images: torch.Tensor,
    maps: torch.Tensor,
    table: torch.Tensor,
    alpha: float = 0.8,
    signed: bool = False,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """Pixels; arguments and result as the op's schema `fastcam::overlay`.

    Shapes: images (B,3,H,W) or (B,1,H,W); maps (B,H,W) or (B,T,H,W); table (L,3). Returns (B[,T],H,W,3) uint8.
    Layout: images in NCHW and channels_last are read as they lie, others are copied; the result is contiguous.
    Errors: RuntimeError for tensors this process cannot run on; ValueError for more than 2^31 blocks and for images of
    2^31 pixels or more. The public function has checked everything else.
    """
    b, channels, height, width = images.shape
    pixels, targets = height * width, maps.shape[1] if maps.dim() == 4 else 1
    tiles = triton.cdiv(pixels, BLOCK)
    if pixels >= 2**31 or b * targets * tiles >= 2**31:
        raise ValueError(f"too many pixels for one call: images {tuple(images.shape)} under maps {tuple(maps.shape)}")
    with _launch.on_device(images, maps, table):
        out = torch.empty((*maps.shape, 3), dtype=torch.uint8, device=images.device)
        if out.numel() == 0:
            return out
        values, (image, channel, pixel) = _launch.dense_images(images)
        scale, shift = (tuple(each or (plain,)) for each, plain in ((std, 1.0), (mean, 0.0)))
        _overlay[(b * targets * tiles,)](
            values, maps.contiguous(), table.contiguous(), out,
            targets, pixels, tiles, table.shape[0] - 1, image, channel if channels == 3 else 0, pixel,
            float(alpha), *map(float, (scale * 3)[:3]), *map(float, (shift * 3)[:3]),
            SIGNED=signed, ACC=_launch.triton_type(table.dtype), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out
