"""What a Rescale rule is given and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nodes import Node, map_refs
from ..transpose import Cotangent

__all__ = ["Cotangents", "Rule", "Step"]

Cotangents = dict[int, Cotangent]


@dataclass(frozen=True)
class Step:
    """A step of the network, as a rule sees it.

    node       the step; `node.args` name values by `Ref(index)`
    active     indices of the values it reads that multipliers are wanted for
    target     values of the pass on the images, by index
    reference  values of the pass on the reference, by index; their batch may be 1, for all images
    shapes     shapes of the active values in the target pass
    """

    node: Node
    active: frozenset[int]
    target: Mapping[int, Any]
    reference: Mapping[int, Any]
    shapes: Mapping[int, torch.Size]

    def operand(self, position: int = 0) -> tuple[Any, Any]:
        """Argument `position` in both passes."""
        argument = self.node.args[position]
        return map_refs(argument, self.target.__getitem__), map_refs(argument, self.reference.__getitem__)

    def result(self) -> tuple[Any, Any]:
        """The step's result in both passes."""
        return self.target[self.node.index], self.reference[self.node.index]

    def constant(self, position: int, default: Any = None) -> Any:
        """Argument `position` where it is no activation, or `default` where it was left out."""
        args = self.node.args
        return map_refs(args[position], self.target.__getitem__) if len(args) > position else default

    def source(self, position: int = 0) -> int:
        """Index of the value that argument `position` names."""
        return self.node.args[position].index

    def run(self, value: Tensor) -> Any:
        """The step's own operator with another first argument."""
        get = self.target.__getitem__
        return self.node.target(value, *map_refs(self.node.args[1:], get), **map_refs(self.node.kwargs, get))


@dataclass(frozen=True)
class Rule:
    """How multipliers pass a step.

    apply   (step, multipliers at the result) -> multipliers at each active value the step reads, by index
    inputs  whether it reads the step's active inputs in both passes
    output  whether it reads the step's result in both passes
    """

    apply: Callable[[Step, Any], Cotangents]
    inputs: bool = True
    output: bool = False

    def keeps(self, node: Node, active: Iterable[int]) -> set[int]:
        """Indices of the values it will read."""
        return (set(active) if self.inputs else set()) | ({node.index} if self.output else set())
