"""Triton kernels of `mask_by_features`: images times their resized, min-max scaled feature maps.

    result[i] = images[b] * scale * (mask(features[b,k]) + noise[i])    for the pairs (b,k), numbered b K + k

Two launches. `_measure`, a program a pair, finds finiteness and extremes of a map: of the resized one from four values
a cell, so that nothing of the image's size is read. `_multiply` resizes and scales the mask of some pixels and
multiplies all channels by it. A row depends on its pair only, so chunks are bit-equal to slices of the whole.

Cost: images read once a pair, feature maps a few times (from cache), the result written once. Scratch is three numbers
a pair. No atomics, no host synchronisation.
"""

import torch
import triton
import triton.language as tl

from . import _launch, _resize

__all__ = ["launch"]

CELLS = 1024  # cells of a map that `_measure` takes at once
CHANNELS, PIXELS = 4, 512  # most of a `_multiply` tile: 16 elements a thread, and 4 pixels with 4 corners each


@triton.jit
def _measure(
    features, ranges,
    first_pair, channels, height, width, out_height, out_width,
    feature_image, feature_channel, feature_row, feature_column,
    MINMAX_FIRST: tl.constexpr, ACC: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    # Pairs and positions divide as int32; addresses are int64 from the first multiplication.
    row = tl.program_id(0)
    pair = first_pair + row
    features += (pair // channels).to(tl.int64) * feature_image + (pair % channels).to(tl.int64) * feature_channel
    infinity = float("inf")
    finite = tl.full((CELLS,), 1, tl.int32)
    raw_least = tl.full((CELLS,), infinity, ACC)
    raw_greatest = tl.full((CELLS,), -infinity, ACC)
    least = tl.full((CELLS,), infinity, ACC)
    greatest = tl.full((CELLS,), -infinity, ACC)
    positions = height * width
    for start in range(0, positions, CELLS):
        cell = start + tl.arange(0, CELLS)
        inside = cell < positions
        i = cell // width
        j = cell % width
        top = features + i.to(tl.int64) * feature_row
        left = j.to(tl.int64) * feature_column
        value = tl.load(top + left, mask=inside, other=0.0).to(ACC)
        finite &= (value - value == 0).to(tl.int32)  # inf - inf and NaN - NaN are NaN
        raw_least = tl.minimum(raw_least, tl.where(inside, value, infinity))
        raw_greatest = tl.maximum(raw_greatest, tl.where(inside, value, -infinity))
        if not MINMAX_FIRST:
            low = features + tl.minimum(i + 1, height - 1).to(tl.int64) * feature_row
            right = tl.minimum(j + 1, width - 1).to(tl.int64) * feature_column
            top_right = tl.load(top + right, mask=inside, other=0.0).to(ACC)
            low_left = tl.load(low + left, mask=inside, other=0.0).to(ACC)
            low_right = tl.load(low + right, mask=inside, other=0.0).to(ACC)
            cell_least, cell_greatest = _resize.cell_extremes(
                value, top_right, low_left, low_right, i, j, inside, height, width, out_height, out_width, ACC
            )
            least = tl.minimum(least, cell_least)
            greatest = tl.maximum(greatest, cell_greatest)
    low_value = tl.min(raw_least, axis=0)
    high_value = tl.max(raw_greatest, axis=0)
    # A constant map stays constant under exact resizing; rounding would make noise of it, min-max a picture.
    flat = low_value == high_value
    if not MINMAX_FIRST:
        low_value = tl.min(least, axis=0)
        high_value = tl.max(greatest, axis=0)
    ranges += row.to(tl.int64) * 3
    tl.store(ranges, low_value)
    tl.store(ranges + 1, tl.where(flat, 0.0, high_value - low_value))
    tl.store(ranges + 2, tl.min(finite, axis=0).to(ACC))


@triton.jit
def _multiply(
    images, features, noise, ranges, scale, out,
    first_pair, feature_channels, channels, height, width, out_height, out_width, tiles,
    feature_image, feature_channel, feature_row, feature_column, image_stride, channel_stride, position_stride,
    NOISE: tl.constexpr, MINMAX_FIRST: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program // tiles
    pair = first_pair + row
    row = row.to(tl.int64)
    image = (pair // feature_channels).to(tl.int64)
    first_pixel = (program % tiles) * PIXELS
    pixel = first_pixel + tl.arange(0, PIXELS)
    positions = out_height * out_width
    inside = pixel < positions

    y = _resize.source(pixel // out_width, _resize.axis_scale(height, out_height, ACC), ACC)
    x = _resize.source(pixel % out_width, _resize.axis_scale(width, out_width, ACC), ACC)
    i = tl.minimum(y.to(tl.int32), height - 1)
    j = tl.minimum(x.to(tl.int32), width - 1)
    features += image * feature_image + (pair % feature_channels).to(tl.int64) * feature_channel
    top = features + i.to(tl.int64) * feature_row
    low = features + tl.minimum(i + 1, height - 1).to(tl.int64) * feature_row
    left = j.to(tl.int64) * feature_column
    right = tl.minimum(j + 1, width - 1).to(tl.int64) * feature_column
    top_left = tl.load(top + left, mask=inside, other=0.0).to(ACC)
    top_right = tl.load(top + right, mask=inside, other=0.0).to(ACC)
    low_left = tl.load(low + left, mask=inside, other=0.0).to(ACC)
    low_right = tl.load(low + right, mask=inside, other=0.0).to(ACC)
    least = tl.load(ranges + row * 3)
    extent = tl.load(ranges + row * 3 + 1)
    finite = tl.load(ranges + row * 3 + 2)
    if MINMAX_FIRST:
        top_left = _resize.scaled(top_left, least, extent, finite, ACC)
        top_right = _resize.scaled(top_right, least, extent, finite, ACC)
        low_left = _resize.scaled(low_left, least, extent, finite, ACC)
        low_right = _resize.scaled(low_right, least, extent, finite, ACC)
    mask = _resize.lerp2(top_left, top_right, low_left, low_right, y - i, x - j)
    if not MINMAX_FIRST:
        mask = _resize.scaled(mask, least, extent, finite, ACC)
    if NOISE:
        mask += tl.load(noise + row * positions + pixel, mask=inside, other=0.0).to(ACC)
    mask *= tl.load(scale)

    channel = tl.arange(0, CHANNELS)
    offset = channel.to(OFFSET)[:, None] * channel_stride
    offset += tl.arange(0, PIXELS).to(OFFSET)[None, :] * position_stride
    images += image * image_stride + first_pixel.to(tl.int64) * position_stride + offset
    out += row * image_stride + first_pixel.to(tl.int64) * position_stride + offset
    for _ in range(tl.cdiv(channels, CHANNELS)):
        wanted = (channel < channels)[:, None] & inside[None, :]
        tl.store(out, tl.load(images, mask=wanted, other=0.0).to(ACC) * mask[None, :], mask=wanted)
        images += CHANNELS * channel_stride
        out += CHANNELS * channel_stride
        channel += CHANNELS


def launch(
    images: torch.Tensor,
    features: torch.Tensor,
    start: int = 0,
    count: int | None = None,
    *,
    noise: torch.Tensor | None = None,
    scale: float = 1.0,
    order: str = "resize_then_minmax",
) -> torch.Tensor:
    """Masked images; arguments and result as the op's schema `fastcam::mask_by_features`.

    Shapes: images (B,C,H,W); features (B,K,h,w); noise (count,H,W); result (count,C,H,W).
    Layout, dtype: features with any strides; images in NCHW and channels_last are read as they lie. The result has the
    images' dtype and is channels_last where they are, else contiguous.
    Errors: RuntimeError for tensors this process cannot run on; ValueError for an image or map of 2^31 positions or
    more and for 2^31 pairs. The public function has checked everything else.
    """
    feature_channels, height, width = features.shape[1:]
    channels, out_height, out_width = images.shape[1:]
    positions = out_height * out_width
    count = features.shape[0] * feature_channels - start if count is None else count
    if max(positions, height * width) >= 2**31:
        raise ValueError(
            f"an image and a map must have fewer than 2^31 positions, got {out_height}x{out_width} and {height}x{width}"
        )
    if feature_channels + count >= 2**31:
        raise ValueError(f"a chunk and an image must have fewer than 2^31 pairs, got {count} and {feature_channels}")

    with _launch.on_device(images, features, noise):
        channels_last = _launch.is_channels_last(images)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (count, channels, out_height, out_width)
        out = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=memory_format)
        if count == 0:
            return out
        first_image, first_pair = divmod(start, feature_channels)
        touched = (first_pair + count - 1) // feature_channels + 1
        features = features.narrow(0, first_image, touched)
        images, strides = _launch.dense_images(images.narrow(0, first_image, touched), channels_last)
        acc = _launch.accumulation(images.dtype)
        ranges = images.new_empty((count, 3), dtype=acc)
        # In memory: a number among a kernel's arguments would lose the digits of float64.
        factor = images.new_full((1,), scale, dtype=acc)
        dtype = _launch.triton_type(acc)
        minmax_first = order == "minmax_then_resize"
        channel_block = min(CHANNELS, _launch.next_power_of_2(channels))
        pixel_block = min(PIXELS, _launch.next_power_of_2(positions))
        tiles = triton.cdiv(positions, pixel_block)

        _measure[(count,)](
            features, ranges, first_pair, feature_channels, height, width, out_height, out_width, *features.stride(),
            MINMAX_FIRST=minmax_first, ACC=dtype, CELLS=min(CELLS, _launch.next_power_of_2(height * width)),
        )  # fmt: skip
        _multiply[(count * tiles,)](
            images, features, images if noise is None else noise.contiguous(), ranges, factor, out,
            first_pair, feature_channels, channels, height, width, out_height, out_width, tiles,
            *features.stride(), *strides,
            NOISE=noise is not None, MINMAX_FIRST=minmax_first, ACC=dtype,
            OFFSET=_launch.tile_offset(channels, positions, channel_block, pixel_block),
            CHANNELS=channel_block, PIXELS=pixel_block,
        )  # fmt: skip
    return out
