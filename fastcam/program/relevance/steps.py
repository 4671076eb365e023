"""Relevance through steps without weights: pools, sums, products, norms, activations, and whatever moves values.

Each function takes the step's view (`StepView`), its rule and the relevance of its result for every target, and gives
the relevance of what the step reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastcam import ops

from ..nodes import Node, Ref, map_refs, op_name
from ..transpose import transpose
from .messages import NoRule, Relevance
from .rules import Epsilon, Gradient, MaxPool, Norm, Pass, Rectified, Rule

__all__ = [
    "Given",
    "StepView",
    "activation",
    "average",
    "derivative",
    "gated",
    "linear_map",
    "max_pool",
    "moved",
    "norm",
    "passed",
    "product",
    "pulled_back",
    "rectified",
    "summed",
]

#: Relevance by index of the value read, for each target: `Relevance`, or tensors by position where the value is a
#: tuple.
Given = dict[int, list[Any]]


@dataclass(frozen=True)
class StepView:
    """A step, with the values of this pass.

    active  indices of the values it reads that follow from where the walk ends
    get     everything it reads, by index
    shapes  of the active values
    passed  the whole pass (`walk.Passed`), for rules that walk a part of it themselves
    """

    node: Node
    active: frozenset[int]
    get: Callable[[int], Any]
    shapes: Mapping[int, torch.Size]
    passed: Any = None

    @property
    def source(self) -> int:
        """Index of the one active value, or of the first."""
        return next(ref for ref in self.node.refs() if ref in self.active)

    def run(self, value: Callable[[int], Any]) -> Any:
        return self.node.target(*map_refs(self.node.args, value), **map_refs(self.node.kwargs, value))


def passed(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """R' = R."""
    return {step.source: given}


def moved(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """Reshape, permute, slice, concatenate, pad: values go back where they came from."""
    found: Given = {}
    for one in given:
        cotangent = one.tensor() if isinstance(one, Relevance) else one
        for ref, part in transpose(step.node, cotangent, step.active, step.shapes, step.get).items():
            found.setdefault(ref, []).append(Relevance(part) if isinstance(part, Tensor) else part)
    return found


def average(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """Average pools, means, sums over positions, resizing."""
    if isinstance(rule, Gradient):
        return moved(step, rule, given)
    assert isinstance(rule, Norm)
    x = step.get(step.source)
    result = step.run(step.get)
    found = []
    for one in given:
        share = _share(one.tensor(), result, rule.epsilon)
        back = transpose(step.node, share, step.active, step.shapes, step.get)[step.source]
        assert isinstance(back, Tensor)
        # In the layout of x, and everything before this step with it: the derivative of a mean is a contiguous one.
        found.append(Relevance(torch.empty_like(x, dtype=back.dtype).copy_(back), x))
    return {step.source: found}


def max_pool(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """Max pools of any kind, windows that overlap included."""
    assert isinstance(rule, (MaxPool, Gradient))
    share = rule.share if isinstance(rule, MaxPool) else "winner"
    x = step.get(step.source)
    given = [one[0] if isinstance(one, dict) else one.tensor() for one in given]
    if isinstance(rule, MaxPool) and rule.epsilon is not None:
        result = step.run(step.get)
        result = result[0] if isinstance(result, (tuple, list)) else result
        given = [_share(r, result, rule.epsilon) * result for r in given]
    if share == "winner":
        return {step.source: [Relevance(r) for r in pulled_back(step, x, given)]}
    return {step.source: [Relevance(_shared(x, r, _window(step.node, x), share)) for r in given]}


def _window(node: Node, x: Tensor) -> list[tuple[int, int, int, int]]:
    """For each spatial dimension: kernel, stride, padding, dilation."""
    if not op_name(node.target).startswith("max_pool"):
        raise NoRule("only max_pool has windows to share among; use max_pool='winner'")
    rank = int(op_name(node.target)[len("max_pool")])

    def each(position: int, default: Any) -> tuple[int, ...]:
        value = node.args[position] if len(node.args) > position else default
        value = default if value is None or (isinstance(value, (list, tuple)) and not value) else value
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        return tuple(values * rank if len(values) == 1 else values)

    kernel = each(1, 1)
    return list(zip(kernel, each(2, kernel), each(3, 0), each(4, 1), strict=True))


def _shared(x: Tensor, r: Tensor, window: list[tuple[int, int, int, int]], share: str) -> Tensor:
    """Relevance of the windows in proportion to max(x, 0), or among the maxima in equal parts.

    One view of x, padded also behind its end (ceil_mode), for each element of a window, as long as the result.
    """
    counts, rank = r.shape[-len(window) :], len(window)
    pads: list[int] = []
    for size, count, (kernel, stride, padding, dilation) in zip(x.shape[-rank:], counts, window, strict=True):
        behind = (count - 1) * stride + dilation * (kernel - 1) + 1 - size - padding
        pads = [padding, max(0, behind), *pads]

    def elements(padded: Tensor) -> list[Tensor]:
        starts = itertools.product(*(range(0, kernel * dilation, dilation) for kernel, _, _, dilation in window))
        strides = [stride for _, stride, _, _ in window]
        reach = [(count - 1) * stride + 1 for count, stride in zip(counts, strides, strict=True)]
        found = []
        for start in starts:
            place = (..., *(slice(a, a + n, s) for a, n, s in zip(start, reach, strides, strict=True)))
            found.append(padded[place])
        return found

    values = elements(functional.pad(x, pads, value=-torch.inf))
    if share == "proportional":
        own = elements(functional.pad(torch.ones_like(x[:1]), pads))
        weights = [value.clamp(min=0) for value in values]
        empty = torch.stack(weights).sum(0) == 0
        weights = [torch.where(empty, one, weight) for one, weight in zip(own, weights, strict=True)]
    else:
        top = torch.stack(values).amax(0)
        weights = [(value == top).to(x.dtype) for value in values]
    message = r / torch.stack(weights).sum(0)
    found = functional.pad(torch.zeros_like(x), pads)
    for element, weight in zip(elements(found), weights, strict=True):
        element += message * weight
    place = (..., *(slice(w[2], w[2] + n) for w, n in zip(window, x.shape[-rank:], strict=True)))
    return found[place]


def summed(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """Sums and differences of activations; what is no activation takes no part."""
    reads = list(step.node.args[:2])
    operands = [arg.index for arg in reads if isinstance(arg, Ref) and arg.index in step.active]
    if len(operands) == 1:
        (source,) = operands
        if isinstance(rule, Gradient):
            return moved(step, rule, given)
        if step.shapes[source] != given[0].values.shape:
            return {source: [Relevance(one.tensor().sum_to_size(step.shapes[source])) for one in given]}
        return {source: given}
    if isinstance(rule, Gradient):
        return moved(step, rule, given)
    if isinstance(rule, Pass):  # to both, and so twice
        found: Given = {}
        for one in given:
            for ref, part in moved(step, rule, [one]).items():
                found.setdefault(ref, []).extend(part)
        return found
    assert isinstance(rule, Norm)
    factor = step.node.kwargs.get("alpha", 1)
    signs = {"add": (1, factor), "sub": (1, -factor), "rsub": (-factor, 1)}[op_name(step.node.target)]
    parts = [step.get(ref) if sign == 1 else step.get(ref) * sign for ref, sign in zip(operands, signs, strict=True)]
    if operands[0] == operands[1]:
        return {operands[0]: given}
    plain = parts[0].shape == parts[1].shape
    if not plain:
        parts = list(torch.broadcast_tensors(*parts))
    found = {ref: [] for ref in operands}
    for one in given:
        pieces = ops.relevance_add(one.values, parts[0], parts[1], one.factor, rule.epsilon)
        for ref, piece in zip(operands, pieces, strict=True):
            found[ref].append(Relevance(piece if plain else piece.sum_to_size(step.shapes[ref])))
    return found


def product(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """Products and quotients: by a constant, all to the activation; by a gate, all to the gated feature map; of two of
    one size, half each."""
    if isinstance(rule, Gradient):
        return derivative(step, rule, given)
    operands = [arg.index for arg in step.node.args[:2] if isinstance(arg, Ref) and arg.index in step.active]
    sizes = [math.prod(step.shapes[ref][1:]) for ref in operands]  # of one image: their number may be free
    if len(operands) == 2 and sizes[0] == sizes[1] and op_name(step.node.target) == "mul":
        if operands[0] == operands[1]:
            return {operands[0]: given}
        halves = [Relevance(one.values / 2, one.factor) for one in given]
        return dict.fromkeys(operands, halves)
    source = operands[0] if len(operands) == 1 or sizes[0] >= sizes[1] else operands[1]
    if step.shapes[source] != given[0].values.shape:
        return {source: [Relevance(one.tensor().sum_to_size(step.shapes[source])) for one in given]}
    return {source: given}


def gated(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """Gated linear unit, a sigmoid(b) for the halves a, b of one tensor: all to a, as at other gates."""
    if isinstance(rule, Gradient):
        return derivative(step, rule, given)
    dim = step.node.args[1] if len(step.node.args) > 1 else -1
    whole = [one.tensor() for one in given]
    return {step.source: [Relevance(torch.cat([r, torch.zeros_like(r)], dim)) for r in whole]}


def linear_map(step: StepView, rule: Epsilon | Gradient, given: list[Any]) -> Given:
    """R' = x J^T (R / st(J x)) for a step z = J x without bias; J^T R with the rule Gradient."""
    if isinstance(rule, Gradient):
        return moved(step, rule, given)
    result = step.run(step.get)
    found = moved(step, rule, [Relevance(_share(one.tensor(), result, rule.epsilon)) for one in given])
    return {ref: [Relevance(one.tensor(), step.get(ref)) for one in many] for ref, many in found.items()}


def activation(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """Functions of one tensor."""
    if isinstance(rule, Pass):
        return passed(step, rule, given)
    return derivative(step, rule, given)


def rectified(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """ReLUs under the rule Rectified, by their result: positive where x is, and made inside a packed convolution."""
    assert isinstance(rule, Rectified)
    kept = [one.tensor().clamp(min=0) for one in given]
    if rule.mask:
        result = step.get(step.node.index)
        kept = [torch.ops.aten.threshold_backward(r, result.to(r.dtype), 0) for r in kept]
    return {step.source: [Relevance(r) for r in kept]}


def norm(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """Batch norms in evaluation, and other norms."""
    given = [Relevance(one[0]) if isinstance(one, dict) else one for one in given]
    if isinstance(rule, Pass):
        return passed(step, rule, given)
    if isinstance(rule, Gradient) and op_name(step.node.target) == "batch_norm":
        return moved(step, rule, given)
    if isinstance(rule, Epsilon) and op_name(step.node.target) == "batch_norm":
        x, result = step.get(step.source), step.run(step.get)
        found = []
        for one in given:
            share = _share(one.tensor(), result, rule.epsilon)
            back = transpose(step.node, share, step.active, step.shapes, step.get)[step.source]
            assert isinstance(back, Tensor)
            found.append(Relevance(back, x))
        return {step.source: found}
    return derivative(step, rule, given)


def derivative(step: StepView, rule: Rule, given: list[Any]) -> Given:
    """The derivative at the values of this pass, by autograd."""
    reads = [ref for ref in dict.fromkeys(step.node.refs()) if ref in step.active]
    tensors = [one[0] if isinstance(one, dict) else one.tensor() for one in given]
    with torch.enable_grad():
        leaves = {ref: step.get(ref).detach().requires_grad_() for ref in reads}
        result = step.run(lambda ref: leaves[ref] if ref in leaves else step.get(ref))
        result = result[0] if isinstance(result, (tuple, list)) else result
    found: Given = {ref: [] for ref in reads}
    for position, r in enumerate(tensors):
        keep = position + 1 < len(tensors)
        parts = torch.autograd.grad(result, list(leaves.values()), r.to(result.dtype), keep, allow_unused=True)
        for ref, part in zip(reads, parts, strict=True):
            found[ref].append(Relevance(torch.zeros_like(leaves[ref]) if part is None else part))
    return found


#: Their derivative has an operator, which is quicker to call than autograd.
_MAX_POOLS = (torch.ops.aten.max_pool2d.default, torch.ops.aten.max_pool2d_with_indices.default)


def pulled_back(step: StepView, x: Tensor, given: list[Tensor]) -> list[Tensor]:
    """Relevance of the step's (first) result at x, which stands for what the step reads, by the derivative there."""
    if step.node.target in _MAX_POOLS and not step.node.kwargs:
        window = [*map_refs(step.node.args[1:], step.get)]
        window += [None, (), 0, 1, False][len(window) :]  # kernel, stride, padding, dilation, whether to round up
        places = torch.ops.aten.max_pool2d_with_indices(x, *window)[1]
        back = torch.ops.aten.max_pool2d_with_indices_backward
        return [back(r.to(x.dtype), x, *window, places) for r in given]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        result = step.run(lambda ref: leaf if ref == step.source else step.get(ref))
        result = result[0] if isinstance(result, (tuple, list)) else result
    last = len(given) - 1
    return [torch.autograd.grad(result, leaf, r, retain_graph=i < last)[0] for i, r in enumerate(given)]


def _share(r: Tensor, result: Tensor, epsilon: float) -> Tensor:
    if r.ndim < 2:
        return ops.relevance_divide(r.unsqueeze(1), result.unsqueeze(1), epsilon=epsilon).squeeze(1)
    return ops.relevance_divide(r, result, epsilon=epsilon)
