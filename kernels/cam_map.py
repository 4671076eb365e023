"""Triton kernels of `cam_map`: weighted sum over channels, ReLU, bilinear resize, min-max scaling.

    M[b,t,i,j] = sum_k w[b,t,k(,i,j)] * (A[b,k,i,j] - R[b,k,i,j]),  raw = relu(M),  U = resize(raw),
    maps = (U - min U) / (max U - min U) per map

Three launches. `_reduce` streams the features once, every program a fixed share of the channels of some positions.
`_collect` adds the shares in order, writes `raw`, and finds finiteness and extremes. `_write` writes the scaled map.
The shares depend on the shape of one image only, so a map is bit-equal alone and inside any batch.

Extremes without a second pass over the output: between two neighbouring rows and columns of `raw`, U is affine in each
coordinate, so over the output positions that fall into such a cell it is extreme at the first or last row and column of
them. `_collect` evaluates these four per cell: 196 values instead of 50176 for a 7x7 map shown at 224x224.

Cost: reads features (and reference, multipliers) once per 1 or 4 targets, writes raw and maps once; scratch is at most
1/16 of an image's positions x channels. No atomics, no host synchronisation.
"""

import torch
import triton
import triton.language as tl

from . import _launch, _resize

__all__ = ["launch"]

# Tiles of `_reduce`, (targets, channels, positions, warps), by where the neighbour in memory is and how much there is.
# 2048 elements a step keep 16 loads in flight in each thread; the neighbour's axis is at least one 128-byte line.
REDUCE = {
    "nchw_small": (1, 32, 64, 4),  # up to 8x8: a channel's positions in one tile
    "nchw_large": (1, 16, 128, 4),
    "channels_last": (1, 128, 16, 4),
    "nchw_targets": (4, 16, 64, 4),
    "channels_last_targets": (4, 64, 16, 4),
}
SHARE = 8192  # elements one `_reduce` program streams: 32 KiB of float32
MAX_SHARES = 16  # bounds scratch and the additions `_collect` makes for each value
CELLS = 1024  # cells of `_collect`
OUTPUTS = 2048  # outputs of a `_write` program
MAX_COLUMNS = 256


@triton.jit
def _reduce(
    features, weights, reference, partials,
    channels, positions, targets, share, shares, position_tiles, target_tiles, maps,
    feature_image, feature_channel, feature_position,
    weight_image, weight_target, weight_channel, weight_position,
    reference_image, reference_channel, reference_position,
    REFERENCE: tl.constexpr, PER_POSITION: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
    TARGETS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    # Program ids divide as int32 (a 64-bit division is a slow call that spills). Where a tile starts is int64 from the
    # first multiplication; inside a tile int32 halves the registers of addresses, unless one tile spans more (OFFSET).
    program = tl.program_id(0)
    first_position = (program % position_tiles).to(tl.int64) * POSITIONS
    program = program // position_tiles
    first_target = (program % target_tiles) * TARGETS
    program = program // target_tiles
    part = (program % shares).to(tl.int64)
    image = (program // shares).to(tl.int64)
    first_channel = part * share
    stop = tl.minimum(first_channel + share, channels)
    target = first_target + tl.arange(0, TARGETS)
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    in_image = first_position + column < positions

    features += image * feature_image + first_channel * feature_channel + first_position * feature_position
    features += row.to(OFFSET)[:, None] * feature_channel + column.to(OFFSET)[None, :] * feature_position
    if REFERENCE:
        reference += image * reference_image + first_channel * reference_channel + first_position * reference_position
        reference += row.to(OFFSET)[:, None] * reference_channel + column.to(OFFSET)[None, :] * reference_position
    weights += image * weight_image + first_channel * weight_channel + first_position * weight_position
    weights += target.to(tl.int64)[:, None] * weight_target + row.to(OFFSET)[None, :] * weight_channel
    if PER_POSITION:
        weights = weights[:, :, None] + column.to(OFFSET)[None, None, :] * weight_position
    channel = first_channel + row
    # Elementwise sums first; threads meet once, after the loop.
    total = tl.zeros((TARGETS, CHANNELS, POSITIONS), dtype=ACC)
    for _ in range(tl.cdiv(share, CHANNELS)):
        in_share = channel < stop
        mask = in_share[:, None] & in_image[None, :]
        value = tl.load(features, mask=mask, other=0.0).to(ACC)
        if REFERENCE:
            value -= tl.load(reference, mask=mask, other=0.0).to(ACC)
            reference += CHANNELS * reference_channel
        wanted = (target < targets)[:, None] & in_share[None, :]
        if PER_POSITION:
            weight = tl.load(weights, mask=wanted[:, :, None] & in_image[None, None, :], other=0.0).to(ACC)
        else:
            weight = tl.load(weights, mask=wanted, other=0.0).to(ACC)[:, :, None]
        total += weight * value[None, :, :]
        features += CHANNELS * feature_channel
        weights += CHANNELS * weight_channel
        channel += CHANNELS
    total = tl.sum(total, axis=1)
    out = (part * maps + image * targets + target)[:, None] * positions + (first_position + column)[None, :]
    tl.store(partials + out, total, mask=(target < targets)[:, None] & in_image[None, :])


@triton.jit
def _combined(partials, index, mask, shares, stride, ACC: tl.constexpr):
    """Value of M at `index`: the shares added in their order."""
    total = tl.zeros(index.shape, dtype=ACC)
    for part in range(shares):
        total += tl.load(partials + part * stride + index, mask=mask, other=0.0)
    return total


@triton.jit
def _relu(value, RELU: tl.constexpr):
    # `<=` and not maximum: NaN must come through.
    return tl.where(value <= 0, 0.0, value) if RELU else value


@triton.jit
def _collect(
    partials, raw, stats,
    shares, maps, height, width, out_height, out_width, chunks,
    RELU: tl.constexpr, NORMALIZE: tl.constexpr, RESIZE: tl.constexpr, ACC: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    chunk = program % chunks
    image = (program // chunks).to(tl.int64)
    positions = height * width  # below 2^31, so that cells divide as int32; maps * positions need not be
    stride = tl.cast(maps, tl.int64) * positions
    partials += image * positions
    cell = chunk * CELLS + tl.arange(0, CELLS)
    inside = cell < positions
    value = _combined(partials, cell, inside, shares, stride, ACC)
    finite = tl.min((value - value == 0).to(tl.int32), axis=0)  # inf - inf and NaN - NaN are NaN
    value = _relu(value, RELU)
    tl.store(raw + image * positions + cell, value, mask=inside)

    stats += image * chunks + chunk
    stride_stats = tl.cast(maps, tl.int64) * chunks
    tl.store(stats, finite.to(ACC))
    if NORMALIZE:
        # A constant raw map stays constant under exact resizing; rounding would make noise of it, min-max a picture.
        infinity = float("inf")
        tl.store(stats + stride_stats, tl.min(tl.where(inside, value, infinity), axis=0))
        tl.store(stats + 2 * stride_stats, tl.max(tl.where(inside, value, -infinity), axis=0))
    if NORMALIZE and RESIZE:
        i = cell // width
        j = cell % width
        row = i * width
        low_row = tl.minimum(i + 1, height - 1) * width
        right = tl.minimum(j + 1, width - 1)
        top_right = _relu(_combined(partials, row + right, inside, shares, stride, ACC), RELU)
        low_left = _relu(_combined(partials, low_row + j, inside, shares, stride, ACC), RELU)
        low_right = _relu(_combined(partials, low_row + right, inside, shares, stride, ACC), RELU)
        least, greatest = _resize.cell_extremes(
            value, top_right, low_left, low_right, i, j, inside, height, width, out_height, out_width, ACC
        )
        tl.store(stats + 3 * stride_stats, tl.min(least, axis=0))
        tl.store(stats + 4 * stride_stats, tl.max(greatest, axis=0))


@triton.jit
def _write(
    raw, stats, maps_out, finite_out,
    maps, height, width, out_height, out_width, chunks, row_tiles, column_tiles,
    NORMALIZE: tl.constexpr, RESIZE: tl.constexpr, ACC: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    program = program // column_tiles
    row_tile = program % row_tiles
    image = (program // row_tiles).to(tl.int64)
    y = row_tile * ROWS + tl.arange(0, ROWS)
    x = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    mask = (y < out_height)[:, None] & (x < out_width)[None, :]
    raw += image * height * width
    if RESIZE:
        source_y = _resize.source(y, _resize.axis_scale(height, out_height, ACC), ACC)
        source_x = _resize.source(x, _resize.axis_scale(width, out_width, ACC), ACC)
        i = tl.minimum(source_y.to(tl.int32), height - 1)
        j = tl.minimum(source_x.to(tl.int32), width - 1)
        row = (i * width)[:, None]
        low_row = (tl.minimum(i + 1, height - 1) * width)[:, None]
        right = tl.minimum(j + 1, width - 1)[None, :]
        top_left = tl.load(raw + row + j[None, :], mask=mask, other=0.0)
        top_right = tl.load(raw + row + right, mask=mask, other=0.0)
        low_left = tl.load(raw + low_row + j[None, :], mask=mask, other=0.0)
        low_right = tl.load(raw + low_row + right, mask=mask, other=0.0)
        value = _resize.lerp2(
            top_left, top_right, low_left, low_right, (source_y - i)[:, None], (source_x - j)[None, :]
        )
    else:
        value = tl.load(raw + y[:, None] * width + x[None, :], mask=mask, other=0.0)

    stats += image * chunks
    stride_stats = tl.cast(maps, tl.int64) * chunks
    finite = tl.full((), 1.0, ACC)
    infinity = float("inf")
    least = tl.full((), infinity, ACC)
    greatest = tl.full((), -infinity, ACC)
    raw_least = least
    raw_greatest = greatest
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        known = chunk < chunks
        finite = tl.minimum(finite, tl.min(tl.load(stats + chunk, mask=known, other=1.0), axis=0))
        if NORMALIZE:
            low = tl.load(stats + stride_stats + chunk, mask=known, other=infinity)
            high = tl.load(stats + 2 * stride_stats + chunk, mask=known, other=-infinity)
            raw_least = tl.minimum(raw_least, tl.min(low, axis=0))
            raw_greatest = tl.maximum(raw_greatest, tl.max(high, axis=0))
            if RESIZE:
                low = tl.load(stats + 3 * stride_stats + chunk, mask=known, other=infinity)
                high = tl.load(stats + 4 * stride_stats + chunk, mask=known, other=-infinity)
                least = tl.minimum(least, tl.min(low, axis=0))
                greatest = tl.maximum(greatest, tl.max(high, axis=0))
    if NORMALIZE:
        if not RESIZE:
            least = raw_least
            greatest = raw_greatest
        flat = (raw_least == raw_greatest) | (least == greatest)
        value = _resize.scaled(value, least, tl.where(flat, 0.0, greatest - least), finite, ACC)
    out = (image * out_height + y)[:, None] * out_width + x[None, :]
    tl.store(maps_out + out, value, mask=mask)
    if (row_tile == 0) & (column_tile == 0):
        tl.store(finite_out + image, (finite > 0).to(tl.uint8))


def reduce_config(channels: int, positions: int, targets: int, stride_channel: int, per_position: bool) -> tuple:
    """Row of `REDUCE` and the channels of one share, from the shape of one image alone."""
    channels_last = stride_channel == 1 and channels > 1
    if targets > 1 and not per_position:
        key = "channels_last_targets" if channels_last else "nchw_targets"
    elif channels_last:
        key = "channels_last"
    else:
        key = "nchw_small" if positions <= 64 else "nchw_large"
    tile = REDUCE[key]
    _, block, columns, _ = tile
    share = max(SHARE // min(positions, columns), triton.cdiv(channels, MAX_SHARES))
    share = min(triton.cdiv(share, block), triton.cdiv(channels, block)) * block
    return tile, share


def launch(
    features: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor | None = None,
    relu: bool = True,
    normalize: bool = True,
    size: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps, raw maps and finite flags; arguments and results as the op's schema `fastcam::cam_map.with_raw`.

    Shapes: features (B,K,H,W); weights (B,K), (B,T,K), (B,K,H,W) or (B,T,K,H,W); reference (B,K,H,W) or (1,K,H,W);
    maps (B[,T],OH,OW), raw (B[,T],H,W), finite (B[,T]).
    Layout, dtype: results contiguous, maps and raw in float64 for float64 features, else float32; finite bool.
    NCHW and channels_last inputs, each on its own, are read as they lie.
    Errors: RuntimeError for tensors this process cannot run on; ValueError for a single map of 2^31 positions or more.
    The public function has checked everything else.
    """
    batch, channels, height, width = features.shape
    per_position = weights.ndim >= 4
    lead = tuple(weights.shape[: weights.ndim - (3 if per_position else 1)])
    targets = lead[1] if len(lead) > 1 else 1
    maps = batch * targets
    acc = _launch.accumulation(features.dtype)
    out_height, out_width = (height, width) if size is None else (int(size[0]), int(size[1]))
    resize = (out_height, out_width) != (height, width)
    positions = height * width
    if max(positions, out_height * out_width) >= 2**31:
        raise ValueError(
            f"one map must have fewer than 2^31 positions, got {height}x{width} resized to {out_height}x{out_width}"
        )

    with _launch.on_device(features, weights, reference):
        new = features.new_empty
        maps_out = new((*lead, out_height, out_width), dtype=acc)
        raw = new((*lead, height, width), dtype=acc)
        finite = new(lead, dtype=torch.bool)
        if maps == 0:
            return maps_out, raw, finite

        features, feature_strides = _launch.dense_images(features)
        if per_position:
            weights, (image, channel, position) = _launch.dense_images(weights.reshape(maps, channels, height, width))
            weight_strides = (image * targets, image, channel, position)
        else:
            weights = weights.contiguous()
            weight_strides = (targets * channels, channels, 1, 0)
        reference_strides = (0, 0, 0)
        if reference is not None:
            one = reference.shape[0] == 1
            reference, reference_strides = _launch.dense_images(reference)
            reference_strides = (0, *reference_strides[1:]) if one else reference_strides

        tile, share = reduce_config(channels, positions, targets, feature_strides[1], per_position)
        target_block, channel_block, position_block, warps = tile
        shares = triton.cdiv(channels, share)
        position_tiles = triton.cdiv(positions, position_block)
        target_tiles = triton.cdiv(targets, target_block)
        cells = min(CELLS, _launch.next_power_of_2(positions))
        chunks = triton.cdiv(positions, cells)
        columns = min(MAX_COLUMNS, _launch.next_power_of_2(out_width))
        rows = min(OUTPUTS // columns, _launch.next_power_of_2(out_height))
        row_tiles, column_tiles = triton.cdiv(out_height, rows), triton.cdiv(out_width, columns)
        partials = new((shares, maps, positions), dtype=acc)
        stats = new((5, maps, chunks), dtype=acc)
        dtype = _launch.triton_type(acc)
        offset = _launch.tile_offset(channels, positions, channel_block, position_block)

        _reduce[(batch * shares * target_tiles * position_tiles,)](
            features, weights, features if reference is None else reference, partials,
            channels, positions, targets, share, shares, position_tiles, target_tiles, maps,
            *feature_strides, *weight_strides, *reference_strides,
            REFERENCE=reference is not None, PER_POSITION=per_position, ACC=dtype, OFFSET=offset,
            TARGETS=target_block, CHANNELS=channel_block, POSITIONS=position_block, num_warps=warps,
        )  # fmt: skip
        _collect[(maps * chunks,)](
            partials, raw, stats, shares, maps, height, width, out_height, out_width, chunks,
            RELU=relu, NORMALIZE=normalize, RESIZE=resize, ACC=dtype, CELLS=cells,
        )  # fmt: skip
        _write[(maps * row_tiles * column_tiles,)](
            raw, stats, maps_out, finite.view(torch.uint8),
            maps, height, width, out_height, out_width, chunks, row_tiles, column_tiles,
            NORMALIZE=normalize, RESIZE=resize, ACC=dtype,
            CHUNKS=min(1024, _launch.next_power_of_2(chunks)), ROWS=rows, COLUMNS=columns,
        )  # fmt: skip
    return maps_out, raw, finite
