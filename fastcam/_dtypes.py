"""The dtypes kernels take and the dtype each accumulates and returns in."""

from __future__ import annotations

import torch

ACCUMULATION = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for float32, float16 and bfloat16; KeyError for anything else."""
    return ACCUMULATION[dtype]
