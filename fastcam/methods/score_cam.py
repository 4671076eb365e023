"""Score-CAM and what it became: SS-CAM and IS-CAM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype
from fastcam.ops.mask_by_features import ORDERS

from ._masks import MaskedImages
from ._method import CamOptions, Evidence, Method, Passage
from ._perturb import check_count, distinct, perturbed_scores

__all__ = ["IS_CAM", "SCORE_CAM", "SS_CAM", "IsCamOptions", "ScoreCamOptions", "SsCamOptions"]
__all__ += ["is_cam", "score_cam", "ss_cam"]


@dataclass(frozen=True)
class ScoreCamOptions(CamOptions):
    """As `CamOptions`, and

    chunk          masked images in one forward pass
    weight_norm    "softmax" over channels, or "none": the scores themselves. Over raw scores softmax is nearly one-hot
                   on networks of many channels; a probability as a callable target with "none" is the alternative
    align_corners  how feature maps are resized to masks, before they are scaled; pytorch-grad-cam's way is True
    order          of resizing a feature map to the images' size and min-max scaling it: "resize_then_minmax" or
                   "minmax_then_resize", whose masks need not reach 0 and 1
    """

    chunk: int = 32
    weight_norm: Literal["softmax", "none"] = "softmax"
    order: Literal["resize_then_minmax", "minmax_then_resize"] = "resize_then_minmax"
    align_corners: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk", self.chunk)
        _check_choice("weight_norm", self.weight_norm, ("softmax", "none"))
        _check_choice("order", self.order, ORDERS)
        if self.align_corners and self.order != "resize_then_minmax":
            raise ValueError(f"align_corners=True goes with order='resize_then_minmax'; got order={self.order!r}")


@dataclass(frozen=True)
class SsCamOptions(ScoreCamOptions):
    """As `ScoreCamOptions`, and

    n          noisy masks for each map
    noise_std  standard deviation of the noise; masks are in [0, 1]
    seed       of the noise
    """

    n: int = 35
    noise_std: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n", self.n)
        number = isinstance(self.noise_std, (int, float)) and not isinstance(self.noise_std, bool)
        if not (number and 0 <= self.noise_std < math.inf):
            raise ValueError(f"noise_std must be a finite number of at least 0; got {self.noise_std!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer; got {self.seed!r}")


@dataclass(frozen=True)
class IsCamOptions(ScoreCamOptions):
    """As `ScoreCamOptions`, and

    n         scaled masks for each map
    schedule  their scales c_i, i = 1..n: "torchcam": i (i + 1) / (2 n), which reach (n + 1) / 2 · "linear": i / n
    """

    n: int = 10
    schedule: Literal["torchcam", "linear"] = "torchcam"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n", self.n)
        _check_choice("schedule", self.schedule, ("torchcam", "linear"))


def score_cam(passage: Passage, options: ScoreCamOptions) -> Evidence:
    """Channels weighted by the score of the image seen through them.

    H_k = minmax(resize(A_k));    s_k = y(x * H_k);    alpha = softmax_k(s);    M = relu(sum_k alpha_k A_k)

    No gradient is involved. The mask of a flat map is zero. Subtracting the score of any fixed baseline from s, as the
    paper does, changes nothing under softmax and is left out.

    Shapes: A (B, K, *spatial), alpha (B, K), M (B, *spatial); T targets add an axis after B.
    Errors: ValueError or TypeError for an option out of range.
    Cost: K forward passes an image, `chunk` at a time, for all targets together; an image's flat maps share one.
    Memory: that of a forward pass on `chunk` images, whatever K is. The passes are run with batch norms folded into
    the convolutions and weights packed where the network is captured, which is equal to rounding and keeps a second
    copy of the weights between the calls of an explainer. One synchronisation on accelerators, before the passes.
    Source: Wang et al., Score-CAM, CVPR workshops 2020, arXiv 1910.01279, sec. 3.
    """
    return _weighted(passage, options, [1.0])


def ss_cam(passage: Passage, options: SsCamOptions) -> Evidence:
    """Score-CAM with scores averaged over noisy masks.

    s_k = 1/n sum_i y(x * (H_k + e_i)),  e_i ~ N(0, noise_std^2) at each pixel;    H, alpha and M as in `score_cam`

    The n draws are the same for all maps and images: an image's map depends on nothing else in its batch nor on
    `chunk`, and maps are compared under the same noise. That is a choice; the paper's sentence also admits a draw for
    each map, which estimates the same mean with more variance between maps.

    Shapes and errors: as `score_cam`.
    Cost and memory: n times the forward passes of `score_cam`, in the memory of one of them and n noise images.
    Source: Wang et al., SS-CAM: Smoothed Score-CAM, arXiv 2006.14255, the variant with noise on the maps; n and
    noise_std are torch-cam's defaults.
    """
    generator = torch.Generator().manual_seed(options.seed)
    size = (options.n, *passage.images.shape[2:])
    # Drawn on the CPU, so that all devices see the same noise.
    noise = options.noise_std * torch.randn(size, generator=generator, dtype=torch.float64)
    return _weighted(passage, options, [1.0] * options.n, noise)


def is_cam(passage: Passage, options: IsCamOptions) -> Evidence:
    """Score-CAM with scores averaged over masks of growing strength.

    s_k = 1/n sum_i y(c_i x * H_k),  c_i = i (i + 1) / (2 n) or i / n;    H, alpha and M as in `score_cam`

    The paper's integral from 0 to 1 is the schedule "linear"; "torchcam" adds i / n to the scale at each step, as that
    library does, whose masks thus reach (n + 1) / 2.

    Shapes and errors: as `score_cam`.
    Cost and memory: n times the forward passes of `score_cam`, in the memory of one of them.
    Source: Naidu et al., IS-CAM: Integrated Score-CAM, arXiv 2010.03023; torch-cam, ISCAM, for the default schedule.
    """
    n = options.n
    linear = options.schedule == "linear"
    return _weighted(passage, options, [i / n if linear else i * (i + 1) / (2 * n) for i in range(1, n + 1)])


def _weighted(
    passage: Passage, options: ScoreCamOptions, scales: Sequence[float], noise: Tensor | None = None
) -> Evidence:
    """Scores averaged over `scales`, each with its row of `noise` (n, *spatial), and made into coefficients."""
    images, features = passage.images, passage.features
    batch, channels = features.shape[:2]
    masked = MaskedImages(images, features, options.order, options.align_corners)
    low, high = torch.aminmax(features.flatten(2), dim=2)
    # No mask changes an image of zeros.
    dark = (images == 0).flatten(1).all(1, keepdim=True)
    only = distinct(((low == high) & low.isfinite()) | dark)
    noise = None if noise is None else noise.to(device=images.device, dtype=masked.dtype)
    total: Tensor | None = None
    for i, scale in enumerate(scales):
        drawn = None if noise is None else noise[i]

        def run(start: int, count: int, drawn: Tensor | None = drawn, scale: float = scale) -> Any:
            return passage.output_of(masked.chunk(start, count, only, drawn, scale), folded=True)

        found = perturbed_scores(run, passage.targets, batch, channels, options.chunk, passage.layer, only)
        total = found if total is None else total + found
    assert total is not None
    scores = (total / len(scales)).to(accumulation_dtype(features.dtype))
    return Evidence(weights=scores.softmax(-1) if options.weight_norm == "softmax" else scores)


def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")


SCORE_CAM = Method(
    "score_cam",
    "channels weighted by the score of the image seen through them",
    "arXiv 1910.01279, sec. 3",
    score_cam,
    needs="features",
    options=ScoreCamOptions,
)
SS_CAM = Method(
    "ss_cam",
    "Score-CAM averaged over noisy masks",
    "arXiv 2006.14255",
    ss_cam,
    needs="features",
    options=SsCamOptions,
)
IS_CAM = Method(
    "is_cam",
    "Score-CAM averaged over masks of growing strength",
    "arXiv 2010.03023",
    is_cam,
    needs="features",
    options=IsCamOptions,
)
