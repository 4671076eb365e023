"""Triton kernel of `similarity_weights`: the similarity of two embeddings, split over their channels.

A program sums up one row, BLOCK channels at a time, and reads it again for what it writes. Which channels come together
depends on the row's length alone, so results are bit-equal in any batch, and for an expanded embedding as for one.
Arithmetic in float64. No atomics, no host synchronisation.
"""

import torch
import triton
import triton.language as tl

from . import _launch

__all__ = ["BLOCK", "launch"]

BLOCK = 1024  # 8 elements a thread, each with up to five sums in float64


@triton.jit
def _parts(first, second, at, channels, TERM: tl.constexpr):
    """What is formed of u and v (a term is that times a factor of its row), u and v, and which of them there are."""
    known = at < channels
    u = tl.load(first + at, mask=known, other=0.0).to(tl.float64)
    v = tl.load(second + at, mask=known, other=0.0).to(tl.float64)
    if TERM == "neg_sq":
        part = (u - v) * (u - v)
    elif TERM == "inverse":
        part = tl.where(known, 1.0 / (1.0 + tl.abs(u - v)), 0.0)
    else:
        part = u * v
    return part, u, v, known


# One embedding for all rows has step 0, others 1: as a plain number it leaves loads, and so sums, as they are.
@triton.jit(do_not_specialize=["first_step", "second_step"])
def _weigh_similarity(
    first, second, contributions, weights, totals, channels, first_step, second_step,
    TERM: tl.constexpr, WEIGHTING: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first += row * first_step * channels
    second += row * second_step * channels
    contributions += row * channels
    weights += row * channels
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    first_squares = tl.zeros((BLOCK,), dtype=tl.float64)
    second_squares = tl.zeros((BLOCK,), dtype=tl.float64)
    distances = tl.zeros((BLOCK,), dtype=tl.float64)
    low = tl.full((BLOCK,), float("inf"), dtype=tl.float64)
    high = tl.full((BLOCK,), float("-inf"), dtype=tl.float64)
    for start in range(0, channels, BLOCK):
        part, u, v, known = _parts(first, second, start + tl.arange(0, BLOCK), channels, TERM)
        total += part
        low = tl.where(known & (part < low), part, low)  # NaN shows in the total
        high = tl.where(known & (part > high), part, high)
        if TERM == "cosine":
            first_squares += u * u
            second_squares += v * v
        if TERM == "inverse":
            distances += tl.abs(u - v)
    factor = tl.cast(SIGN, tl.float64)
    if TERM == "cosine":
        u_norm, v_norm = tl.sqrt(tl.sum(first_squares, axis=0)), tl.sqrt(tl.sum(second_squares, axis=0))
        factor = factor / (tl.where(u_norm < 1e-12, 1e-12, u_norm) * tl.where(v_norm < 1e-12, 1e-12, v_norm))
    elif TERM == "neg_sq":
        factor = -factor
    elif TERM == "cross":
        factor = 2.0 * factor
    whole = tl.sum(total, axis=0) * factor
    base, shift = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    gain, divisor = factor, tl.cast(1.0, tl.float64)
    if WEIGHTING == "minmax":
        least, greatest = tl.min(low, axis=0), tl.max(high, axis=0)
        flat = least == greatest
        base = tl.where(factor < 0, greatest, least)
        gain = tl.where(factor < 0, tl.cast(-1.0, tl.float64), tl.cast(1.0, tl.float64))
        divisor = tl.where(flat, 1.0, greatest - least)
        # NaN unless the total and the embeddings are finite.
        shift = tl.where(flat, 1.0, 0.0) + 0.0 * (whole + tl.sum(distances, axis=0))
    elif WEIGHTING == "ratio":
        divisor = tl.where(whole == 0, 1.0, tl.abs(whole))
    out = contributions.dtype.element_ty
    if out != tl.float64:  # for float results a product is as good as a quotient
        gain /= divisor
        divisor = tl.cast(1.0, tl.float64)
    tl.store(totals + row, whole.to(out))
    for start in range(0, channels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part, u, v, known = _parts(first, second, at, channels, TERM)
        tl.store(contributions + at, (factor * part).to(out), mask=known)
        tl.store(weights + at, (gain * (part - base) / divisor + shift).to(out), mask=known)


def launch(
    first: torch.Tensor,
    second: torch.Tensor,
    term: str = "cosine",
    weighting: str = "minmax",
    dissimilarity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(contributions, weights, total); arguments and results as the op's schema `fastcam::similarity_weights`.

    Shapes: first and second (B,D) or (1,D) -> (B,D), (B,D), (B,).
    Layout, dtype: contiguous, float64 for float64, else float32. An embedding for all rows is read as it lies; inputs
    that are not contiguous cost a copy.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    with _launch.on_device(first, second):
        batch, channels = second.shape[0] if first.shape[0] == 1 else first.shape[0], first.shape[1]
        acc = _launch.accumulation(first.dtype)
        contributions, weights = (first.new_empty((batch, channels), dtype=acc) for _ in range(2))
        totals = first.new_empty((batch,), dtype=acc)
        if batch == 0:
            return contributions, weights, totals
        u, v = (_aligned(x.contiguous()) for x in (first, second))
        block = min(_launch.next_power_of_2(channels), BLOCK)
        # Fused into a difference, the least part of a row would differ from the row's minimum.
        _weigh_similarity[(batch,)](
            u, v, contributions, weights, totals, channels, int(u.shape[0] > 1), int(v.shape[0] > 1),
            TERM=term, WEIGHTING=weighting, SIGN=-1.0 if dissimilarity else 1.0, BLOCK=block,
            num_warps=max(1, block // 256), enable_fp_fusion=False,
        )  # fmt: skip
    return contributions, weights, totals


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy: off its alignment, a row would be read, and so added up, in another order than inside a batch."""
    return x if x.data_ptr() % 16 == 0 else x.clone()
