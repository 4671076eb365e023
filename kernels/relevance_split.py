"""Triton kernel of `relevance_split`: messages of the rules that treat positive and negative contributions apart.

    alpha_beta  u = first r / st(p)                            v = -second r / st(n), 0 where n = 0
    gamma       u = r / st(z + first p) where z > 0, else 0    v = r / st(z + first n) where z < 0, else 0
    rap         u = max(r,0) / p                               v = min(r,0) / |n| + r / (p + |n|)
    n = z - p, 0 where |n| <= 8 eps p

One launch, one pass. A run of the inputs, an image or (channels_last) a pixel, ends up in two places of the result.
"""

import torch
import triton
import triton.language as tl

from . import _flat, _launch

__all__ = ["launch"]


@triton.jit
def _messages(r, z, p, first, second, epsilon, noise, RULE: tl.constexpr):
    n = z - p
    n = tl.where(n >= -noise * p, 0.0, n)
    if RULE == "alpha_beta":
        u = first * _flat.quotient(r, p, epsilon)
        v = tl.where(n == 0, 0.0, -second * _flat.quotient(r, n, epsilon))
    elif RULE == "gamma":
        u = _flat.quotient(tl.where(z <= 0, 0.0, r), z + first * p, epsilon)  # NaN stays
        v = tl.where(z >= 0, 0.0, _flat.quotient(r, z + first * n, epsilon))
    else:  # rap
        u = _flat.quotient(_flat.positive_part(r), p, 0.0)
        v = _flat.quotient(_flat.negative_part(r), -n, 0.0) + _flat.quotient(r, p - n, 0.0)
    return u, v


@triton.jit
def _split(
    relevance, output, positive, factor, out, runs, length, blocks,
    # Declared: a float32, which Python floats become otherwise, would round them for float64.
    first: tl.float64, second: tl.float64, epsilon: tl.float64, noise: tl.float64,
    RULE: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    run, at, mask = _flat.tile(runs, length, blocks, ROWS, COLUMNS)
    start = run[:, None] * length
    r = _flat.scaled(relevance, factor, start + at, mask, FACTOR, ACC)
    z = _flat.load(output + start + at, mask, ACC)
    p = _flat.load(positive + start + at, mask, ACC)
    u, v = _messages(
        r, z, p, tl.full((), first, ACC), tl.full((), second, ACC), tl.full((), epsilon, ACC), tl.full((), noise, ACC),
        RULE,
    )  # fmt: skip
    out += 2 * start + at
    tl.store(out, u.to(out.dtype.scalar.element_ty), mask=mask)
    tl.store(out + length, v.to(out.dtype.scalar.element_ty), mask=mask)


def launch(
    relevance: torch.Tensor,
    output: torch.Tensor,
    positive: torch.Tensor,
    factor: torch.Tensor | None = None,
    *,
    rule: str,
    first: float = 2.0,
    second: float = 1.0,
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """Messages for positive weights, then for negative ones; arguments as the op's schema `fastcam::relevance_split`.

    Shapes: all (B,C,...) -> (B,2C,...).
    Layout, dtype: relevance's dtype; channels_last where the relevance is, else contiguous. Tensors that do not lie so
    are copied.
    Errors: RuntimeError for tensors this process cannot run on; the public function has checked everything else.
    """
    with _launch.on_device(relevance, output, positive, factor):
        order = _launch.memory_format(relevance)
        batch, channels, *spatial = relevance.shape
        out = torch.empty(
            (batch, 2 * channels, *spatial), dtype=relevance.dtype, device=relevance.device, memory_format=order
        )
        count = relevance.numel()
        if count == 0:
            return out
        r, z, p = (x.contiguous(memory_format=order) for x in (relevance, output, positive))
        f = r if factor is None else factor.contiguous(memory_format=order)
        length = count // batch if order == torch.contiguous_format else channels
        programs, blocks, tile = _flat.tiling(count // length, length)
        _split[(programs,)](
            r, z, p, f, out, count // length, length, blocks,
            float(first), float(second), float(epsilon), 8 * torch.finfo(out.dtype).eps,
            RULE=rule, FACTOR=factor is not None, ACC=_launch.triton_type(_launch.accumulation(out.dtype)), **tile,
        )  # fmt: skip
    return out
