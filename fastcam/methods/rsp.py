"""Relative Sectional Propagation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcam.program.relevance.equilibrium import start_layer
from fastcam.program.relevance.sectional import Sectional

from ._method import Evidence, Method, Passage
from ._relevance import RelevanceOptions, evidence_of

__all__ = ["METHOD", "RspOptions", "rsp"]


@dataclass(frozen=True)
class RspOptions(RelevanceOptions):
    """As `RelevanceOptions`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reshape_transform is not None:
            raise ValueError("rsp starts at the layer as it is; reshape_transform has no place in it")
        self._walked_by(Sectional(), below=True)


def rsp(passage: Passage, options: RspOptions) -> Evidence:
    """Relevance of a class against the other classes present, walked down by what activations and relevance share.

    Seed, at the features A of the start layer, K channels, for the score y of a target:
        M = A mean_hw(dy/dA), divided by its largest value
    One target an image: R = M. Several, m others: D = m M - sum of the others' M, its positive entries scaled to total
    1, its negative ones to -1; d = their sum over channels, scaled to 2 and -1; R = d / K in every channel.
    k x k convolution, x+ = max(x, 0), R+ and R- the parts of R = R+ - R-, x / 0 = 0:
        G(Q) = the gradient of <c(x+, W), Q> by W,   S(Q) = x+ t(Q / c(x+, G), G)
        C = 2 (S(R+) - S(R-)),   R' = C - 1[C != 0] (sum R) / n,   n the number of entries of C that are not 0
    Convolutions of kernel height 1: R' = S(R+) - S(R-). Convolution of the image: the box rule between the least and
    greatest value of each image. Max pools: to the greatest; average pools: by max(x, 0). Weights and biases take no
    part but through the pass and the seed. map = sum over channels at the image.

    The total of R stays the same from layer to layer, but for shares without a divisor. Everything is counted image by
    image. `targets` (B, T) are the classes present, and every one of them gets a map.

    Shapes: (B, *spatial) at the image's size; T targets add an axis after B.
    Errors: UnsupportedOpError for sums and concatenations of feature maps (the released form has chains only) and for
    steps without a rule; ValueError where no convolution lies below the layer.
    Cost: the forward pass; for each convolution and target two weight gradients and two modified and two transposed
    convolutions, whose weights are each image's own.
    Source: Nam et al., Interpreting Deep Neural Networks with Relative Sectional Propagation by Analyzing Comparative
    Gradients and Hostile Activations, AAAI 2021, arXiv 2012.03434 (the released form, from the equations).
    """
    rank = passage.spatial_rank
    means = passage.gradients().flatten(-rank).mean(-1)
    features = passage.features
    maps = []
    for mean in means.unbind(1) if passage.targets.several else [means]:
        product = features * mean.reshape(*mean.shape, *(1,) * rank)
        largest = product.flatten(1).amax(1) if len(product) else product.new_ones(0)
        maps.append(product / _each(torch.where(largest > 0, largest, 1.0), product))
    seeds = maps if len(maps) == 1 else _contrasted(maps)
    found, layers = passage.relevance(seeds, options.layers)
    return evidence_of(passage, options, found, layers, None)


def _contrasted(maps: list[Tensor]) -> list[Tensor]:
    """Each class against the others present."""
    total = torch.stack(maps).sum(0)
    seeds = []
    for one in maps:
        difference = _scaled((len(maps) - 1) * one - (total - one), 1.0)
        seed = _scaled(difference.sum(1, keepdim=True), 2.0) / one.shape[1]
        seeds.append(seed.expand_as(one).contiguous())
    return seeds


def _scaled(x: Tensor, positive: float) -> Tensor:
    """Positive entries of each image scaled to that total, negative ones to -1; none stay none."""
    found = torch.zeros_like(x)
    for part, total in ((x.clamp(min=0), positive), (x.clamp(max=0), 1.0)):
        size = part.flatten(1).abs().sum(1)
        found += part * _each(torch.where(size > 0, total / size, 0.0), x)
    return found


def _each(number: Tensor, like: Tensor) -> Tensor:
    return number.reshape(-1, *(1,) * (like.ndim - 1))


METHOD = Method(
    "rsp",
    "a class against the others present, walked down by what activations and relevance share",
    "arXiv 2012.03434",
    rsp,
    needs="features",
    options=RspOptions,
    pixels=True,
    signed=True,
    start=start_layer,
    certainty=(
        "rules as in the authors' public code, for chains of convolutions; sums are taken image by image, and the "
        "paper's purging mask, which that code does not apply, is left out"
    ),
)
