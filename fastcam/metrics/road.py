"""ROAD: scores while pixels are removed so that the hole cannot be seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcam import ops
from fastcam.methods._perturb import check_seed
from fastcam.program.targets import TargetSpec

from ._trial import Output, Trial, check_fractions, ranks_of, trial
from .curves import Curve

__all__ = ["both_curves", "combined", "road", "road_curve"]

_FRACTIONS = tuple(n / 10 for n in range(1, 10))


def road_curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    order: Literal["most", "least"] = "most",
    fractions: Sequence[float] = _FRACTIONS,
    noise: float = 0.01,
    output: Output = "probability",
    chunk: int = 32,
    seed: int = 0,
) -> Curve:
    """Scores against the share of pixels removed and imputed, the most or the least relevant first.

        removed at share f: the P - ceil((P - 1) (1 - f)) highest (order "most") or lowest ("least") of P pixels, as
        many as are not below numpy's (1 - f) quantile of P different values. Each becomes the weighted mean of its
        neighbours (`ops.impute_linear`) plus normal noise

    images     (B, C, H, W) as the model expects them
    maps       (B, H, W) or (B, T, H, W); only the order of their values counts, of equal ones the first in row order
               comes first. Other sizes are resized bilinearly
    order      "most": relevant first, lower scores are better · "least": higher scores are better
    fractions  of the pixels, ascending within [0, 1]
    noise      its standard deviation, in the images' units; drawn from `seed`, the same for all images
    The other arguments, errors and NaNs are those of `insertion_deletion`; images must be two-dimensional.

    Cost: len(fractions) + 1 forward passes and len(fractions) imputations an image and target.
    Source: Rong et al. 2022; pixels and neighbours as in its released code.
    """
    shares = _checked(order, fractions, noise, seed, images)
    with trial(model, images, maps, targets, output, chunk) as case:
        return _curve(case, shares, order, noise, seed)


def road(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    fractions: Sequence[float] = _FRACTIONS,
    noise: float = 0.01,
    output: Output = "probability",
    chunk: int = 32,
    seed: int = 0,
) -> Tensor:
    """(B,) or (B, T) float64: how much more the score suffers when relevant pixels go than when irrelevant ones do.

        mean over fractions of (score with the least relevant removed - score with the most relevant removed) / 2

    In [-1/2, 1/2] for probabilities; higher is better; about 0 for a random map. Arguments and errors: `road_curve`.
    Cost: 2 len(fractions) + 1 forward passes and 2 len(fractions) imputations an image and target.
    Source: Rong et al. 2022; combined as pytorch-grad-cam's ROADCombined.
    """
    settings: dict[str, Any] = {"fractions": fractions, "noise": noise, "output": output, "chunk": chunk, "seed": seed}
    return combined(*both_curves(model, images, maps, targets, **settings))


def both_curves(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec,
    *,
    fractions: Sequence[float] = _FRACTIONS,
    noise: float = 0.01,
    output: Output = "probability",
    chunk: int = 32,
    seed: int = 0,
) -> tuple[Curve, Curve]:
    """`road_curve` of both orders, most relevant first; the image itself is run once."""
    shares = _checked("most", fractions, noise, seed, images)
    with trial(model, images, maps, targets, output, chunk) as case:
        return _curve(case, shares, "most", noise, seed), _curve(case, shares, "least", noise, seed)


def combined(most: Curve, least: Curve) -> Tensor:
    return (least.scores.mean(-1) - most.scores.mean(-1)) / 2


def _checked(order: str, fractions: Sequence[float], noise: float, seed: int, images: Tensor) -> tuple[float, ...]:
    if order not in ("most", "least"):
        raise ValueError(f"order must be 'most' or 'least'; got {order!r}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a finite standard deviation; got {noise!r}")
    check_seed(seed)
    if isinstance(images, Tensor) and images.ndim != 4:
        raise ValueError(f"ROAD imputes images (B, C, H, W); got shape {tuple(images.shape)}")
    return check_fractions(fractions)


def _curve(case: Trial, shares: tuple[float, ...], order: str, noise: float, seed: int) -> Curve:
    images = case.images
    pixels = math.prod(images.shape[2:])
    counts = torch.tensor([pixels - _below(pixels, share) for share in shares], device=images.device)
    ranks = ranks_of(case.maps if order == "most" else -case.maps).reshape(len(images), *images.shape[2:])
    drawn = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grain = (noise * drawn).to(images)

    def perturb(rows: slice, steps: slice) -> Tensor:
        missing = (ranks[rows].unsqueeze(1) < counts[steps].reshape(-1, 1, 1)).flatten(0, 1)
        each = images[rows].repeat_interleave(len(counts[steps]), 0)
        filled = ops.impute_linear(each, missing)
        filled = torch.where(missing.unsqueeze(1), filled + grain, filled)
        return filled.unflatten(0, (-1, len(counts[steps])))

    levels = case.sweep(len(shares), perturb, case.level)
    fractions = torch.tensor(shares, dtype=torch.float64, device=images.device)
    return Curve(fractions, case.shaped(case.scores(levels)))


def _below(pixels: int, share: float) -> int:
    """How many of `pixels` different values lie below their (1 - share) quantile; a rounding error must not add one."""
    return math.ceil((pixels - 1) * (1 - share) - 1e-7)
