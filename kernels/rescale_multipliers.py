"""Triton kernel of `rescale_multipliers`: DeepLIFT's Rescale rule, elementwise.

    out = multipliers * s,  s = (f(u) - f(r)) / (u - r),  f(x) = x for x > 0, else negative_slope * x

One launch, one pass over flat memory: all tensors are read in the order of the result.
"""

import torch
import triton
import triton.language as tl

from . import _launch

__all__ = ["launch"]

# 8 elements a thread: 16-byte loads of half types, two of float32.
BLOCK = 1024
WARPS = 4


@triton.jit
def _rescale(
    multipliers, inputs, reference, out, length, blocks,
    negative_slope: tl.float64,  # declared: a float32, which Python floats become otherwise, would round it for float64
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one run; the reference is the same for every run."""
    program = tl.program_id(0)
    start = (program // blocks).to(tl.int64) * length
    at = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < length
    slope = tl.full((), negative_slope, ACC)
    u = tl.load(inputs + start + at, mask=mask, other=0.0).to(ACC)
    r = tl.load(reference + at, mask=mask, other=0.0).to(ACC)
    g = tl.load(multipliers + start + at, mask=mask, other=0.0).to(ACC)
    secant = (tl.where(u > 0, u, slope * u) - tl.where(r > 0, r, slope * r)) / (u - r)
    factor = tl.where((u <= 0) & (r <= 0), slope, secant)  # NaN is on neither side of the kink
    factor = tl.where((u > 0) & (r > 0), 1.0, factor)
    tl.store(out + start + at, (g * factor).to(out.dtype.element_ty), mask=mask)


def launch(
    multipliers: torch.Tensor, inputs: torch.Tensor, reference: torch.Tensor, negative_slope: float = 0.0
) -> torch.Tensor:
    """Multipliers at the activation's inputs; arguments and result as the op's schema `fastcam::rescale_multipliers`.

    Shapes: inputs (B,...), multipliers the same, reference the same or (1,...) -> (B,...).
    Layout, dtype: those of empty_like(multipliers). Tensors that do not lie in that order are copied to it.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    with _launch.on_device(multipliers, inputs, reference):
        out = torch.empty_like(multipliers)
        if out.numel() == 0:
            return out
        reference, runs, length = _launch.runs(out, reference)
        multipliers, inputs, reference = (_launch.in_order_of(out, x) for x in (multipliers, inputs, reference))
        blocks = triton.cdiv(length, BLOCK)
        _rescale[(runs * blocks,)](
            multipliers, inputs, reference, out, length, blocks, float(negative_slope),
            ACC=_launch.triton_type(_launch.accumulation(inputs.dtype)), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out
