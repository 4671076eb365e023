"""How alike two vectors a row are, and how concentrated one is: coefficients, SHAP values, flattened maps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["rank_correlation", "shap_agreement", "sparsity"]


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """(...,) float64 in [-1, 1]: Spearman's correlation of a (..., n) and b (..., n).

        Pearson's correlation of the ranks; equal values share the mean of their ranks

    NaN where either is constant or holds NaN. Raises ValueError for different shapes. For maps: flatten them first.
    """
    _check_pair(a, b)
    left, right = (_ranks(each) for each in (a, b))
    found = (left * right).sum(-1) / (left.square().sum(-1) * right.square().sum(-1)).sqrt()
    return torch.where(a.isnan().any(-1) | b.isnan().any(-1), math.nan, found)


def shap_agreement(weights: Tensor, shap: Tensor, *, kind: Literal["cosine", "rank"] = "cosine") -> Tensor:
    """(...,) float64 in [-1, 1]: how near channel coefficients come to the SHAP values of the feature maps.

    weights  (..., K), as `Attribution.weights`
    shap     (..., K), as the weights of `shap_cam`
    kind     "cosine": of the vectors · "rank": of their ranks (Spearman)

    NaN where a vector is zero, or constant for "rank", or holds NaN. Higher is better. Slopes (Grad-CAM, XGrad-CAM:
    score per activation) are in other units than SHAP values (score), and the cosine sees that. SHAP values of many
    channels are estimates: their own error bounds the agreement from above.
    Raises ValueError for different shapes or an unknown kind. Source: Jung & Oh 2021 (LIFT-CAM).
    """
    if kind not in ("cosine", "rank"):
        raise ValueError(f"kind must be 'cosine' or 'rank'; got {kind!r}")
    if kind == "rank":
        return rank_correlation(weights, shap)
    _check_pair(weights, shap)
    left, right = weights.double(), shap.double()
    return (left * right).sum(-1) / (left.norm(dim=-1) * right.norm(dim=-1))


def sparsity(maps: Tensor) -> Tensor:
    """(...,) float64 in [0, 1): Gini index of a map's magnitudes, 0 for a constant map, 1 - 1/n for a single pixel.

        sum_i (2 i - n - 1) v_i / (n sum_i v_i),  v = |R| in ascending order, i = 1 ... n

    maps  (..., H, W)
    NaN where a map is zero everywhere or holds NaN. Higher is sparser, which is easier to read and not more faithful.
    Source: Chalasani et al. 2020.
    """
    if not isinstance(maps, Tensor) or not maps.is_floating_point() or maps.ndim < 2 or 0 in maps.shape[-2:]:
        what = f"{maps.dtype} {tuple(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps must be floating point (..., H, W); got {what}")
    values = maps.flatten(-2).double().abs().sort(-1).values
    n = values.shape[-1]
    place = torch.arange(1, n + 1, dtype=torch.float64, device=maps.device)
    return ((2 * place - n - 1) * values).sum(-1) / (n * values.sum(-1))


def _ranks(values: Tensor) -> Tensor:
    """Ranks about their mean, equal values sharing one."""
    found, order = values.sort(dim=-1, stable=True)
    place = torch.arange(values.shape[-1], dtype=torch.float64, device=values.device).expand_as(found)
    new = torch.ones_like(found, dtype=torch.bool)
    new[..., 1:] = found[..., 1:] != found[..., :-1]
    first = torch.where(new, place, 0).cummax(-1).values
    final = torch.cat([new[..., 1:], new[..., :1]], -1)  # the last of its equals; the very last always is
    last = torch.where(final, place, math.inf).flip(-1).cummin(-1).values.flip(-1)
    shared = (first + last) / 2 - (values.shape[-1] - 1) / 2
    return torch.empty_like(shared).scatter_(-1, order, shared)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.ndim < 1 or a.shape[-1] < 1:
        given = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in (a, b)]
        raise ValueError(f"both must be tensors of one shape (..., n); got {given[0]} and {given[1]}")
