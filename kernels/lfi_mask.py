"""Triton kernel of `lfi_mask`: each channel scaled to 0..1 over its positions, times the grey image.

    N = (F - min F) / (max F - min F), 1 in a constant channel, 0 where F is 0;  masks = N grey

One launch: a program finds the extremes of its channels and reads them again, from the cache, to write their masks.
"""

import torch
import triton
import triton.language as tl

from . import _launch, _lfi

__all__ = ["launch"]


@triton.jit
def _mask(
    features, grey, out, channels, positions, tiles, image_stride, channel_stride, position_stride,
    ACC: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    image, channel, known = _lfi.place(channels, tiles, CHANNELS)
    rows = (image * image_stride + channel * channel_stride)[:, None]
    low, high = _lfi.extremes(features + rows, known, positions, position_stride, ACC, CHANNELS, POSITIONS)
    constant = low == high
    extent = tl.where(constant, 1.0, high - low)
    for start in range(0, positions, POSITIONS):
        position = tl.cast(start, tl.int64) + tl.arange(0, POSITIONS)[None, :]
        at = rows + position * position_stride
        mask = known[:, None] & (position < positions)
        f = _lfi.load(features + at, mask, ACC)
        n = tl.where(constant, 1.0, (f - low) / extent)
        n = tl.where((f == 0) & (low == low), 0.0, n)
        n *= _lfi.load(grey + image * positions + position, position < positions, ACC)
        tl.store(out + at, n.to(out.dtype.element_ty), mask=mask)


def launch(features: torch.Tensor, grey: torch.Tensor) -> torch.Tensor:
    """The masks; arguments and result as the op's schema `fastcam::lfi_mask`.

    Shapes: features (B,K,h,w), grey (B,1,h,w) -> (B,K,h,w).
    Layout, dtype: those of empty_like(features). NCHW and channels_last features are read as they lie.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    batch, channels, height, width = features.shape
    with _launch.on_device(features, grey):
        dense, strides = _launch.dense_images(features)
        result, out = _lfi.written(features, dense)
        if batch == 0:
            return result
        block_channels, block_positions = _lfi.tiling(features, strides[1])
        tiles = triton.cdiv(channels, block_channels)
        _mask[(batch * tiles,)](
            dense, grey.contiguous(), out, channels, height * width, tiles, *strides,
            ACC=_launch.triton_type(_launch.accumulation(features.dtype)),
            CHANNELS=block_channels, POSITIONS=block_positions, num_warps=_lfi.WARPS,
        )  # fmt: skip
        return result if out is result else result.copy_(out)
