"""DeepLIFT's RevealCancel rule: multipliers of scores, positive and negative parts of differences apart.

    sum over the feature map of  m (A - A')  =  y(A) - y(A')

Parts go forwards through the head once for an image and its reference, leaving the slopes of its functions; multipliers
come back for each target (`fastcam.program.signed_steps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Program
from .multipliers import accumulate
from .nodes import Node, following_values, map_refs, reads_size_alone
from .signed_steps import Multipliers, Parts, SignedRule, SignedStep, by_sign, parts_of, signed_rule_for
from .transpose import Cotangent

__all__ = ["Propagated", "SignedWalk"]


@dataclass(frozen=True)
class Propagated:
    """What the pass of the parts leaves for the way back.

    difference  of the features
    constants   weights, sizes and what is made of them
    shapes      of every tensor that differs between image and reference
    saved       what the rules kept, by index
    """

    difference: Tensor
    constants: dict[int, Any]
    shapes: dict[int, torch.Size]
    saved: dict[int, Any]


class SignedWalk:
    """The way of parts through the steps between value `feature` and the outputs of a program.

    Raises UnsupportedOpError where a step has no rule.
    """

    def __init__(self, program: Program, feature: int, head: list[Node], sizes: frozenset[int]):
        self._feature = feature
        self._sizes = sizes
        following = following_values(feature, head)
        numbers = set(following)  # and what comparisons and the like make of them
        for node in head:
            made_of_numbers = numbers.intersection(node.refs())
            constant = node.kind == "size" or (made_of_numbers <= following and reads_size_alone(node, numbers))
            if made_of_numbers and not constant:
                numbers.add(node.index)
        self._steps: list[tuple[Node, frozenset[int], SignedRule | None]] = []
        for node in head:
            reads = frozenset(node.refs())
            if node.index in following:
                differing = reads & following
                self._steps.append((node, differing, signed_rule_for(node, differing, reads & (numbers - following))))
            elif node.index not in numbers:
                self._steps.append((node, frozenset(), None))
        last = {ref: node.index for node, _, _ in self._steps for ref in node.refs()}
        self._dead: dict[int, list[int]] = {}
        for ref, at in last.items():
            self._dead.setdefault(at, []).append(ref)

    def propagate(self, features: Tensor, reference: Tensor, given: Mapping[int, Any]) -> Propagated:
        """The pass forwards; both feature maps (B, K, *spatial), `given` the weights and what else enters the head."""
        constants = dict(given) | dict.fromkeys(self._sizes, features.shape[0])
        difference = features - reference
        parts = {self._feature: Parts(reference, features, *parts_of(difference))}
        shapes, saved = {self._feature: features.shape}, {}

        def get(ref: int) -> Any:
            return parts[ref].reference if ref in parts else constants[ref]

        for node, differing, rule in self._steps:
            try:
                if rule is None:  # sizes, and constants made from them
                    constants[node.index] = node.target(*map_refs(node.args, get), **map_refs(node.kwargs, get))
                else:
                    step = SignedStep(node, {ref: parts[ref] for ref in differing}, constants.__getitem__, shapes)
                    parts[node.index], saved[node.index] = rule.forward(step)
                    if isinstance(parts[node.index].reference, Tensor):
                        shapes[node.index] = parts[node.index].reference.shape
            except Exception as error:
                raise _located(error, node) from error
            for ref in self._dead.get(node.index, ()):
                parts.pop(ref, None)
        return Propagated(difference, constants, shapes, saved)

    def multipliers(self, passed: Propagated, seeds: Mapping[int, Tensor]) -> Tensor:
        """(B, K, *spatial) multipliers at the feature map, from those at the outputs by index."""
        positive: dict[int, Cotangent] = dict(seeds)
        negative: dict[int, Cotangent] = dict(seeds)
        for node, differing, rule in reversed(self._steps):
            if rule is None or node.index not in positive:
                continue
            given = Multipliers(positive.pop(node.index), negative.pop(node.index))
            step = SignedStep(node, dict.fromkeys(differing, _GONE), passed.constants.__getitem__, passed.shapes)
            try:
                found = rule.backward(step, passed.saved[node.index], given)
            except Exception as error:
                raise _located(error, node) from error
            for ref, part in found.items():
                accumulate(positive, ref, part.positive)
                accumulate(negative, ref, part.negative)
        if self._feature not in positive:
            raise RuntimeError("the score does not depend on the layer")
        found_here = Multipliers(positive[self._feature], negative[self._feature])
        return by_sign(passed.difference, found_here)


_GONE = Parts(None, None, None, None)


def _located(error: Exception, node: Node) -> Exception:
    return RuntimeError(f"{type(error).__name__}: {error}\nin the RevealCancel rule of {node}")
