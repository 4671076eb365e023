"""Triton kernel of `lfi_mask_backward`: the gradient of the masks in the features.

    d = grad grey / (max F - min F), 0 where F is 0;  N = (F - min F) / (max F - min F)
    out = d + [F lowest] (sum d N - sum d) / count - [F highest] sum d N / count;  0 in a constant channel

One launch: a program finds the extremes and the sums of its channels and reads them again, from the cache, to write.
"""

import torch
import triton
import triton.language as tl

from . import _launch, _lfi

__all__ = ["launch"]


@triton.jit
def _passed(grad, features, grey, at, position, mask, positions, ACC: tl.constexpr):
    """Features, and the gradient of their scaled values before it is divided by the extent."""
    f = _lfi.load(features + at, mask, ACC)
    d = _lfi.load(grad + at, mask, ACC) * _lfi.load(grey + position, position < positions, ACC)
    return f, tl.where(f == 0, 0.0, d)


@triton.jit
def _mask_gradient(
    grad, features, grey, out, channels, positions, tiles, image_stride, channel_stride, position_stride,
    ACC: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    image, channel, known = _lfi.place(channels, tiles, CHANNELS)
    rows = (image * image_stride + channel * channel_stride)[:, None]
    grey += image * positions
    low, high = _lfi.extremes(features + rows, known, positions, position_stride, ACC, CHANNELS, POSITIONS)
    constant = low == high
    extent = tl.where(constant, 1.0, high - low)
    total = tl.zeros((CHANNELS, POSITIONS), dtype=ACC)
    weighted = tl.zeros((CHANNELS, POSITIONS), dtype=ACC)
    lowest = tl.zeros((CHANNELS, POSITIONS), dtype=ACC)
    highest = tl.zeros((CHANNELS, POSITIONS), dtype=ACC)
    for start in range(0, positions, POSITIONS):
        position = tl.cast(start, tl.int64) + tl.arange(0, POSITIONS)[None, :]
        mask = known[:, None] & (position < positions)
        f, d = _passed(grad, features, grey, rows + position * position_stride, position, mask, positions, ACC)
        total += d
        weighted += tl.where(mask, d * ((f - low) / extent), 0.0)
        lowest += tl.where(mask & (f == low), 1.0, 0.0)
        highest += tl.where(mask & (f == high), 1.0, 0.0)
    total, weighted = tl.sum(total, axis=1)[:, None], tl.sum(weighted, axis=1)[:, None]
    lowest, highest = tl.sum(lowest, axis=1)[:, None], tl.sum(highest, axis=1)[:, None]
    at_low, at_high = _lfi.shares(total, weighted, lowest, highest, extent)
    for start in range(0, positions, POSITIONS):
        position = tl.cast(start, tl.int64) + tl.arange(0, POSITIONS)[None, :]
        at = rows + position * position_stride
        mask = known[:, None] & (position < positions)
        f, d = _passed(grad, features, grey, at, position, mask, positions, ACC)
        found = d / extent + tl.where(f == low, at_low, 0.0) - tl.where(f == high, at_high, 0.0)
        tl.store(out + at, tl.where(constant, 0.0, found).to(out.dtype.element_ty), mask=mask)


def launch(grad: torch.Tensor, features: torch.Tensor, grey: torch.Tensor) -> torch.Tensor:
    """The gradient in the features; arguments and result as the op's schema `fastcam::lfi_mask_backward`.

    Shapes: grad and features (B,K,h,w), grey (B,1,h,w) -> (B,K,h,w).
    Layout, dtype: those of empty_like(features). NCHW and channels_last features are read as they lie; grad is copied
    to their order if it lies otherwise.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    batch, channels, height, width = features.shape
    with _launch.on_device(grad, features, grey):
        dense, strides = _launch.dense_images(features)
        result, out = _lfi.written(features, dense)
        if batch == 0:
            return result
        grad, _ = _launch.dense_images(grad, _launch.is_channels_last(features))
        block_channels, block_positions = _lfi.tiling(features, strides[1])
        tiles = triton.cdiv(channels, block_channels)
        _mask_gradient[(batch * tiles,)](
            grad, dense, grey.contiguous(), out, channels, height * width, tiles, *strides,
            ACC=_launch.triton_type(_launch.accumulation(features.dtype)),
            CHANNELS=block_channels, POSITIONS=block_positions, num_warps=_lfi.WARPS,
        )  # fmt: skip
        return result if out is result else result.copy_(out)
