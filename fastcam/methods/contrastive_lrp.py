"""Contrastive relevance propagation: what speaks for a class less what speaks for the others (CLRP, SGLRP)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastcam import ops
from fastcam.program.nodes import Node
from fastcam.program.relevance import Weighted
from fastcam.program.relevance.layer import Layer
from fastcam.program.relevance.messages import Relevance
from fastcam.program.relevance.walk import RelevanceWalk, Way, weighted_way

from ._method import Evidence, Method, Passage
from ._relevance import RelevanceOptions, columns, evidence_of, onehot
from .relevance_cam import guarded

__all__ = ["CLRP", "SGLRP", "ClrpOptions", "clrp", "sglrp"]


@dataclass(frozen=True)
class ContrastiveOptions(RelevanceOptions):
    """As `RelevanceOptions`, and

    clip  keep only what is positive of the difference: map -> max(map, 0)
    """

    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._walked_by(guarded())


@dataclass(frozen=True)
class ClrpOptions(ContrastiveOptions):
    """As `RelevanceOptions`, and

    clip  keep only what is positive of the difference: map -> max(map, 0)
    dual  what the target is contrasted with (see `clrp`)
    """

    dual: Literal["uniform", "logits", "negated"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual not in ("uniform", "logits", "negated"):
            raise ValueError(f"dual must be 'uniform', 'logits' or 'negated'; got {self.dual!r}")
        if self.dual == "negated":
            self._walked_by(NegatedRules())


@dataclass(frozen=True)
class BySign(Weighted):
    """R' = x t(max(R, 0) / p, W+) + x t(min(R, 0) / n, W-), p and n the positive and negative contributions: z+ for
    relevance above 0, z+ of the negated weights for relevance below, which stays negative."""

    def prepare(self, layer: Layer) -> tuple[Tensor, Tensor]:
        return layer.positive_contributions(False), layer.forward(layer.parts, layer.split("negative"))

    def send(self, layer: Layer, prepared: tuple[Tensor, Tensor], relevance: Relevance) -> Relevance:
        given = relevance.tensor()
        sides = zip((given.clamp(min=0), given.clamp(max=0)), prepared, strict=True)
        messages = [ops.relevance_divide(r, d, epsilon=0.0) for r, d in sides]
        return Relevance(*layer.merged(layer.send_both(torch.cat(messages, -1), (1.0, 0.0), (0.0, 1.0))))


@dataclass(frozen=True, eq=False)
class NegatedRules:
    """As `guarded`, but relevance below 0 passes a linear output layer as if its weights were negated."""

    def check(self, walk: RelevanceWalk) -> None:
        if not any(walk.program.nodes[index].kind == "linear" for index in walk.ends):
            raise ValueError(
                "dual='negated' negates the weights of a linear output layer, and this network ends otherwise; use "
                "dual='uniform' or 'logits'"
            )

    def way(self, walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
        if node.kind == "linear" and node.index in walk.ends:
            return weighted_way(walk, node, active, BySign())
        return _REST.way(walk, node, active)


_REST = guarded()


def clrp(passage: Passage, options: ClrpOptions) -> Evidence:
    """Relevance of the target less that of a dual concept, scaled to the same total.

        map = L_t - L_o (sum L_t / sum L_o),   sum of the map = 0

    L_t and L_o are walked back together, by guarded z+ without biases, the box rule at the image, from the seeds
        dual "uniform"  L_t: y_c at c;    L_o: y_c / (C - 1) at every other class
        dual "logits"   L_t: |y_c| at c;  L_o: |y_k| at every other class k; both maps divided by their totals first
        dual "negated"  L_t: |y_c| at c;  L_o: |y_c| at c, the weights of the linear output layer negated; likewise
    Where sum L_o is 0 nothing is taken away. `layers` and `extra["relevance"]` are of L_t less L_o, scaled likewise.

    Shapes: (B, *spatial); T targets add an axis after B. Errors: as `lrp`; ValueError for a single class.
    Cost: the forward pass, one modified forward behind it, and two transposed passes for each target.
    Source: Gu et al., Understanding Individual Decisions of CNNs via Contrastive Backpropagation, ACCV 2018; its public
    implementations differ in the seeds, which are the three duals.
    """
    logits = _several_classes(passage)
    seeds: list[Tensor] = []
    for chosen in columns(passage):
        value = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
        if options.dual == "uniform":
            rest = (value / (logits.shape[1] - 1)).unsqueeze(1).expand_as(logits)
            seeds += [onehot(logits, chosen, value), rest - onehot(logits, chosen, rest[:, 0])]
        elif options.dual == "negated":
            target = onehot(logits, chosen, value.abs())
            seeds += [target, -target]
        else:
            size = logits.abs()
            target = onehot(logits, chosen, value.abs())
            seeds += [target, size - target]
    return _contrast(passage, options, seeds, share=options.dual != "uniform")


def sglrp(passage: Passage, options: ContrastiveOptions) -> Evidence:
    """Relevance of the target less that of the other classes as the softmax weighs them.

        map = L_t - L_o (sum L_t / sum L_o),   sum of the map = 0

    as in `clrp`, from the seeds p_c (1 - p_c) + 1e-8 at the target c and p_c p_k at every other class k, p =
    softmax(y): the gradient of p_c. The map depends on the second seed only up to a factor, so it is walked as the
    softmax over the other classes and nothing underflows where p_c is nearly 1.

    Shapes, errors, cost: as `clrp`.
    Source: Iwana et al., Explaining Convolutional Neural Networks using Softmax Gradient LRP, ICCV-W 2019.
    """
    logits = _several_classes(passage)
    seeds: list[Tensor] = []
    for chosen in columns(passage):
        p = logits.softmax(1).gather(1, chosen.unsqueeze(1)).squeeze(1)
        others = logits.scatter(1, chosen.unsqueeze(1), -torch.inf).softmax(1)
        seeds += [onehot(logits, chosen, p * (1 - p) + 1e-8), others]
    return _contrast(passage, options, seeds, share=False)


def _several_classes(passage: Passage) -> Tensor:
    logits = passage.logits
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError("a contrast needs logits of at least two classes, (B, C)")
    return logits


def _contrast(passage: Passage, options: ContrastiveOptions, seeds: list[Tensor], share: bool) -> Evidence:
    found, layers = passage.relevance(seeds, options.layers)
    maps = _less(found, share)
    evidence = evidence_of(passage, options, maps, {name: _less(many, share) for name, many in layers.items()}, None)
    if options.clip:
        assert evidence.projection is not None
        return replace(evidence, projection=evidence.projection.clamp(min=0))
    return evidence


def _less(found: list[Tensor], share: bool) -> list[Tensor]:
    """Relevance of each target less that of its dual."""
    results = []
    for target, dual in zip(found[::2], found[1::2], strict=True):
        total, other = (x.flatten(1).sum(1) for x in (target, dual))
        whole = torch.ones_like(total) if share else total
        scale = torch.where(other == 0, 0.0, whole / torch.where(other == 0, 1.0, other))
        one = target / torch.where(total == 0, 1.0, total).reshape(-1, *(1,) * (target.ndim - 1)) if share else target
        results.append(one - scale.reshape(-1, *(1,) * (target.ndim - 1)) * dual)
    return results


CLRP = Method(
    "clrp",
    "z+ relevance of the target less that of all other classes",
    "Gu et al., ACCV 2018",
    clrp,
    needs="features",
    options=ClrpOptions,
    pixels=True,
    signed=True,
)
SGLRP = Method(
    "sglrp",
    "z+ relevance of the target less that of the other classes, weighed by the softmax's gradient",
    "Iwana et al., ICCV-W 2019",
    sglrp,
    needs="features",
    options=ContrastiveOptions,
    pixels=True,
    signed=True,
)
