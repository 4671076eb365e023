"""Triton kernel of `relevance_divide`: the division in the middle of most relevance rules, elementwise.

    out = r f / st(d),  st(d) = d + epsilon for d >= 0, else d - epsilon; 0 where st(d) = 0

One launch, one pass over flat memory: all tensors are read in the order of the result.
"""

import torch
import triton
import triton.language as tl

from . import _flat, _launch

__all__ = ["launch"]


@triton.jit
def _divide(
    relevance, divisor, factor, out, count,
    epsilon: tl.float64,  # declared: a float32, which Python floats become otherwise, would round it for float64
    FACTOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, mask = _flat.elements(count, BLOCK)
    r = _flat.scaled(relevance, factor, at, mask, FACTOR, ACC)
    d = _flat.load(divisor + at, mask, ACC)
    found = _flat.quotient(r, d, tl.full((), epsilon, ACC))
    tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)


def launch(
    relevance: torch.Tensor, divisor: torch.Tensor, factor: torch.Tensor | None = None, epsilon: float = 1e-6
) -> torch.Tensor:
    """The message that goes back; arguments and result as the op's schema `fastcam::relevance_divide`.

    Shapes: all (B,C,...) -> (B,C,...).
    Layout, dtype: those of empty_like(relevance). Tensors that do not lie in that order are copied to it.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    with _launch.on_device(relevance, divisor, factor):
        out = torch.empty_like(relevance)
        if out.numel() == 0:
            return out
        r, d = (_launch.in_order_of(out, x) for x in (relevance, divisor))
        f = r if factor is None else _launch.in_order_of(out, factor)
        _divide[(triton.cdiv(out.numel(), _flat.BLOCK),)](
            r, d, f, out, out.numel(), float(epsilon),
            FACTOR=factor is not None, ACC=_launch.triton_type(_launch.accumulation(out.dtype)), BLOCK=_flat.BLOCK,
            num_warps=_flat.WARPS,
        )  # fmt: skip
    return out
