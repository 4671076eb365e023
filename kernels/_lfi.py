"""What the kernels of the lfi_* ops share: tiles of channels and positions, extremes, results like the features.

The arithmetic is that of `csrc/formulas.h`.
"""

import torch
import triton
import triton.language as tl

__all__ = ["MAP_BLOCK", "WARPS", "extremes", "extremes_of_map", "load", "place", "shares", "tiling", "written"]

# (channels, positions) of a tile, by memory order and positions of an image: 2048 elements, as in channel_weights.
TILES = {"nchw_small": (32, 64), "nchw_medium": (8, 256), "nchw_large": (4, 512), "channels_last": (64, 32)}
WARPS = 8
MAP_BLOCK = 1024  # positions of a map that one program takes at once


@triton.jit
def place(channels, tiles, CHANNELS: tl.constexpr):
    """Image, channels (CHANNELS,) of this program and which of them there are; `tiles` programs an image."""
    program = tl.program_id(0)
    channel = (program % tiles).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    return (program // tiles).to(tl.int64), channel, channel < channels


@triton.jit
def load(at, mask, ACC: tl.constexpr):
    return tl.load(at, mask=mask, other=0.0).to(ACC)


@triton.jit
def _narrowed(low, high, odd, x, mask):
    usual = mask & (x == x)
    low = tl.minimum(low, tl.where(usual, x, float("inf")))
    high = tl.maximum(high, tl.where(usual, x, float("-inf")))
    return low, high, odd | (mask & (x != x)).to(tl.int32)


@triton.jit
def extremes(rows, known, positions, stride, ACC: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """Of each channel, (CHANNELS,1), from its first element at `rows` on. low is NaN if an element is."""
    low = tl.full((CHANNELS, POSITIONS), float("inf"), ACC)
    high = tl.full((CHANNELS, POSITIONS), float("-inf"), ACC)
    odd = tl.zeros((CHANNELS, POSITIONS), dtype=tl.int32)
    for start in range(0, positions, POSITIONS):
        position = tl.cast(start, tl.int64) + tl.arange(0, POSITIONS)[None, :]
        mask = known[:, None] & (position < positions)
        low, high, odd = _narrowed(low, high, odd, load(rows + position * stride, mask, ACC), mask)
    low = tl.where(tl.max(odd, axis=1) > 0, float("nan"), tl.min(low, axis=1))
    return low[:, None], tl.max(high, axis=1)[:, None]


@triton.jit
def extremes_of_map(values, positions, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Of one contiguous map; low is NaN if an element is."""
    low = tl.full((BLOCK,), float("inf"), ACC)
    high = tl.full((BLOCK,), float("-inf"), ACC)
    odd = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK)
        mask = position < positions
        low, high, odd = _narrowed(low, high, odd, load(values + position, mask, ACC), mask)
    return tl.where(tl.max(odd, axis=0) > 0, float("nan"), tl.min(low, axis=0)), tl.max(high, axis=0)


@triton.jit
def shares(total, weighted, lowest, highest, extent):
    """What each of the lowest and highest values gets, from sums over d and d * scaled and the number of them."""
    return (weighted - total) / extent / lowest, weighted / extent / highest


def tiling(features: torch.Tensor, channel_stride: int) -> tuple[int, int]:
    """Channels and positions of a tile."""
    _, channels, height, width = features.shape
    if channel_stride == 1 and channels > 1:
        return TILES["channels_last"]
    positions = height * width
    return TILES["nchw_small" if positions <= 64 else "nchw_medium" if positions <= 256 else "nchw_large"]


def written(features: torch.Tensor, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A result like the features, and what kernels write: itself if it lies as `dense` does, else a stand-in."""
    result = torch.empty_like(features)
    same = all(n == 1 or a == b for n, a, b in zip(result.shape, result.stride(), dense.stride(), strict=True))
    return result, result if same else torch.empty_like(dense)
