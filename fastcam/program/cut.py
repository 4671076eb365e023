"""A program cut at a layer: the trunk runs once without autograd, the head is closed form or a short graph."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .affine import AffineHead, analyse
from .capture import Program
from .execute import Schedule
from .fold import fold_norms
from .forward import Forward, detached
from .nodes import LEAVES
from .state import neutral_modes
from .targets import Targets, scores_of

__all__ = ["Cut", "cut"]


def cut(program: Program, feature: int, layer: str, folded: bool = False) -> Cut:
    """The cut of `program` at value `feature`, made once for each program and layer.

    folded  fold batch norms into convolutions and, on the CPU, keep packed weights: faster, equal to rounding
    """
    key = (feature, folded)
    if key not in program.cuts:
        program.cuts[key] = Cut(fold_norms(program, feature) if folded else program, feature, layer, packed=folded)
    return program.cuts[key]


class Cut:
    """A program split at one value.

    trunk   everything that does not follow from the feature map, and the feature map itself
    head    everything from the feature map to the output
    affine  the head's closed form, or None
    """

    def __init__(self, program: Program, feature: int, layer: str, packed: bool = False):
        outputs = program.output_indices
        needed = program.ancestors(outputs | {feature})
        head = program.descendants(feature) & program.ancestors(outputs) - {feature}
        self.program = program
        self.feature = feature
        self.layer = layer
        head_nodes = [program.nodes[i] for i in sorted(head)]
        self._crossing = frozenset(
            ref
            for node in head_nodes
            for ref in node.refs()
            if ref not in head and ref != feature and program.nodes[ref].kind not in LEAVES and ref != program.input
        )
        survive = self._crossing | {feature} | (outputs - head)
        self._trunk = Schedule(program, needed - head, survive, in_place=True, packed=packed)
        self._head = Schedule(program, head, outputs | {feature}, in_place=True, packed=packed)
        self._head_graph = Schedule(program, head, outputs | {feature}, in_place=False)
        self.affine: AffineHead | None = analyse(program, feature, head_nodes) if head else None
        # Of what enters the head beside the features, weights rearranged by the trunk can be computed again without an
        # image, and the rest is the batch size: `analyse` lets nothing else enter an affine head.
        self._sizes = self._crossing & program.descendants(program.input)
        rearranged = program.ancestors(self._crossing - self._sizes)
        self._probe = Schedule(program, head | rearranged, outputs, in_place=False)

    def forward(
        self,
        images: torch.Tensor,
        leaves: dict[int, Any],
        *,
        gradients: bool,
        by_index: bool = True,
        closed_form: bool = True,
        compiled: bool = False,
    ) -> Forward:
        """Run trunk and head.

        images       (B, C, *spatial)
        leaves       `Weights.values()`
        gradients    whether `Forward.gradients` will be asked for
        by_index     whether the targets will be class indices rather than a callable
        closed_form  False takes gradients by autograd where the closed form would do (for tests)
        compiled     run trunk and head through `torch.compile`
        """
        values = dict(leaves)
        values[self.program.input] = images
        with neutral_modes():
            self._trunk.run(values, compiled)
            features = values[self.feature]
            affine = self._usable_affine(features, leaves, by_index) if gradients and closed_form else None
            if not gradients or affine is not None:
                self._head.run(values, compiled)
                output = self.program.result(values)
                if affine is None:
                    return Forward(self.layer, features, output)
                closed = functools.partial(self._closed_gradients, affine, output, features, leaves)
                return Forward(self.layer, features, output, closed_form=closed, uniform=affine.uniform)
            with torch.enable_grad():
                leaf = features.detach().requires_grad_()
                values[self.feature] = leaf
                self._head_graph.run(values, compiled)
                output = self.program.result(values)
        return Forward(self.layer, features, detached(output), leaf=leaf, graph_output=output)

    def _usable_affine(self, features: torch.Tensor, leaves: dict[int, Any], by_index: bool) -> AffineHead | None:
        if self.affine is None or features.shape[0] == 0 or not (by_index or self.affine.pooled):
            return None
        return self.affine if self.affine.holds(self._run_probe, leaves, features) else None

    def _closed_gradients(
        self, affine: AffineHead, output: Any, features: torch.Tensor, leaves: dict[int, Any], targets: Targets
    ) -> torch.Tensor:
        if targets.indices is not None:
            return affine.gradients(targets.indices, self._run_probe, leaves, features)
        with torch.enable_grad():
            free = output.detach().requires_grad_()
            score = scores_of(free, targets, None, features.shape[0], self.layer).sum()
        (slopes,) = torch.autograd.grad(score, free)
        return affine.from_scores(slopes, leaves, features)

    def _run_probe(self, probe: torch.Tensor, leaves: dict[int, Any]) -> torch.Tensor:
        """The head's output on made-up features, whose batch size replaces the real one."""
        values = dict(leaves)
        values[self.feature] = probe
        for index in self._sizes:
            values[index] = len(probe)
        self._probe.run(values)
        return self.program.result(values)
