"""Triton kernel of `relevance_equilibrium`: the three messages of Attribution Equilibrium at a convolution.

    P = max(r, 0) / p,  N = min(r, 0) / q,  out = (ratio P + N) / zC, P / zA, N / zB;  0 / 0 = 0 and x / 0 = 0

One launch, one pass. A run is an image, whose budgets (p, q) are read for each tile of it.
"""

import torch
import triton
import triton.language as tl

from . import _flat, _launch

__all__ = ["launch"]


@triton.jit
def _equilibrium(
    relevance, budgets, divisors, out, runs, length, blocks,
    ratio: tl.float64,  # declared: a float32, which Python floats become otherwise, would round it for float64
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    run, at, mask = _flat.tile(runs, length, blocks, ROWS, COLUMNS)
    at += run[:, None] * length
    step = tl.cast(runs, tl.int64) * length  # from one of the three parts to the next
    p = _flat.load(budgets + 2 * run, run < runs, ACC)[:, None]
    q = _flat.load(budgets + 2 * run + 1, run < runs, ACC)[:, None]
    r = _flat.load(relevance + at, mask, ACC)
    positive = _flat.quotient(_flat.positive_part(r), p, 0.0)
    negative = _flat.quotient(_flat.negative_part(r), q, 0.0)
    both = tl.full((), ratio, ACC) * positive + negative
    divisors += at
    out += at
    sc = _flat.quotient(both, _flat.load(divisors, mask, ACC), 0.0)
    tl.store(out, sc.to(out.dtype.scalar.element_ty), mask=mask)
    sa = _flat.quotient(positive, _flat.load(divisors + step, mask, ACC), 0.0)
    tl.store(out + step, sa.to(out.dtype.scalar.element_ty), mask=mask)
    sb = _flat.quotient(negative, _flat.load(divisors + 2 * step, mask, ACC), 0.0)
    tl.store(out + 2 * step, sb.to(out.dtype.scalar.element_ty), mask=mask)


def launch(relevance: torch.Tensor, budgets: torch.Tensor, divisors: torch.Tensor, ratio: float = 2.0) -> torch.Tensor:
    """The three messages; arguments and result as the op's schema `fastcam::relevance_equilibrium`.

    Shapes: relevance (B,C,...), budgets (B,2), divisors (3B,C,...) -> (3B,C,...).
    Layout, dtype: those of empty_like(divisors). Tensors whose images do not lie in that order are copied to it.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    with _launch.on_device(relevance, budgets, divisors):
        result = torch.empty_like(divisors)
        count, batch = relevance.numel(), relevance.shape[0]
        if count == 0:
            return result
        out = _launch.in_sequence(result)
        programs, blocks, tile = _flat.tiling(batch, count // batch)
        _equilibrium[(programs,)](
            _launch.images_as(out, relevance), budgets.contiguous(), _launch.images_as(out, divisors), out,
            batch, count // batch, blocks, float(ratio),
            ACC=_launch.triton_type(_launch.accumulation(out.dtype)), **tile,
        )  # fmt: skip
        return result if out is result else result.copy_(out)
