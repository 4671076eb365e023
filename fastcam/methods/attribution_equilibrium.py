"""Attribution Equilibrium."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from fastcam._tracing import tracing
from fastcam.program.relevance.equilibrium import Equilibrium, start_layer

from ._method import Evidence, Method, Passage
from ._relevance import RelevanceOptions, evidence_of

__all__ = ["METHOD", "EquilibriumOptions", "attribution_equilibrium"]


@dataclass(frozen=True)
class EquilibriumOptions(RelevanceOptions):
    """As `RelevanceOptions`, and

    ratio      r in [1, 2]: positive over negative budget at every k x k convolution; 2 is equilibrium
    residual   "branch": relevance of a residual sum goes down the branch alone, as released · "proportional": to both
               operands by their magnitudes, put together where they meet
    concat     "release": at concatenations the relevance of zero activations, and of a dense block's input, is dropped
               · "slice": nothing is dropped
    pointwise  which convolutions follow the 1 x 1 rule: "height": those of kernel height 1, as released · "all": those
               of a single element
    threshold  what an activation must exceed to be active; above 0 for networks whose activations (SiLU, GELU) are
               seldom exactly 0
    """

    ratio: float = 2.0
    residual: Literal["branch", "proportional"] = "branch"
    concat: Literal["release", "slice"] = "release"
    pointwise: Literal["height", "all"] = "height"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reshape_transform is not None:
            raise ValueError(
                "attribution_equilibrium starts at the layer as it is; reshape_transform has no place in it"
            )
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 1 <= self.ratio <= 2:
            raise ValueError(f"ratio must lie in [1, 2]; got {self.ratio!r}")
        for name, known in (
            ("residual", ("branch", "proportional")),
            ("concat", ("release", "slice")),
            ("pointwise", ("height", "all")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}; got {getattr(self, name)!r}")
        if not (isinstance(self.threshold, (int, float)) and math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold must be a finite number, not negative; got {self.threshold!r}")
        rules = Equilibrium(float(self.ratio), self.residual, self.concat, self.pointwise, float(self.threshold))
        self._walked_by(rules, below=True)


def attribution_equilibrium(passage: Passage, options: EquilibriumOptions) -> Evidence:
    """Two budgets of relevance, positive and negative, kept in balance from the last feature map down to the pixels.

    Seed, at the features A of the start layer, for the logit y (what a softmax at the end of the network reads):
        R = A mean_hw(dy/dA), divided by |sum R|
    k x k convolution, x its input, V = |W|, budgets p = sum max(R, 0), q = sum max(-R, 0), x / 0 = 0 throughout:
        P = max(R, 0) / p,  N = min(R, 0) / q,  S(u, Q) = u t(Q / c(u, V), V)
        C  = S(max(x, 0), ratio P + N)
        R' = C - 1[C != 0] / n + S(1[x > 0], P) + S(1[x <= 0], N),   n the number of entries of C that are not 0
    1 x 1 convolution: R' = S(max(x, 0), P + N) + S(1[x > 0], P) + S(1[x <= 0], N). Convolution of the image: the box
    rule between the least and greatest value of each image. Max pools: to the greatest; average pools: by max(x, 0);
    batch norms are folded. Biases take no part. map = sum over channels at the image.

    The map is signed, its total ratio - 2 on chains of k x k convolutions; normalised, it is divided by its largest
    magnitude. Everything is counted image by image, unlike the public code, which adds up over the batch; on residual
    networks that code's maps are twice these. Where an image has no negative (or no positive) relevance that budget is
    0 and, without a positive one, nothing is shifted.

    `layer` is where the walk starts; None: the last activation before the final pooling (AlexNet: after its last pool,
    DenseNet: before its last ReLU).
    Shapes: (B, *spatial) at the image's size; T targets add an axis after B.
    Errors: ValueError for options out of range and where no convolution lies below the layer; UnsupportedOpError for a
    step without a rule (attention, layer norms).
    Cost: the forward pass; for each convolution three modified and, for each target, three transposed convolutions. On
    CPUs, but for half types, two modified ones do: c(1[x <= 0], V) is c(1, V), kept from call to call, less c(1[x > 0],
    V), which costs digits where next to nothing is inactive.
    Source: Nam & Lee, Illuminating Salient Contributions in Neuron Activation with Attribution Equilibrium, IEEE TPAMI
    2024, DOI 10.1109/TPAMI.2024.3485775; rules as in the authors' public code, re-implemented from the equations.
    """
    rank = passage.spatial_rank
    gradients = passage.gradients()
    means = gradients.flatten(-rank).mean(-1)
    features = passage.features
    seeds = []
    for mean in means.unbind(1) if passage.targets.several else [means]:
        seed = features * mean.reshape(*mean.shape, *(1,) * rank)
        total, size = seed.flatten(1).sum(1).abs(), seed.flatten(1).abs().sum(1)
        scale = torch.where(total > 1e-12 * size, total, 1.0)
        seeds.append(seed / scale.reshape(-1, *(1,) * (seed.ndim - 1)))
        if seed.device.type == "cpu" and not tracing() and bool((size == 0).any()):
            warnings.warn(
                f"the score's gradient at layer '{passage.layer}' is zero for {int((size == 0).sum())} of {len(size)} "
                "images, whose maps are zero",
                stacklevel=2,
            )
    found, layers = passage.relevance(seeds, options.layers)
    return evidence_of(passage, options, found, layers, None)


METHOD = Method(
    "attribution_equilibrium",
    "signed pixel map in which positive and negative relevance are kept in balance, layer by layer",
    "DOI 10.1109/TPAMI.2024.3485775",
    attribution_equilibrium,
    needs="features",
    options=EquilibriumOptions,
    pixels=True,
    signed=True,
    start=start_layer,
    certainty=(
        "rules as read in the authors' public code; sums taken image by image, guards for budgets that are empty, and "
        "residual='proportional', concat='slice' and threshold are additions"
    ),
)
