"""Relative Sectional Propagation's rules, node by node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import grad

from fastcam import ops

from ..nodes import Node, Ref, op_name
from .equilibrium import Equilibrium, shares, winner
from .layer import Geometry, ModifiedWeights, is_weighted, weight_and_bias
from .messages import NoRule, Relevance
from .rules import Pass, ZBox
from .steps import Given, StepView
from .walk import RelevanceWalk, Way, general_way, geometry_in, unsupported, weighted_way

__all__ = ["Sectional"]

_WEIGHT_GRADIENT = (grad.conv1d_weight, grad.conv2d_weight, grad.conv3d_weight)


@dataclass(frozen=True, eq=False)
class Sectional:
    """Chooses how relevance passes each step of a chain of convolutions, activations and pools."""

    def check(self, walk: RelevanceWalk) -> None:
        """As `walk.Composer`: without a convolution below its start there is nothing to walk."""
        if not any(node.kind == "conv" for node in walk.nodes):
            raise ValueError(
                "rsp walks through the convolutions below its start, and there is none below this layer; pass a later "
                "one as layer="
            )

    def way(self, walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
        """As `walk.Composer`."""
        name = op_name(node.target)
        if is_weighted(node):
            if node.index in walk.first and node.kind == "conv":
                return weighted_way(walk, node, active, ZBox(epsilon=0.0))
            return _convolution(walk, node, active)
        if len(active) > 1 or node.kind == "cat":
            raise unsupported(node, "RSP is published for chains of convolutions, without sums and concatenations")
        if name.startswith(("max_pool", "adaptive_max_pool")):
            return Way(winner)
        if node.kind in ("pool", "resize") or name in ("mean", "sum"):
            return Way(shares)
        if name == "batch_norm":
            return Equilibrium().way(walk, node, active)
        kinds = dict.fromkeys(("activation", "add", "pool", "max_pool", "norm", "product"), Pass())
        return general_way(node, active, kinds)


def _convolution(walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
    geometry = geometry_in(walk.program, node)
    source = node.args[0]
    if (
        geometry is None
        or geometry.trailing
        or geometry.transposed
        or geometry.rank == 0
        or not isinstance(source, Ref)
    ):
        raise unsupported(node, "RSP passes convolutions only, padded alike on both sides")

    def take(step: StepView, given: list[Any]) -> Given:
        found = weight_and_bias(node, step.get)
        if found is None:
            raise NoRule("its weight is no matrix")
        weight = found[0]
        x = step.get(source.index).clamp(min=0)
        pointwise = weight.shape[2] == 1
        whole = [one.tensor().to(x.dtype) for one in given]
        return {source.index: [Relevance(_passed(geometry, x, r, weight.shape, pointwise)) for r in whole]}

    return Way(take)


def _passed(geometry: Geometry, x: Tensor, r: Tensor, shape: torch.Size, pointwise: bool) -> Tensor:
    """Relevance at x >= 0: twice what S hands down, less the total in equal parts; at 1 x 1 convolutions just that."""
    if len(x) == 0:
        return torch.zeros_like(x)
    difference = _spread(geometry, x, r.clamp(min=0), shape) - _spread(geometry, x, r.neg().clamp(min=0), shape)
    if pointwise:
        return difference
    entries = difference != 0
    count = entries.flatten(1).sum(1)
    unit = torch.where(count > 0, r.flatten(1).sum(1) / count.clamp(min=1), 0.0)
    return 2 * difference - unit.reshape(-1, *(1,) * (x.ndim - 1)) * entries


def _spread(geometry: Geometry, x: Tensor, q: Tensor, shape: torch.Size) -> Tensor:
    """S(Q) = x t(Q / c(x, G), G), where each image's G is the gradient of <c(x, W), Q> by W: images side by side as
    groups of one convolution."""
    batch = len(x)
    side = replace(geometry, groups=batch * geometry.groups)
    inputs, message = x.reshape(1, -1, *x.shape[2:]), q.reshape(1, -1, *q.shape[2:])
    weight = _WEIGHT_GRADIENT[geometry.rank - 1](
        inputs, (batch * shape[0], *shape[1:]), message, side.stride, side.pads, side.dilation, side.groups
    )
    message = ops.relevance_divide(message, side.apply(inputs, weight), epsilon=0.0)
    return x * side.back(message, weight, inputs.shape, ModifiedWeights()).reshape(x.shape)
