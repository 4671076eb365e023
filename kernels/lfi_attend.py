"""Triton kernels of `lfi_attend`: an attention map from features and channel importances, and the features it raises.

    P = max(sum_k s_k F_k, 0);  A = (P - min P) / (max P - min P), NaN if P is not finite;  attended = (1 + A) F

cam_map's kernels add the channels up; then a program a map finds its extremes and scales it, and a pass over the
features multiplies.
"""

import torch
import triton
import triton.language as tl

from . import _launch, _lfi, cam_map

__all__ = ["launch"]


@triton.jit
def _scale(raw, attention, positions, KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * positions
    raw += first
    low, high = _lfi.extremes_of_map(raw, positions, ACC, BLOCK)
    extent = high - low
    finite = extent - extent == 0
    constant = extent == 0
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK)
        mask = position < positions
        p = _lfi.load(raw + position, mask, ACC)
        kept = p if KEEP else tl.zeros_like(p)
        a = tl.where(constant, kept, (p - low) / tl.where(constant, 1.0, extent))
        tl.store(attention + first + position, tl.where(finite, a, float("nan")), mask=mask)


@triton.jit
def _raise(
    features, attention, out, channels, positions, tiles, image_stride, channel_stride, position_stride,
    ACC: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    image, channel, known = _lfi.place(channels, tiles, CHANNELS)
    position = tl.program_id(1).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    at = (image * image_stride + channel * channel_stride)[:, None] + position * position_stride
    mask = known[:, None] & (position < positions)
    gain = 1 + _lfi.load(attention + image * positions + position, position < positions, ACC)
    raised = gain * _lfi.load(features + at, mask, ACC)
    tl.store(out + at, raised.to(out.dtype.element_ty), mask=mask)


def launch(
    features: torch.Tensor, importance: torch.Tensor, constant_map: str = "raw"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attended features, attention and raw maps; arguments and results as the op's schema `fastcam::lfi_attend`.

    Shapes: features (B,K,h,w), importance (B,K) -> (B,K,h,w), (B,1,h,w), (B,1,h,w).
    Layout, dtype: attended as empty_like(features), maps contiguous in float64 for float64 features, else float32. NCHW
    and channels_last features are read as they lie.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    batch, channels, height, width = features.shape
    positions, acc = height * width, _launch.accumulation(features.dtype)
    with _launch.on_device(features, importance):
        dense, strides = _launch.dense_images(features)
        result, out = _lfi.written(features, dense)
        attention = features.new_empty((batch, 1, height, width), dtype=acc)
        if batch == 0:
            return result, attention, torch.empty_like(attention)
        raw = cam_map.launch(dense, importance.to(acc), None, True, False)[1].unsqueeze(1)
        kind = _launch.triton_type(acc)
        block = min(_lfi.MAP_BLOCK, _launch.next_power_of_2(positions))
        _scale[(batch,)](raw, attention, positions, KEEP=constant_map == "raw", ACC=kind, BLOCK=block)
        block_channels, block_positions = _lfi.tiling(features, strides[1])
        tiles = triton.cdiv(channels, block_channels)
        _raise[(batch * tiles, triton.cdiv(positions, block_positions))](
            dense, attention, out, channels, positions, tiles, *strides,
            ACC=kind, CHANNELS=block_channels, POSITIONS=block_positions, num_warps=_lfi.WARPS,
        )  # fmt: skip
        return result if out is result else result.copy_(out), attention, raw
