"""Reference of `fastcam.ops.rescale_multipliers`; formulas and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from fastcam._dtypes import accumulation_dtype


def rescale_multipliers(multipliers: Tensor, inputs: Tensor, reference: Tensor, negative_slope: float = 0.0) -> Tensor:
    """As empty_like(multipliers); arguments as checked by the public function."""
    acc = accumulation_dtype(inputs.dtype)
    factor, _, _ = rescale_factor(inputs.to(acc), reference.to(acc), negative_slope)
    return torch.empty_like(multipliers).copy_(multipliers.to(acc) * factor)


def rescale_factor(u: Tensor, r: Tensor, negative_slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """s, where it is a secant's slope, and u - r there (1 elsewhere: no 0 / 0, not even in a gradient of it)."""
    positive, negative = (u > 0) & (r > 0), (u <= 0) & (r <= 0)
    mixed = ~(positive | negative)  # NaN too
    difference = torch.where(mixed, u - r, 1)
    secant = (leaky_relu(u, negative_slope) - leaky_relu(r, negative_slope)) / difference
    return torch.where(mixed, secant, gain(u, negative_slope)), mixed, difference


def gain(x: Tensor, negative_slope: float) -> Tensor:
    """The activation's slope at x."""
    return torch.where(x > 0, x.new_ones(()), negative_slope)
