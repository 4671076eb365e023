"""A program cut at a layer: the trunk runs once without autograd, the head is closed form or a short graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from .affine import AffineHead, analyse
from .arrangement import arrangement
from .biases import Biases
from .capture import Program
from .execute import Schedule
from .fold import fold_norms
from .multipliers import Walk
from .nodes import LEAVES, Ref, op_name
from .relevance import Composer, RelevanceWalk
from .rescale import known
from .reveal_cancel import SignedWalk

__all__ = ["Cut", "cut"]


def cut(program: Program, feature: int, layer: str, folded: bool = False, packed: bool = True) -> Cut:
    """The cut of `program` at value `feature`, made once for each program and layer.

    folded  fold batch norms into convolutions: faster, equal to rounding
    packed  where they are folded, keep packed weights on the CPU; for weights that are finite
    """
    packed = packed and folded
    key = (feature, folded, packed)
    if key not in program.cuts:
        program.cuts[key] = Cut(fold_norms(program, feature) if folded else program, feature, layer, packed)
    return program.cuts[key]


class Cut:
    """A program split at one value.

    trunk    everything that does not follow from the feature map, and the feature map itself
    head     everything from the feature map to the output
    affine   the head's closed form, or None
    sizes    values that enter the head beside the features and are the batch size
    packed   whether weights are packed on the CPU: values of leaves are kept between calls
    bypass   values beside the features that follow from the images and enter the head, or are outputs
    """

    def __init__(self, program: Program, feature: int, layer: str, packed: bool = False):
        outputs = program.output_indices
        needed = program.ancestors(outputs | {feature})
        head = program.descendants(feature) & program.ancestors(outputs) - {feature}
        before = needed - head
        head |= _sizes_made_for(program, head)
        self.program = program
        self.feature = feature
        self.layer = layer
        self._head_nodes = [program.nodes[i] for i in sorted(head)]
        crossing = frozenset(
            ref
            for node in self._head_nodes
            for ref in node.refs()
            if ref not in head and ref != feature and program.nodes[ref].kind not in LEAVES and ref != program.input
        )
        reads_images = any(program.input in node.refs() for node in self._head_nodes) and feature != program.input
        images = program.descendants(program.input)
        self.sizes = frozenset(ref for ref in crossing & images if op_name(program.nodes[ref].target) == "sym_size")
        aside = outputs - head - {feature}  # outputs that do not follow from the features
        self.bypass = ((crossing | aside) & images - self.sizes) | ({program.input} if reads_images else set())
        survive = crossing | {feature} | (outputs - head)
        self._before, self._survive = before, frozenset(survive)
        self.trunk = Schedule(program, before, survive, in_place=True, packed=packed)
        self.head = Schedule(program, head, outputs | {feature}, in_place=True, packed=packed)
        self.head_graph = Schedule(program, head, outputs | {feature} | frozenset(self.starts), in_place=False)
        self.affine: AffineHead | None = analyse(program, feature, self._head_nodes) if head else None
        # Of what enters the head beside the features, weights rearranged by the trunk can be computed again without an
        # image, and the rest is the batch size: `analyse` lets nothing else enter an affine head.
        rearranged = program.ancestors(crossing - self.sizes) if not self.bypass else set()
        self._probe = Schedule(program, head | rearranged, outputs, in_place=False)
        self._entering = crossing | aside | self.bypass
        self.packed = packed
        self._walk: tuple[int, Walk] | None = None
        self._signed: tuple[int, SignedWalk] | None = None
        self._biases: Biases | None = None

    def walk(self) -> Walk:
        """The way back through the head; UnsupportedOpError where a step has no Rescale rule."""
        rules = known()
        if self._walk is None or self._walk[0] != rules:
            made = Walk(self.program, self.feature, self._head_nodes, self.sizes, self.packed)
            self._walk = (rules, made)
        return self._walk[1]

    def signed_walk(self) -> SignedWalk:
        """The way of positive and negative parts; UnsupportedOpError where a step has no RevealCancel rule."""
        rules = known()
        if self._signed is None or self._signed[0] != rules:
            self._signed = (rules, SignedWalk(self.program, self.feature, self._head_nodes, self.sizes))
        return self._signed[1]

    def biases(self) -> Biases:
        """What the head adds on the way to the outputs."""
        if self._biases is None:
            self._biases = Biases(self.program, self.feature, self._head_nodes)
        return self._biases

    @property
    def starts(self) -> list[int]:
        """Where relevance starts: the outputs, a softmax at the very end left out."""
        found = []
        for leaf in self.program.outputs:
            if isinstance(leaf, Ref):
                node = self.program.nodes[leaf.index]
                while node.kind == "softmax" and node.index != self.feature:
                    node = self.program.nodes[node.args[0].index]
                found.append(node.index)
        return found

    def relevance_walk(self, composer: Composer, below: bool) -> RelevanceWalk:
        """The way of relevance down to the feature map, or from there to the image; made anew at every call.

        Raises UnsupportedOpError for a step without a rule.
        """
        nodes, rest = self._head_nodes, []
        stop, sizes, ends, beside = self.feature, self.sizes, self.program.output_indices, frozenset(self.bypass)
        if below:
            stop, sizes, ends, beside = self.program.input, frozenset(), self._survive, frozenset()
            before = [self.program.nodes[i] for i in sorted(self._before)]
            nodes = [node for node in before if node.kind not in LEAVES and node.index != stop]
        else:
            starts = frozenset(self.starts)
            ends |= starts
            # A softmax after the start gets no relevance, and needs no rule.
            after = set().union(*(self.program.descendants(i) - {i} for i in starts)) - starts
            rest = [node for node in nodes if node.index in after]
            nodes = [node for node in nodes if node.index not in after]
        return RelevanceWalk(self.program, stop, nodes, sizes, composer, ends, self.packed, rest, beside)

    @cached_property
    def leaves_before(self) -> frozenset[int]:
        """Leaves of the model, themselves or folded into others, that the feature map depends on."""
        nodes = self.program.nodes
        needed = self.program.ancestors(frozenset({self.feature}))
        needed |= {leaf for index in needed if nodes[index].kind == "folded" for leaf in nodes[index].target.leaves()}
        return frozenset(index for index in needed if nodes[index].kind in ("parameter", "buffer", "constant"))

    @cached_property
    def arrangement(self) -> Callable[[Tensor], Tensor] | None:
        """What brings the layer's output into (B, K, *spatial)."""
        return arrangement(self.program, self.feature, self.layer)

    def entering(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """What enters the head beside the features and weights, out of the trunk's values."""
        return {index: values[index] for index in self._entering if index in values}

    def run_probe(self, probe: Tensor, leaves: dict[int, Any]) -> Tensor:
        """The output of a head without bypass on made-up features, whose batch size replaces the real one."""
        values = dict(leaves)
        values[self.feature] = probe
        for index in self.sizes:
            values[index] = probe.shape[0]
        self._probe.run(values)
        return self.program.result(values)


def _sizes_made_for(program: Program, head: set[int]) -> set[int]:
    """Sizes that the head reads and the trunk computes from the batch size: another batch needs them anew."""
    found: set[int] = set()
    stack = [ref for index in head for ref in program.nodes[index].refs()]
    while stack:
        node = program.nodes[stack.pop()]
        if node.kind == "size" and op_name(node.target) != "sym_size" and node.index not in head | found:
            found.add(node.index)
            stack.extend(node.refs())
    return found
