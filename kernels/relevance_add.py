"""Triton kernel of `relevance_add`: relevance of a sum of two tensors, divided among them, elementwise.

    (a s, b s),  s = r f / st(a + b),  st as in `relevance_divide`

One launch, one pass over flat memory: all tensors are read in the order of the results.
"""

import torch
import triton
import triton.language as tl

from . import _flat, _launch

__all__ = ["launch"]


@triton.jit
def _divide_among(
    relevance, first, second, factor, out, other, count,
    epsilon: tl.float64,  # declared: a float32, which Python floats become otherwise, would round it for float64
    FACTOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, mask = _flat.elements(count, BLOCK)
    r = _flat.scaled(relevance, factor, at, mask, FACTOR, ACC)
    a = _flat.load(first + at, mask, ACC)
    b = _flat.load(second + at, mask, ACC)
    share = _flat.quotient(r, a + b, tl.full((), epsilon, ACC))
    tl.store(out + at, (a * share).to(out.dtype.element_ty), mask=mask)
    tl.store(other + at, (b * share).to(other.dtype.element_ty), mask=mask)


def launch(
    relevance: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    factor: torch.Tensor | None = None,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relevance of each summand; arguments and results as the op's schema `fastcam::relevance_add`.

    Shapes: all (B,C,...) -> two (B,C,...).
    Layout, dtype: those of empty_like(relevance). Tensors that do not lie in that order are copied to it.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    with _launch.on_device(relevance, first, second, factor):
        out, other = torch.empty_like(relevance), torch.empty_like(relevance)
        if out.numel() == 0:
            return out, other
        r, a, b = (_launch.in_order_of(out, x) for x in (relevance, first, second))
        f = r if factor is None else _launch.in_order_of(out, factor)
        _divide_among[(triton.cdiv(out.numel(), _flat.BLOCK),)](
            r, a, b, f, out, other, out.numel(), float(epsilon),
            FACTOR=factor is not None, ACC=_launch.triton_type(_launch.accumulation(out.dtype)), BLOCK=_flat.BLOCK,
            num_warps=_flat.WARPS,
        )  # fmt: skip
    return out, other
