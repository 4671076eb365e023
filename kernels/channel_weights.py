"""Triton kernels of `channel_weights`: spatial reductions of multipliers and features to channel coefficients.

    A = features - reference, S_k = sum_ij A_k, Z = H*W
    mean: sum G / Z        sum: sum G*A        xgrad: sum G*A / S_k        grad_cam_pp: sum relu(G) / (2 + S_k*G)

One launch where a program holds all positions of its channels, which is every image of up to 64x64 in NCHW and 16x16
in channels_last. Larger images are cut into position chunks of fixed size, whose partial sums a second launch adds in
order; Grad-CAM++ needs S_k before its sum and so takes both steps twice. Chunks depend on one image's shape only, so
results are bit-equal alone and inside any batch.

Cost: mean reads the multipliers once, grad_cam_pp and the others both tensors once per target. No atomics, no host
synchronisation.
"""

import torch
import triton
import triton.language as tl

from . import _launch

__all__ = ["launch"]

# (channels, positions) of a tile and positions of a chunk, by memory order and positions of an image. A tile is 2048
# elements over 8 warps: 8 loads a tensor in flight in each thread, and pointers to three tensors fit in registers (16
# spill). A chunk is where one program would become the slowest of an idle device.
TILES = {
    "nchw_small": (32, 64, 4096),  # up to 8x8
    "nchw_medium": (8, 256, 4096),  # up to 16x16
    "nchw_large": (4, 512, 4096),
    "channels_last": (64, 32, 256),
}
WARPS = 8
FINISH_BLOCK = 256


@triton.jit
def _first_sum(g, a, mask, MODE: tl.constexpr):
    """What the mode's main sum adds at each position; `a` is S_k for grad_cam_pp."""
    if MODE == "mean":
        term = g
    elif MODE == "shift":  # S_k alone
        term = a
    elif MODE == "grad_cam_pp":
        denominator = 2.0 + a * g
        factor = tl.where(tl.abs(denominator) < 1e-6, 0.0, 1.0 / denominator)
        # Masked, not left to g = 0: an infinite S_k would make NaN of positions that do not exist.
        term = tl.where(mask, factor * tl.where(g <= 0, 0.0, g), 0.0)
    else:
        term = g * a
    return term


@triton.jit
def _coefficient(main, shift, magnitude, positions, MODE: tl.constexpr):
    """Channel coefficient from the finished sums."""
    if MODE == "mean":
        main = main / positions
    elif MODE == "xgrad":
        empty = tl.abs(shift) <= 1e-6 * magnitude
        main = tl.where(empty, 0.0, main / tl.where(empty, 1.0, shift))
    return main


@triton.jit
def _difference(features, reference, mask, REFERENCE: tl.constexpr, ACC: tl.constexpr):
    value = tl.load(features, mask=mask, other=0.0).to(ACC)
    if REFERENCE:
        value -= tl.load(reference, mask=mask, other=0.0).to(ACC)
    return value


@triton.jit
def _reduce(
    features, multipliers, reference, shifts, out,
    channels, positions, targets, maps, chunk, chunks, channel_tiles,
    feature_image, feature_channel, feature_position,
    multiplier_map, multiplier_channel, multiplier_position,
    reference_image, reference_channel, reference_position,
    MODE: tl.constexpr, WHOLE: tl.constexpr, REFERENCE: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Coefficients of a channel tile (WHOLE), or its sums over one chunk as `out` (sum, chunk, map, channel)."""
    # Program ids divide as int32 (a 64-bit division is a slow call that spills). Where a tile starts is int64 from the
    # first multiplication; inside a tile int32 halves the registers of addresses, unless one tile spans more (OFFSET).
    program = tl.program_id(0)
    first_channel = (program % channel_tiles).to(tl.int64) * CHANNELS
    program = program // channel_tiles
    part = (program % chunks).to(tl.int64)
    program = program // chunks
    index = program.to(tl.int64)  # of the map: image * targets + target
    image = (program // targets).to(tl.int64)
    start = part * chunk
    stop = tl.minimum(start + chunk, positions)
    steps = tl.cdiv(chunk, POSITIONS)
    channel = first_channel + tl.arange(0, CHANNELS)
    known = channel < channels
    row = tl.arange(0, CHANNELS).to(OFFSET)[:, None]
    column = tl.arange(0, POSITIONS).to(OFFSET)[None, :]
    features += image * feature_image + first_channel * feature_channel + start * feature_position
    multipliers += index * multiplier_map + first_channel * multiplier_channel + start * multiplier_position
    reference += image * reference_image + first_channel * reference_channel + start * reference_position
    feature_tile = row * feature_channel + column * feature_position
    multiplier_tile = row * multiplier_channel + column * multiplier_position
    reference_tile = row * reference_channel + column * reference_position

    main = tl.zeros((CHANNELS, POSITIONS), dtype=ACC)
    shift = tl.zeros((CHANNELS, POSITIONS), dtype=ACC)
    magnitude = tl.zeros((CHANNELS, POSITIONS), dtype=ACC)
    shift_sum = tl.zeros((CHANNELS,), dtype=ACC)
    if MODE == "grad_cam_pp":
        if WHOLE:
            for step in range(steps):
                done = tl.cast(step, tl.int64) * POSITIONS
                mask = known[:, None] & (start + done + column < stop)
                shift += _difference(
                    features + done * feature_position + feature_tile,
                    reference + done * reference_position + reference_tile, mask, REFERENCE, ACC,
                )  # fmt: skip
            shift_sum = tl.sum(shift, axis=1)
        else:
            shift_sum = tl.load(shifts + image * channels + channel, mask=known, other=0.0)
    for step in range(steps):
        done = tl.cast(step, tl.int64) * POSITIONS
        mask = known[:, None] & (start + done + column < stop)
        g = tl.zeros((CHANNELS, POSITIONS), dtype=ACC)
        a = shift_sum[:, None]
        if MODE != "shift":
            g = tl.load(multipliers + done * multiplier_position + multiplier_tile, mask=mask, other=0.0).to(ACC)
        if (MODE == "sum") | (MODE == "xgrad") | (MODE == "shift"):
            a = _difference(
                features + done * feature_position + feature_tile,
                reference + done * reference_position + reference_tile, mask, REFERENCE, ACC,
            )  # fmt: skip
        main += _first_sum(g, a, mask, MODE)
        if MODE == "xgrad":
            shift += a
            magnitude += tl.abs(a)
    main = tl.sum(main, axis=1)
    if MODE == "xgrad":
        shift_sum = tl.sum(shift, axis=1)
    magnitude = tl.sum(magnitude, axis=1)
    if WHOLE:
        tl.store(
            out + index * channels + channel, _coefficient(main, shift_sum, magnitude, positions, MODE), mask=known
        )
    else:
        rows = maps * channels
        out += part * rows + index * channels + channel
        tl.store(out, main, mask=known)
        if MODE == "xgrad":
            tl.store(out + chunks * rows, shift_sum, mask=known)
            tl.store(out + 2 * chunks * rows, magnitude, mask=known)


@triton.jit
def _finish(partials, out, rows, positions, chunks, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the chunks' sums in order and makes coefficients of them."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = row < rows
    rows = tl.cast(rows, tl.int64)
    # Nearly equal floats would round the same way at every addition.
    main = tl.zeros((BLOCK,), dtype=tl.float64)
    shift = tl.zeros((BLOCK,), dtype=tl.float64)
    magnitude = tl.zeros((BLOCK,), dtype=tl.float64)
    for part in range(chunks):
        main += tl.load(partials + part * rows + row, mask=known, other=0.0)
        if MODE == "xgrad":
            shift += tl.load(partials + (chunks + part) * rows + row, mask=known, other=0.0)
            magnitude += tl.load(partials + (2 * chunks + part) * rows + row, mask=known, other=0.0)
    tl.store(out + row, _coefficient(main, shift, magnitude, positions, MODE), mask=known)


def tile(channels: int, positions: int, stride_channel: int) -> tuple[int, int, int]:
    """Row of `TILES` for one image's shape and memory order."""
    if stride_channel == 1 and channels > 1:
        return TILES["channels_last"]
    if positions <= 64:
        return TILES["nchw_small"]
    return TILES["nchw_medium" if positions <= 256 else "nchw_large"]


def launch(
    features: torch.Tensor, multipliers: torch.Tensor, reference: torch.Tensor | None = None, mode: str = "mean"
) -> torch.Tensor:
    """Channel coefficients; arguments and result as the op's schema `fastcam::channel_weights`.

    Shapes: features (B,K,H,W), multipliers (B,K,H,W) or (B,T,K,H,W), reference (B,K,H,W) or (1,K,H,W) -> (B[,T],K).
    Layout, dtype: contiguous, float64 for float64 features, else float32. Multipliers may have the features' dtype or
    the result's. NCHW and channels_last inputs, each on its own, are read as they lie.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    batch, channels, height, width = features.shape
    lead = tuple(multipliers.shape[:-3])
    targets = lead[1] if len(lead) > 1 else 1
    maps, positions = batch * targets, height * width
    acc = _launch.accumulation(features.dtype)
    with _launch.on_device(features, multipliers, reference):
        out = features.new_empty((*lead, channels), dtype=acc)
        if maps == 0:
            return out
        features, feature_strides = _launch.dense_images(features)
        multipliers, multiplier_strides = _launch.dense_images(multipliers.reshape(maps, channels, height, width))
        reference_strides = (0, 0, 0)
        if reference is not None:
            one = reference.shape[0] == 1
            reference, reference_strides = _launch.dense_images(reference)
            reference_strides = (0, *reference_strides[1:]) if one else reference_strides
        # Where a mode never reads the features, the multipliers' order decides.
        order = multiplier_strides if mode == "mean" else feature_strides
        block_channels, block_positions, chunk = tile(channels, positions, order[1])
        chunk = min(chunk, positions)
        chunks, channel_tiles = triton.cdiv(positions, chunk), triton.cdiv(channels, block_channels)
        dtype = _launch.triton_type(acc)
        offset = _launch.tile_offset(channels, positions, block_channels, block_positions)

        def reduce(mode, targets, shifts, out):
            _reduce[(batch * targets * chunks * channel_tiles,)](
                features, multipliers, features if reference is None else reference, shifts, out,
                channels, positions, targets, batch * targets, chunk, chunks, channel_tiles,
                *feature_strides, *multiplier_strides, *reference_strides,
                MODE=mode, WHOLE=chunks == 1, REFERENCE=reference is not None, ACC=dtype, OFFSET=offset,
                CHANNELS=block_channels, POSITIONS=block_positions, num_warps=WARPS,
            )  # fmt: skip

        def two_steps(mode, targets, shifts, out):
            rows = batch * targets * channels
            partials = features.new_empty((3 if mode == "xgrad" else 1, chunks, rows), dtype=acc)
            reduce(mode, targets, shifts, partials)
            _finish[(triton.cdiv(rows, FINISH_BLOCK),)](
                partials, out, rows, positions, chunks, MODE=mode, BLOCK=FINISH_BLOCK
            )

        if chunks == 1:
            reduce(mode, targets, out, out)
        elif mode == "grad_cam_pp":
            shifts = features.new_empty((batch, channels), dtype=acc)
            two_steps("shift", 1, shifts, shifts)
            two_steps(mode, targets, shifts, out)
        else:
            two_steps(mode, targets, out, out)
    return out
