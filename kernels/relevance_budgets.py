"""Triton kernels of `relevance_budgets`: what an image's positive and its negative relevance add up to.

A program adds up one chunk of one image, and a second launch each image's chunks, in order. Chunks depend on an image's
shape only, so results are bit-equal alone and inside any batch. No atomics, no host synchronisation.
"""

import torch
import triton
import triton.language as tl

from . import _flat, _launch

__all__ = ["CHUNK", "launch"]

# Elements of an image that one program adds up, BLOCK at a time, so 8 of them in each place of a block.
CHUNK = 8192
FINISH_BLOCK = 128


@triton.jit
def _add_chunk(relevance, sums, length, chunks, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    relevance += (program // chunks).to(tl.int64) * length
    start = (program % chunks).to(tl.int64) * CHUNK
    positive = tl.zeros((BLOCK,), dtype=ACC)
    negative = tl.zeros((BLOCK,), dtype=ACC)
    for step in tl.static_range(CHUNK // BLOCK):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        r = _flat.load(relevance + at, at < length, ACC)
        positive += _flat.positive_part(r)
        negative -= _flat.negative_part(r)
    sums += 2 * program.to(tl.int64)
    tl.store(sums, tl.sum(positive, axis=0))
    tl.store(sums + 1, tl.sum(negative, axis=0))


@triton.jit
def _finish(sums, out, chunks, BLOCK: tl.constexpr):
    """Both totals of an image."""
    image = tl.program_id(0).to(tl.int64)
    sums += 2 * image * chunks
    positive = tl.zeros((BLOCK,), dtype=tl.float64)
    negative = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, chunks, BLOCK):
        chunk = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        positive += _flat.load(sums + 2 * chunk, chunk < chunks, tl.float64)
        negative += _flat.load(sums + 2 * chunk + 1, chunk < chunks, tl.float64)
    tl.store(out + 2 * image, tl.sum(positive, axis=0).to(out.dtype.element_ty))
    tl.store(out + 2 * image + 1, tl.sum(negative, axis=0).to(out.dtype.element_ty))


def launch(relevance: torch.Tensor) -> torch.Tensor:
    """Totals of positive and negative entries; argument and result as the op's schema `fastcam::relevance_budgets`.

    Shapes: relevance (B,C,...) -> (B,2).
    Layout, dtype: contiguous, float64 for float64, else float32. channels_last relevance is read as it lies, any other
    layout that is not contiguous costs a copy.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    with _launch.on_device(relevance):
        acc = _launch.accumulation(relevance.dtype)
        if relevance.numel() == 0:
            return relevance.new_zeros((relevance.shape[0], 2), dtype=acc)
        out = relevance.new_empty((relevance.shape[0], 2), dtype=acc)
        r = relevance.contiguous(memory_format=_launch.memory_format(relevance))
        # Off its alignment, an image would be read, and so added up, in another order than inside a batch.
        r = r if r.data_ptr() % 16 == 0 else r.clone()
        batch, length = r.shape[0], r.numel() // r.shape[0]
        chunks = triton.cdiv(length, CHUNK)
        sums = out if chunks == 1 else out.new_empty((batch, chunks, 2))
        _add_chunk[(batch * chunks,)](
            r, sums, length, chunks, ACC=_launch.triton_type(acc), CHUNK=CHUNK, BLOCK=_flat.BLOCK, num_warps=_flat.WARPS
        )
        if chunks > 1:
            _finish[(batch,)](sums, out, chunks, BLOCK=FINISH_BLOCK)
    return out
