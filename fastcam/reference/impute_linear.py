"""Reference of `fastcam.ops.impute_linear`; formula and rules stand there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastcam._dtypes import accumulation_dtype

__all__ = ["impute_linear"]

_DAMPING, _SMOOTHS, _COARSEST_SMOOTHS = 0.8, 2, 8


def impute_linear(images: Tensor, missing: Tensor, iterations: int = 12) -> Tensor:
    """(N,C,H,W); arguments as checked by the public function.

    Conjugate gradients, preconditioned by a V-cycle with damped Jacobi steps. A coarse cell is missing where all of its
    four cells are, so that corrections vanish at known pixels.
    """
    height, width = images.shape[2:]
    depth = max(0, (min(height, width) - 1).bit_length() - 3)
    margin = (0, -width % (1 << depth), 0, -height % (1 << depth))
    wide = accumulation_dtype(images.dtype)
    levels = _levels(functional.pad(missing.unsqueeze(1), margin), _inside(images, margin), depth, wide)
    top = levels[0]
    known = functional.pad(torch.where(missing.unsqueeze(1), 0, images).to(wide), margin)
    found, residual = torch.zeros_like(known), _around(known) * top.missing
    step = corrected = _cycle(residual, levels)
    energy = _dot(residual, corrected)
    for _ in range(iterations):
        image = _applied(step, top)
        length = energy / _dot(step, image).clamp(min=torch.finfo(wide).tiny)
        found, residual = found + length * step, residual - length * image
        corrected = _cycle(residual, levels)
        before, energy = energy, _dot(residual, corrected)
        step = corrected + energy / before.clamp(min=torch.finfo(wide).tiny) * step
    return torch.where(missing.unsqueeze(1), found[..., :height, :width].to(images.dtype), images).contiguous()


@dataclass(frozen=True)
class _Level:
    """missing (N,1,h,w) 1 for unknowns; scale (N,1,h,w) what their own value counts in their equation, else 1."""

    missing: Tensor
    scale: Tensor


def _inside(images: Tensor, margin: tuple[int, ...]) -> Tensor:
    ones = torch.ones((1, 1, *images.shape[2:]), dtype=torch.bool, device=images.device)
    return functional.pad(ones, margin)


def _levels(missing: Tensor, inside: Tensor, depth: int, dtype: torch.dtype) -> list[_Level]:
    found = []
    for level in range(depth + 1):
        if level:
            whole = (missing | ~inside).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).all(-1)
            inside = inside.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).any(-1)
            missing = whole & inside
        around = _around(inside.to(dtype))  # 0 for an image of one pixel
        scale = torch.where(inside & (around > 0), around, 1)
        found.append(_Level(missing.to(dtype), scale))
    return found


def _around(values: Tensor) -> Tensor:
    """Sum of the eight neighbours, sides with weight 1/6, corners with 1/12, nothing beyond the border."""
    wide = functional.pad(values, (1, 1, 1, 1))
    rows = wide[..., :-2] + 2 * wide[..., 1:-1] + wide[..., 2:]
    return (rows[..., :-2, :] + 2 * rows[..., 1:-1, :] + rows[..., 2:, :] - 4 * values) / 12


def _applied(values: Tensor, level: _Level) -> Tensor:
    return (level.scale * values - _around(values)) * level.missing


def _smoothed(found: Tensor, residual: Tensor, level: _Level, count: int) -> Tensor:
    for _ in range(count):
        found = found + _DAMPING * (residual - _applied(found, level)) / level.scale * level.missing
    return found


def _cycle(residual: Tensor, levels: list[_Level]) -> Tensor:
    """An approximate solution for a right-hand side; linear, symmetric and positive."""
    level = levels[0]
    found = _DAMPING * residual / level.scale * level.missing
    if len(levels) == 1:
        return _smoothed(found, residual, level, _COARSEST_SMOOTHS)
    found = _smoothed(found, residual, level, _SMOOTHS - 1)
    below = _cycle(_down(residual - _applied(found, level)) * levels[1].missing, levels[1:])
    found = found + _up(below) * level.missing
    return _smoothed(found, residual, level, _SMOOTHS)


def _kernel(values: Tensor) -> Tensor:
    taps = values.new_tensor([1, 3, 3, 1]) / 4
    return torch.outer(taps, taps).reshape(1, 1, 4, 4)


def _down(values: Tensor) -> Tensor:
    """The transpose of `_up`."""
    flat = values.flatten(0, 1).unsqueeze(1)
    found = functional.conv2d(flat, _kernel(values), stride=2, padding=1)
    return found.reshape(*values.shape[:2], *found.shape[2:])


def _up(values: Tensor) -> Tensor:
    """Bilinear, between cell centres, towards nothing beyond the border."""
    flat = values.flatten(0, 1).unsqueeze(1)
    found = functional.conv_transpose2d(flat, _kernel(values), stride=2, padding=1)
    return found.reshape(*values.shape[:2], *found.shape[2:])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(N,C,1,1): every channel is a system of its own."""
    return (a * b).sum((2, 3), keepdim=True)
