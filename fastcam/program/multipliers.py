"""DeepLIFT: multipliers of scores for a pair of passes (target, reference), by one walk backwards through the head.

    sum over the feature map of  m (A - A')  =  y(A) - y(A')

for every network made of steps with a rule (`fastcam.program.rescale`). Nothing is recorded by autograd: the two passes
keep the few values the rules read, and the walk frees them as it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Program
from .execute import Schedule
from .nodes import LEAVES, Node, reads_size_alone
from .rescale import AFFINE, Rule, Step, registered, rule_for, unsupported
from .transpose import Cotangent

__all__ = ["Recorded", "Walk", "accumulate", "one_for_all"]


@dataclass(frozen=True)
class Recorded:
    """One pass through a head, as much of it as the rules read.

    values  by index: what was kept, the weights, the sizes
    shapes  shapes of the tensors that change with the features
    batch   images
    output  the model's output
    """

    values: dict[int, Any]
    shapes: dict[int, torch.Size]
    batch: int
    output: Any


class Walk:
    """The way back through the steps between value `feature` and the outputs of a program.

    Raises UnsupportedOpError where a step has no rule.
    """

    def __init__(self, program: Program, feature: int, head: list[Node], sizes: frozenset[int], packed: bool):
        self._program = program
        self._feature = feature
        self._sizes = sizes
        outputs = program.output_indices
        made = {node.index for node in head}
        self._steps: list[tuple[Node, frozenset[int], Rule]] = []
        keep = {feature} | {node.index for node in head if node.kind == "size"}
        # Values that change with the features, not only with their size.
        self._varies = {feature}
        for node in head:
            varying = self._varies.intersection(node.refs())
            if not varying or node.kind == "size" or reads_size_alone(node, varying):
                continue
            self._varies.add(node.index)
            active = frozenset(ref for ref in varying if _differentiable(program.nodes[ref]))
            if not _differentiable(node):
                continue
            if active != varying and not registered(node):
                (choice, *_) = (program.nodes[ref] for ref in varying - active)
                raise unsupported(node, f"it depends on {choice.name}, a choice that the features make")
            rule = rule_for(node, active)
            keep |= rule.keeps(node, active) | made.intersection(node.refs()) - active
            self._steps.append((node, active, rule))
        self._schedule = Schedule(program, made, frozenset(keep) | outputs, True, packed)

    def record(self, features: Tensor, given: Mapping[int, Any], batch: int) -> Recorded:
        """Run the head on `features`; `given` holds the weights and what else enters the head."""
        values = dict(given)
        values[self._feature] = features
        for index in self._sizes:
            values[index] = batch
        shapes = {self._feature: features.shape}
        self._schedule.run(values, shapes=shapes)
        shapes = {index: shape for index, shape in shapes.items() if index in self._varies}
        return Recorded(values, shapes, batch, self._program.result(values))

    def multipliers(self, target: Recorded, reference: Recorded, seeds: Mapping[int, Tensor]) -> Tensor:
        """(B, K, *spatial) multipliers at the feature map, from those at the outputs by index.

        reference  a pass on as many images, or on one for all of them
        """
        found: dict[int, Cotangent] = dict(seeds)
        for node, active, rule in reversed(self._steps):
            given = found.pop(node.index, None)
            if given is None:
                continue
            if isinstance(given, dict) and rule is not AFFINE and set(given) == {0}:
                given = given[0]  # the other results of a norm or a pool carry no score
            step = Step(node, active, target.values, reference.values, target.shapes)
            try:
                parts = rule.apply(step, given)
            except NotImplementedError as error:
                raise unsupported(node, str(error)) from error
            except Exception as error:
                raise RuntimeError(f"{type(error).__name__}: {error}\nin the DeepLIFT rule of {node}") from error
            for ref, part in parts.items():
                accumulate(found, ref, part)
        result = found.get(self._feature)
        if not isinstance(result, Tensor):
            raise RuntimeError("the score does not depend on the layer")
        return result


def one_for_all(target: Recorded, reference: Recorded) -> bool:
    """Whether a reference of one image lines up with every image of the target, value by value.

    It does not where the network merges the batch with something else, as windows or patches do.
    """
    if reference.batch == target.batch:
        return True
    return all(
        reference.shapes[index][:1] == (1,) and shape[1:] == reference.shapes[index][1:] and shape[0] == target.batch
        for index, shape in target.shapes.items()
        if index in target.values and shape
    )


def _differentiable(node: Node) -> bool:
    """Whether the value may carry multipliers: tensors of floats, and tuples of them."""
    computed = node.kind not in LEAVES - {"input"} and node.kind != "size"
    return computed and (node.dtype is None or node.dtype.is_floating_point)


def accumulate(found: dict[int, Cotangent], ref: int, part: Cotangent) -> None:
    """Add multipliers at value `ref` to those it has."""
    earlier = found.get(ref)
    if earlier is None:
        found[ref] = part
    elif isinstance(part, dict) and isinstance(earlier, dict):
        for position, value in part.items():
            earlier[position] = earlier[position] + value if position in earlier else value
    else:
        found[ref] = earlier + part  # type: ignore[operator]
