"""Relevance-CAM: feature maps weighted by their relevance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from fastcam import ops
from fastcam.program.relevance import Composite, Norm, ZBox, ZPlus
from fastcam.program.relevance.layer import Layer

from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage
from ._relevance import RelevanceOptions, Seed, onehot_columns, stacked

__all__ = ["METHOD", "RelevanceCamOptions", "relevance_cam"]


@dataclass(frozen=True)
class RelevanceCamOptions(CamOptions, RelevanceOptions):
    """As `CamOptions` (but relu is False) and `RelevanceOptions`, and

    seed  relevance at the logits: "contrast" (1 at the target, -1/C elsewhere), "onehot" or "logit"
    bias  "zero": biases take no part · "include": positive biases absorb relevance · "release": as in the authors'
          public code, which adds a convolution's bias to its divisor twice; batch norms, not folded, pass relevance on
    """

    relu: bool = False
    seed: Seed = "contrast"
    bias: Literal["include", "zero", "release"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias not in ("include", "zero", "release"):
            raise ValueError(f"bias must be 'include', 'zero' or 'release'; got {self.bias!r}")
        if self.seed not in ("contrast", "onehot", "logit"):
            raise ValueError(f"seed must be 'contrast', 'onehot' or 'logit'; got {self.seed!r}")
        rules = guarded(bias=self.bias == "include")
        if self.bias == "release":
            rules = replace(rules, conv=BiasedTwice(bias=False, epsilon=0.0))
        self._walked_by(rules, folded=self.bias != "release")


@dataclass(frozen=True)
class BiasedTwice(ZPlus):
    """z+ with the bias, of whatever sign, in both halves of the divisor: c(x+, W+) + b + c(x-, W-) + b."""

    def prepare(self, layer: Layer) -> Tensor:
        bias = None if layer.bias is None else 2 * layer.bias
        return layer.forward(layer.parts, layer.split("positive"), bias)


def guarded(bias: bool = False, **rules: Any) -> Composite:
    """z+ with guarded divisions (x / 0 = 0) everywhere; the box rule between each image's bounds at the image."""
    plus = ZPlus(bias=bias, epsilon=0.0)
    return Composite(
        conv=plus, linear=plus, first=ZBox(epsilon=0.0), add=Norm(epsilon=0.0), pool=Norm(epsilon=0.0), **rules
    )


def relevance_cam(passage: Passage, options: RelevanceCamOptions) -> Evidence:
    """Feature maps weighted by the mean relevance of each, walked down from the logits to the layer.

        w_k = mean over positions of R_k;   M = sum_k w_k A_k

    with R from the seed (1 at the target, -1/C at the other classes) by z+ in every convolution and linear layer, one
    joint divisor for both signs of the inputs, and in proportion at residual sums and average pools; there is no ReLU
    at the end. `layer=` any layer, early ones too; at one where relevance meets only non-negative inputs and no biases
    the total of R is 1/C.

    Shapes: A, R (B, K, *spatial); w (B, K) in `Attribution.weights`; M (B, *spatial); T targets add an axis after B.
    Errors: as `lrp`; ValueError for a single class.
    Cost: the forward pass; behind the layer one modified forward and a transposed pass for each target.
    Source: Lee et al., Relevance-CAM, CVPR 2021, eq. 6-9 (no public licence; from the equations).
    """
    found, layers = passage.relevance(onehot_columns(passage, options.seed), options.layers)
    relevance = stacked(passage, found)
    features = planar(passage.features, passage.spatial_rank)
    weights = ops.channel_weights(features, planar(relevance, passage.spatial_rank), mode="mean")
    extra: dict[str, Any] = {}
    if options.layers:
        extra["layers"] = {name: stacked(passage, many) for name, many in layers.items()}
    if options.return_relevance:
        extra["relevance"] = relevance
    return Evidence(weights=weights, extra=extra)


METHOD = Method(
    "relevance_cam",
    "feature maps weighted by their z+ relevance, at any layer",
    "Lee et al., CVPR 2021",
    relevance_cam,
    needs="features",
    options=RelevanceCamOptions,
)
