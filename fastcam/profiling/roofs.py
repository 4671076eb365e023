"""What the device can do, as the measure of what ops and methods reach."""

from __future__ import annotations

import math

import torch

from .measure import copy_gbps, seconds_of
from .plan import DTYPES

__all__ = ["Roofs"]


class Roofs:
    """What the device can do, measured when first asked for: `copy_` at powers of two of bytes, matrix products."""

    def __init__(self, device: str):
        self._device = device
        self.copies: dict[int, float] = {}
        self._gflops: dict[str, float] = {}

    def copy_seconds(self, nbytes: int) -> float:
        """Of a `copy_` that moves `nbytes` altogether, at the bandwidth of the nearest power of two from 4 KiB on."""
        size = 1 << max(12, min(30, round(math.log2(max(nbytes, 1)))))
        if size not in self.copies:
            self.copies[size] = copy_gbps(size, self._device)
        return nbytes / self.copies[size] / 1e9

    def gflops(self, precision: str) -> float:
        """Of a square matrix product that takes some milliseconds: the best of five."""
        if precision not in self._gflops:
            side = 4096 if torch.device(self._device).type == "cuda" else 768
            a = torch.randn(side, side, device=self._device).to(DTYPES[precision])
            best = min(seconds_of(lambda: a @ a, self._device) for _ in range(6))
            self._gflops[precision] = 2 * side**3 / best / 1e9
        return self._gflops[precision]
