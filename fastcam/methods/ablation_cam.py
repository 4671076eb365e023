"""Ablation-CAM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastcam import ops
from fastcam._dtypes import accumulation_dtype

from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage
from ._perturb import check_count, edited_scores

__all__ = ["METHOD", "AblationCamOptions", "ablation_cam"]


@dataclass(frozen=True)
class AblationCamOptions(CamOptions):
    """As `CamOptions`, and

    fill    what an ablated map is replaced by: a number, or "mean" for the mean of that map in that image
    divide  divide the coefficients by |y|; they stay undivided where y = 0
    chunk   edited feature maps in one pass through the head
    """

    fill: float | Literal["mean"] = 0.0
    divide: bool = False
    chunk: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.fill, (int, float)) and not isinstance(self.fill, bool)
        if self.fill != "mean" and not (number and math.isfinite(float(self.fill))):
            raise ValueError(f"fill must be a finite number or 'mean'; got {self.fill!r}")
        if not isinstance(self.divide, bool):
            raise TypeError(f"divide must be True or False; got {self.divide!r}")
        check_count("chunk", self.chunk)


def ablation_cam(passage: Passage, options: AblationCamOptions) -> Evidence:
    """Channels weighted by what the score loses without them.

    alpha_k = y - y_k;    M = relu(sum_k alpha_k A_k)

    with y_k the score when map k is replaced by `fill`, all other maps as they are. With `divide` alpha_k is divided by
    |y|, which leaves the normalised map as it is. A map that equals its replacement has alpha_k = 0 exactly. On heads
    that average over positions "mean" changes no score, and all maps are zeros.

    Where the head is affine and the score is a class, y_k is not computed: alpha_k = sum_ij G_k (A_k - fill), with G
    the gradient of the score, a constant of the weights.

    Shapes: A (B, K, *spatial), alpha (B, K), M (B, *spatial); T targets add an axis after B.
    Errors: ValueError or TypeError for a fill that is no finite number or "mean", or a chunk below 1.
    Cost: the forward pass; closed form where the head is affine. Else K passes of each image through the head, `chunk`
    at a time, all targets at once; maps that equal their replacement share one. A network that is explained through a
    hook cannot run its head alone: there they are whole passes.
    Source: Desai and Ramaswamy, Ablation-CAM, WACV 2020, sec. 3, where the division by y stands for a slope that does
    not depend on the score's scale; here it is an option, since its sign would turn the map of a negative score over.
    """
    if passage.linear and passage.targets.indices is not None:
        weights = _closed_form(passage, options.fill)
    else:
        replacement = _means(passage.features) if options.fill == "mean" else float(options.fill)
        scores = edited_scores(passage, replacement, options.chunk)
        weights = passage.scores().unsqueeze(-1).to(scores.dtype) - scores
    if options.divide:
        score = passage.scores().to(weights.dtype).abs().unsqueeze(-1)
        weights = weights / torch.where(score == 0, 1, score)
    return Evidence(weights=weights)


def _closed_form(passage: Passage, fill: float | Literal["mean"]) -> Tensor:
    features, rank = passage.features, passage.spatial_rank
    gradients = passage.gradients()
    if fill == "mean" and passage.uniform:  # sum (A - mean A) = 0, of which arithmetic would leave the rounding
        return gradients.new_zeros(gradients.shape[:-rank])
    base = None
    if fill == "mean":
        base = planar(_means(features), rank)
    elif fill != 0:
        base = planar(features.new_full((1,) * features.ndim, fill).expand(1, *features.shape[1:]), rank)
    return ops.channel_weights(planar(features, rank), planar(gradients, rank), base, mode="sum")


def _means(features: Tensor) -> Tensor:
    """(B, K, *spatial), the same at every position."""
    positions = tuple(range(2, features.ndim))
    wide = features.mean(positions, keepdim=True, dtype=accumulation_dtype(features.dtype))
    return wide.to(features.dtype).expand_as(features)


METHOD = Method(
    "ablation_cam",
    "channels weighted by what the score loses without them",
    "WACV 2020, Desai and Ramaswamy, sec. 3",
    ablation_cam,
    needs="closed_form",
    options=AblationCamOptions,
)
