"""Triton kernels of `lfi_attend_backward`: the gradients of `lfi_attend`.

    a = sum_k grad_k F_k + grad_attention;  d = a / (max P - min P)
    p = d + [P lowest] (sum d A - sum d) / count - [P highest] sum d A / count, + grad_raw;  0 where P <= 0
    grad_features_k = (1 + A) grad_k + s_k p;  grad_importance_k = sum p F_k

cam_map's kernels add the channels up; then a program a map goes back through its scaling, and a pass over features and
gradient finds both results.
"""

import torch
import triton
import triton.language as tl

from . import _launch, _lfi, cam_map

__all__ = ["launch"]


@triton.jit
def _sum_at(sums, grad_attention, position, mask, GIVEN: tl.constexpr, ACC: tl.constexpr):
    d = _lfi.load(sums + position, mask, ACC)
    if GIVEN:
        d += _lfi.load(grad_attention + position, mask, ACC)
    return d


@triton.jit
def _map_gradient(
    sums, grad_attention, grad_raw, attention, raw, out, positions,
    GIVEN: tl.constexpr, EXTRA: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * positions
    sums += first
    grad_attention += first
    attention += first
    raw += first
    low, high = _lfi.extremes_of_map(raw, positions, ACC, BLOCK)
    constant = low == high
    extent = tl.where(constant, 1.0, high - low)
    total = tl.zeros((BLOCK,), dtype=ACC)
    weighted = tl.zeros((BLOCK,), dtype=ACC)
    lowest = tl.zeros((BLOCK,), dtype=ACC)
    highest = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK)
        mask = position < positions
        d = _sum_at(sums, grad_attention, position, mask, GIVEN, ACC)
        p = _lfi.load(raw + position, mask, ACC)
        total += d
        weighted += d * _lfi.load(attention + position, mask, ACC)
        lowest += tl.where(mask & (p == low), 1.0, 0.0)
        highest += tl.where(mask & (p == high), 1.0, 0.0)
    at_low, at_high = _lfi.shares(
        tl.sum(total, axis=0), tl.sum(weighted, axis=0), tl.sum(lowest, axis=0), tl.sum(highest, axis=0), extent
    )
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK)
        mask = position < positions
        d = _sum_at(sums, grad_attention, position, mask, GIVEN, ACC)
        p = _lfi.load(raw + position, mask, ACC)
        kept = d if KEEP else tl.zeros_like(d)
        d = d / extent + tl.where(p == low, at_low, 0.0) - tl.where(p == high, at_high, 0.0)
        d = tl.where(constant, kept, d)
        a = _lfi.load(attention + position, mask, ACC)
        d = tl.where(a == a, d, float("nan"))
        if EXTRA:
            d += _lfi.load(grad_raw + first + position, mask, ACC)
        tl.store(out + first + position, tl.where(p <= 0, 0.0, d), mask=mask)


@triton.jit
def _share_out(
    grad, features, importance, attention, map_gradient, out, grad_importance,
    channels, positions, tiles, image_stride, channel_stride, position_stride,
    ACC: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    image, channel, known = _lfi.place(channels, tiles, CHANNELS)
    rows = (image * image_stride + channel * channel_stride)[:, None]
    s = _lfi.load(importance + image * channels + channel, known, ACC)[:, None]
    attention += image * positions
    map_gradient += image * positions
    total = tl.zeros((CHANNELS, POSITIONS), dtype=ACC)
    for start in range(0, positions, POSITIONS):
        position = tl.cast(start, tl.int64) + tl.arange(0, POSITIONS)[None, :]
        at = rows + position * position_stride
        there = position < positions
        mask = known[:, None] & there
        d = _lfi.load(map_gradient + position, there, ACC)
        total += d * _lfi.load(features + at, mask, ACC)
        gain = 1 + _lfi.load(attention + position, there, ACC)
        found = gain * _lfi.load(grad + at, mask, ACC) + s * d
        tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)
    tl.store(grad_importance + image * channels + channel, tl.sum(total, axis=1), mask=known)


def launch(
    grad_attended: torch.Tensor,
    grad_attention: torch.Tensor | None,
    grad_raw: torch.Tensor | None,
    features: torch.Tensor,
    importance: torch.Tensor,
    attention: torch.Tensor,
    raw: torch.Tensor,
    constant_map: str = "raw",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both gradients; arguments and results as the op's schema `fastcam::lfi_attend_backward`.

    Shapes: grad_attended and features (B,K,h,w), importance (B,K), maps (B,1,h,w) -> (B,K,h,w), (B,K).
    Layout, dtype: the first as empty_like(features), the second contiguous in importance's dtype. NCHW and
    channels_last features are read as they lie; grad_attended is copied to their order if it lies otherwise.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    batch, channels, height, width = features.shape
    positions, acc = height * width, _launch.accumulation(features.dtype)
    with _launch.on_device(grad_attended, grad_attention, grad_raw, features, importance, attention, raw):
        dense, strides = _launch.dense_images(features)
        result, out = _lfi.written(features, dense)
        if batch == 0:
            return result, importance.new_empty(importance.shape)
        grad, _ = _launch.dense_images(grad_attended, _launch.is_channels_last(features))
        sums = cam_map.launch(dense, grad, None, False, False)[1]
        attention, map_gradient = attention.contiguous(), torch.empty_like(sums)
        kind = _launch.triton_type(acc)
        _map_gradient[(batch,)](
            sums, sums if grad_attention is None else grad_attention.contiguous(),
            sums if grad_raw is None else grad_raw.contiguous(), attention, raw.contiguous(), map_gradient, positions,
            GIVEN=grad_attention is not None, EXTRA=grad_raw is not None, KEEP=constant_map == "raw", ACC=kind,
            BLOCK=min(_lfi.MAP_BLOCK, _launch.next_power_of_2(positions)),
        )  # fmt: skip
        grad_importance = features.new_empty((batch, channels), dtype=acc)
        block_channels, block_positions = _lfi.tiling(features, strides[1])
        tiles = triton.cdiv(channels, block_channels)
        _share_out[(batch * tiles,)](
            grad, dense, importance.contiguous(), attention, map_gradient, out, grad_importance,
            channels, positions, tiles, *strides,
            ACC=kind, CHANNELS=block_channels, POSITIONS=block_positions, num_warps=_lfi.WARPS,
        )  # fmt: skip
        return result if out is result else result.copy_(out), grad_importance.to(importance.dtype)
