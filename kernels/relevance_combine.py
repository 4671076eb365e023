"""Triton kernels of `relevance_combine`: the end of Attribution Equilibrium's step through a convolution.

    C = max(x, 0) tC,  out = C - [C != 0] / n + (tA where x > threshold, else tB);  n elements of an image's C are not 0

With `shift` three launches: the elements that count in each chunk of an image, their sum's reciprocal, and the one pass
that writes, which is all there is without `shift`. Counts are integers, so exact in any order.
"""

import torch
import triton
import triton.language as tl

from . import _flat, _launch

__all__ = ["CHUNK", "launch"]

# Elements of an image that one program counts, BLOCK at a time.
CHUNK = 8192
FINISH_BLOCK = 128


@triton.jit
def _shared(x, tc):
    """What is left of the relevance at x before the shift."""
    return tl.where(x <= 0, 0.0, x * tc)


@triton.jit
def _count(inputs, parts, counts, length, chunks, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    image = (program // chunks).to(tl.int64) * length
    start = (program % chunks).to(tl.int64) * CHUNK
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in tl.static_range(CHUNK // BLOCK):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        x = _flat.load(inputs + image + at, at < length, ACC)
        tc = _flat.load(parts + image + at, at < length, ACC)
        found += (_shared(x, tc) != 0).to(tl.int32)
    tl.store(counts + program, tl.sum(found, axis=0))


@triton.jit
def _finish(counts, budgets, units, chunks, BLOCK: tl.constexpr):
    """What is taken from each element of an image that counts: one over their number, or nothing."""
    image = tl.program_id(0).to(tl.int64)
    counts += image * chunks
    found = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(0, chunks, BLOCK):
        chunk = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        found += tl.load(counts + chunk, mask=chunk < chunks, other=0).to(tl.int64)
    count = tl.sum(found, axis=0)
    taken = (count > 0) & (tl.load(budgets + 2 * image) > 0)
    unit = 1.0 / tl.maximum(count, 1).to(units.dtype.element_ty)
    tl.store(units + image, tl.where(taken, unit, 0.0))


@triton.jit
def _combine(
    inputs, parts, units, out, runs, length, blocks,
    threshold: tl.float64,  # declared: a float32, which Python floats become otherwise, would round it for float64
    SHIFT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    run, at, mask = _flat.tile(runs, length, blocks, ROWS, COLUMNS)
    at += run[:, None] * length
    step = tl.cast(runs, tl.int64) * length  # from one of the three parts to the next
    x = _flat.load(inputs + at, mask, ACC)
    parts += at
    found = _shared(x, _flat.load(parts, mask, ACC))
    if SHIFT:
        found -= tl.where(found == 0, 0.0, _flat.load(units + run, run < runs, ACC)[:, None])
    active = _flat.load(parts + step, mask, ACC)
    inactive = _flat.load(parts + 2 * step, mask, ACC)
    found += tl.where(x > tl.full((), threshold, ACC), active, inactive)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)


def launch(
    inputs: torch.Tensor, parts: torch.Tensor, budgets: torch.Tensor, shift: bool = True, threshold: float = 0.0
) -> torch.Tensor:
    """Relevance at the inputs; arguments and result as the op's schema `fastcam::relevance_combine`.

    Shapes: inputs (B,C,...), parts (3B,C,...), budgets (B,2) -> (B,C,...).
    Layout, dtype: those of empty_like(inputs). Tensors whose images do not lie in that order are copied to it.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    with _launch.on_device(inputs, parts, budgets):
        result = torch.empty_like(inputs)
        if result.numel() == 0:
            return result
        out = _launch.in_sequence(result)
        x, t = _launch.images_as(out, inputs), _launch.images_as(out, parts)
        batch, length = x.shape[0], x.numel() // x.shape[0]
        acc = _launch.triton_type(_launch.accumulation(x.dtype))
        units = budgets
        if shift:
            chunks = triton.cdiv(length, CHUNK)
            counts = torch.empty(batch * chunks, dtype=torch.int32, device=x.device)
            units = budgets.new_empty(batch)
            _count[(batch * chunks,)](
                x, t, counts, length, chunks, ACC=acc, CHUNK=CHUNK, BLOCK=_flat.BLOCK, num_warps=_flat.WARPS
            )
            _finish[(batch,)](counts, budgets.contiguous(), units, chunks, BLOCK=FINISH_BLOCK)
        programs, blocks, tile = _flat.tiling(batch, length)
        _combine[(programs,)](x, t, units, out, batch, length, blocks, float(threshold), SHIFT=shift, ACC=acc, **tile)
        return result if out is result else result.copy_(out)
