"""Inputs and tolerances for op tests: memory layouts, dtypes, usable backends, error gates."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastcam import _extension

__all__ = ["DTYPES", "LAYOUTS", "OPCHECKED", "arranged", "assert_rms", "make", "to_float64", "usable_backends"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# torch.library.opcheck traces the op anew for each: every layout and both precisions, not every pair of them.
OPCHECKED = (
    ("contiguous", torch.float32),
    ("channels_last", torch.bfloat16),
    ("transposed", torch.bfloat16),
    ("sliced channels", torch.float32),
)
# Largest RMS error over RMS value for 64 reduced elements, by accumulation dtype; grows with the square root.
RMS = {torch.float64: 1e-12, torch.float32: 1e-6}


def usable_backends() -> list[str]:
    """The backends whose CPU results are tested in this process."""
    if _extension.why_not():
        return ["reference"]
    # PyTorch's kernels do not change with the instruction set ours are capped at.
    return ["cpp"] if os.environ.get("FASTCAM_CPU_ISA") else ["reference", "cpp"]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str = "contiguous", offset: float = 0.0
) -> Tensor:
    """Normal values around `offset`, in the given memory layout."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    return LAYOUTS[layout](values.to(dtype))


def to_float64(x: Tensor) -> np.ndarray:
    """The exact values, for the oracle."""
    return x.detach().to(torch.float64).numpy()


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _inside_nan(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """x as a slice of a larger tensor whose other elements are NaN: reading one of them shows."""
    shape = list(x.shape)
    shape[dim] += before + after
    around = x.new_full(shape, torch.nan)
    inner = around.narrow(dim, before, x.shape[dim])
    inner.copy_(x)
    return inner


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced columns": lambda x: _inside_nan(x, x.dim() - 1, 1, 2),
    "sliced channels": lambda x: _inside_nan(x, x.dim() - 3, 2, 1),
    "sliced batch": lambda x: _inside_nan(x, 0, 1, 1),
    "sliced channels_last": lambda x: _inside_nan(x.movedim(-3, -1), x.dim() - 1, 3, 2).movedim(-1, -3),
}


def arranged(x: Tensor, rng: random.Random) -> Tensor:
    """x in another layout: dimensions in any memory order, or every second element of a larger tensor of NaN."""
    if rng.random() < 0.3:
        around = x.new_full([2 * n for n in x.shape], torch.nan)
        inner = around[tuple(slice(rng.randint(0, 1), None, 2) for _ in x.shape)]
        return inner.copy_(x)
    order = rng.sample(range(x.dim()), x.dim())
    return x.permute(order).contiguous().permute(sorted(range(x.dim()), key=order.__getitem__))


def assert_rms(name: str, actual: Tensor, expected: np.ndarray, reduced: int, factor: float = 1.0) -> None:
    """RMS error at most the dtype's rate times sqrt(reduced / 64), relative to the RMS of the expected values."""
    assert tuple(actual.shape) == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {expected.shape}"
    if not expected.size:
        return
    error = np.sqrt(np.mean((to_float64(actual) - expected) ** 2))
    scale = np.sqrt(np.mean(expected**2))
    limit = factor * RMS[actual.dtype] * max(1.0, (reduced / 64) ** 0.5) * scale
    assert error <= limit, f"{name}: RMS error {error:.3g} above {limit:.3g} (RMS value {scale:.3g})"
