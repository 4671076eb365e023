"""The dense float64 solution of impute_linear's system, holes of every kind, and the comparison of a result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastcam._testing.ops import to_float64

__all__ = ["check_impute_linear", "holes", "oracle"]

#: Largest error over the values' range, after 20 iterations: rounding in the accumulation dtype, which a hole that
#: leaves a single pixel multiplies by some hundreds.
LIMIT = {torch.float64: 1e-10, torch.float32: 4e-5}


def oracle(images: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Every missing pixel the weighted mean of its neighbours; 0 where nothing is known."""
    found = images.copy()
    _, height, width = missing.shape
    for image, hole in zip(found, missing, strict=True):
        if hole.all():
            image[:] = 0
        if hole.all() or not hole.any():
            continue
        matrix, right = np.eye(height * width), image.reshape(len(image), -1).T.copy()
        for y, x in np.argwhere(hole):
            row = matrix[y * width + x]
            right[y * width + x] = 0
            for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    row[(y + dy) * width + x + dx] = -(1 / 12 if dy and dx else 1 / 6)
            row[y * width + x] = 0
            row[y * width + x] = -row.sum()
        image[:] = np.linalg.solve(matrix, right).T.reshape(image.shape)
    return found


def holes(count: int, height: int, width: int, seed: int) -> Tensor:
    """Scattered pixels, blobs, nearly everything, nothing and everything, in turn."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    kinds: tuple[Callable[[], np.ndarray], ...] = (
        lambda: rng.random((height, width)) < 0.5,
        lambda: (y - rng.integers(height)) ** 2 + (x - rng.integers(width)) ** 2 < (height * width) / 6,
        lambda: (y != rng.integers(height)) | (x != rng.integers(width)),
        lambda: np.zeros((height, width), bool),
        lambda: np.ones((height, width), bool),
    )
    return torch.from_numpy(np.stack([kinds[(i + seed) % len(kinds)]() for i in range(count)]))


def check_impute_linear(got: Tensor, images: Tensor, missing: Tensor, iterations: int = 20) -> None:
    """Dtype, layout and values after so many iterations that rounding errors are left."""
    assert iterations >= 20
    assert got.dtype == images.dtype
    assert got.is_contiguous()
    got, images, missing = got.cpu(), images.cpu(), missing.cpu()
    known = ~missing.unsqueeze(1).expand_as(images)
    assert torch.equal(got[known], images[known])
    wide = torch.promote_types(images.dtype, torch.float32)
    want = oracle(to_float64(images), missing.numpy())
    scale = max(1.0, float(np.abs(want).max())) if want.size else 1.0
    rounding = 0 if images.dtype == wide else torch.finfo(images.dtype).eps
    assert np.abs(to_float64(got) - want).max(initial=0) <= (LIMIT[wide] + rounding) * scale
