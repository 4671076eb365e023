"""Relative attributing propagation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastcam.program.nodes import Node
from fastcam.program.relevance import Composite, Norm, Rap, Weighted, ZBox
from fastcam.program.relevance.layer import Layer
from fastcam.program.relevance.messages import Relevance
from fastcam.program.relevance.walk import RelevanceWalk, Way, unsupported, weighted_way

from ._method import Evidence, Method, Passage
from ._relevance import RelevanceOptions, columns, evidence_of, onehot

__all__ = ["METHOD", "RapOptions", "rap"]


@dataclass(frozen=True)
class RapOptions(RelevanceOptions):
    """As `RelevanceOptions`, and

    mirror  layers whose inputs may be negative: "error" · "joint": one divisor for both signs of the input
    """

    mirror: Literal["error", "joint"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mirror not in ("error", "joint"):
            raise ValueError(f"mirror must be 'error' or 'joint'; got {self.mirror!r}")
        self._walked_by(RapRules(joint=self.mirror == "joint"))


@dataclass(frozen=True)
class OutputRule(Weighted):
    """R_i = |x_i w_i| / sum |x w| times the logit, for the row w of the class that the seed names."""

    def prepare(self, layer: Layer) -> None:
        return None

    def send(self, layer: Layer, prepared: None, relevance: Relevance) -> Relevance:
        seed = relevance.tensor()
        chosen = seed.argmax(1)
        products = layer.inputs * layer.weight[chosen]
        total, size = products.sum(1, keepdim=True), products.abs().sum(1, keepdim=True)
        bias = 0.0 if layer.bias is None else layer.bias[chosen].unsqueeze(1)
        score = torch.where(total == 0, 0.0, total + bias)
        return Relevance(torch.where(size == 0, 0.0, products.abs() / torch.where(size == 0, 1.0, size) * score))


@dataclass(frozen=True, eq=False)
class RapRules:
    """Chooses rules: the output layer's own, the box rule at the image, `Rap` between, everything else in
    proportion."""

    joint: bool

    def check(self, walk: RelevanceWalk) -> None:
        if not any(walk.program.nodes[index].kind == "linear" for index in walk.ends):
            raise ValueError("rap starts at a linear output layer, and this network ends otherwise; use method='lrp'")

    def way(self, walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
        if node.kind == "linear" and node.index in walk.ends:
            return weighted_way(walk, node, active, OutputRule())
        plain = _REST.way(walk, node, active)
        if node.kind in ("conv", "linear") and node.index not in walk.first and not self.joint:
            source = node.args[0].index
            if source not in walk.nonnegative:
                raise unsupported(node, "its inputs may be negative; pass mirror='joint'")
        return plain


_REST = Composite(conv=Rap(), linear=Rap(), first=ZBox(epsilon=0.0), add=Norm(epsilon=0.0), pool=Norm(epsilon=0.0))


def rap(passage: Passage, options: RapOptions) -> Evidence:
    """Relative attributing propagation: positive and negative influence of every unit, totals kept in every layer.

    Output layer, class c, products c_i = x_i w_ci:   R_i = |c_i| / sum |c| y_c
    Below, with p = c(x, W+), n = c(x, |W-|), x >= 0, guarded division, R+ = max(R, 0), R- = min(R, 0):
        convolution   C = x t(R+ / p, W+) + x t(R- / n + R / (p + n), |W-|)
        linear layer  C = x t(R / p, W+) + x t(R / (p + n), |W-|)
        R' = C - (sum C - sum R) / m on the m entries of C that are not 0
    At the image the box rule between the least and greatest value of each image; pools and residual sums in proportion;
    batch norms folded, biases left out below the output. The map's total is the logit y_c, up to relevance lost where
    all entries are 0 and in guarded proportions; `Attribution.delta` is the rest.

    Shapes: (B, *spatial); T targets add an axis after B. Errors: as `lrp`; ValueError where the output is not that of a
    linear layer; UnsupportedOpError for a layer whose inputs may be negative (below the image), unless mirror="joint"
    takes both signs under one divisor.
    Cost: the forward pass, and for each layer one modified forward and two transposed convolutions for each target.
    Source: Nam et al., Relative Attributing Propagation, AAAI 2020, arXiv 1904.00605 (re-implemented from the
    equations; residual paths are added up, where the public code multiplies them).
    """
    logits = passage.logits
    seeds: list[Any] = [onehot(logits, chosen) for chosen in columns(passage)]
    given = [logits.gather(1, chosen.unsqueeze(1)).squeeze(1) for chosen in columns(passage)]
    found, layers = passage.relevance(seeds, options.layers)
    return evidence_of(passage, options, found, layers, given)


METHOD = Method(
    "rap",
    "relative influence of pixels, totals kept in every layer",
    "arXiv 1904.00605",
    rap,
    needs="features",
    options=RapOptions,
    pixels=True,
    signed=True,
)
