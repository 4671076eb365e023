"""Attribution Equilibrium's rules, node by node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcam import ops
from fastcam._tracing import tracing

from ..capture import Program
from ..nodes import Node, Ref, op_name
from ..transpose import transpose
from . import steps
from .layer import Geometry, ModifiedWeights, is_weighted, weight_and_bias
from .messages import NoRule, Relevance
from .rules import Pass, ZBox
from .steps import Given, StepView
from .walk import RelevanceWalk, Way, general_way, geometry_in, unsupported, weighted_way

__all__ = ["Equilibrium", "shares", "start_layer", "winner"]

#: Bytes of three maps of a portion: what the system's allocator keeps and hands out again without fresh pages.
_PORTION = 24 << 20


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """Chooses how relevance passes each step.

    ratio      r, the positive budget a k x k convolution brings relevance to
    residual   "branch": a residual sum's relevance goes down the branch alone · "proportional": to both operands
    concat     "release": relevance of zero activations and of a dense block's input is dropped · "slice": nothing is
    pointwise  which convolutions count as 1 x 1: "height": those of kernel height 1 · "all": those of one element
    threshold  what an activation must exceed to count as active
    """

    ratio: float = 2.0
    residual: Literal["branch", "proportional"] = "branch"
    concat: Literal["release", "slice"] = "release"
    pointwise: Literal["height", "all"] = "height"
    threshold: float = 0.0

    def check(self, walk: RelevanceWalk) -> None:
        """As `walk.Composer`: without a convolution below its start there is nothing to balance."""
        if not any(is_weighted(node) for node in walk.nodes):
            raise ValueError(
                "attribution_equilibrium balances relevance at the convolutions below its start, and there is none "
                "below this layer; pass a later one as layer="
            )

    def way(self, walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
        """As `walk.Composer`."""
        name = op_name(node.target)
        if is_weighted(node):
            if node.index in walk.first and node.kind == "conv":
                return weighted_way(walk, node, active, ZBox(epsilon=0.0))
            return self._balanced(walk, node, active)
        if name in ("add", "sub") and len(active) == 2 and not node.kwargs:
            return self._residual(walk, node)
        if node.kind == "cat":
            return self._concat(walk, node, active)
        if name.startswith(("max_pool", "adaptive_max_pool")):
            return Way(winner)
        if node.kind in ("pool", "resize") or name in ("mean", "sum"):
            return Way(shares)
        if name == "batch_norm":
            if node.args[5] is not False:
                raise unsupported(node, "a norm by the batch's own statistics")
            return Way(self._norm)
        if node.kind in ("norm", "softmax", "attention"):
            raise unsupported(node, "Attribution Equilibrium passes batch norms only")
        kinds = dict.fromkeys(("activation", "add", "pool", "max_pool", "norm", "product"), Pass())
        return general_way(node, active, kinds)

    def _balanced(self, walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
        """A convolution or linear layer that does not read the image."""
        geometry = geometry_in(walk.program, node)
        source = node.args[0]
        if geometry is None or not isinstance(source, Ref) or active != frozenset({source.index}):
            raise unsupported(node, "its weight depends on the image, or its sizes do")

        def take(step: StepView, given: list[Any]) -> Given:
            found = weight_and_bias(node, step.get)
            if found is None:
                raise NoRule("its weight is no matrix")
            x, weight = step.get(source.index), walk.weights.get(found[0], "magnitude", torch.abs)
            pointwise = self._is_pointwise(geometry, weight)
            ratio = 1.0 if pointwise else self.ratio
            whole = [one.tensor().to(x.dtype) for one in given]
            budgets = [ops.relevance_budgets(r) for r in whole]
            results: list[list[Tensor]] = [[] for _ in given]
            for some in _portions(x, whole[0]):
                here = _images(x, some)
                divisors = _divisors(here, weight, geometry, self.threshold, walk.weights)
                shape = (3 * here.shape[0], *x.shape[1:])
                for result, r, of in zip(results, whole, budgets, strict=True):
                    messages = ops.relevance_equilibrium(_images(r, some), _images(of, some), divisors, ratio)
                    parts = geometry.back(messages, weight, shape, walk.weights)
                    result.append(ops.relevance_combine(here, parts, _images(of, some), not pointwise, self.threshold))
            return {source.index: [Relevance(r[0] if len(r) == 1 else torch.cat(r)) for r in results]}

        return Way(take)

    def _is_pointwise(self, geometry: Geometry, weight: Tensor) -> bool:
        kernel = weight.shape[2:]
        if geometry.rank == 2 and self.pointwise == "height":
            return kernel[0] == 1
        return all(extent == 1 for extent in kernel)

    def _residual(self, walk: RelevanceWalk, node: Node) -> Way:
        first, second = (arg.index for arg in node.args[:2])
        lengths, meeting = _branches(walk.program, walk.stop, first, second)
        if lengths[0] == lengths[1] or self.residual == "proportional":
            branch, shortcut = (first, second) if lengths[0] > lengths[1] else (second, first)
            return Way(lambda step, given: _proportional(walk, step, given, branch, shortcut, meeting))
        branch = first if lengths[0] > lengths[1] else second
        return Way(lambda step, given: {branch: given}, inputs=False)

    def _concat(self, walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
        if self.concat == "slice":
            return Way(lambda step, given: steps.moved(step, Pass(), given), inputs=False)
        operands = [arg.index for arg in node.args[0]]
        dropped = _block_input(walk.program, operands)

        def take(step: StepView, given: list[Any]) -> Given:
            found = steps.moved(step, Pass(), given)
            if dropped is not None:
                found.pop(dropped, None)
            return {
                ref: [Relevance(torch.where(step.get(ref) != 0, one.tensor(), 0)) for one in many]
                for ref, many in found.items()
            }

        return Way(take)

    def _norm(self, step: StepView, given: list[Any]) -> Given:
        """Passes relevance on where the norm passes its input on."""
        gamma = step.node.args[1]
        keep = None
        if isinstance(gamma, Ref):
            keep = (step.get(gamma.index) != 0).reshape(1, -1, *(1,) * (given[0].values.ndim - 2))
        if self.concat == "release":
            touched = step.get(step.source) != 0
            keep = touched if keep is None else keep & touched
        return {step.source: given if keep is None else [Relevance(torch.where(keep, g.tensor(), 0)) for g in given]}


def _portions(x: Tensor, r: Tensor) -> list[slice]:
    """A layer's images, on CPUs in portions whose intermediate results stay in the cache and in memory used again."""
    if tracing() or x.device.type != "cpu":
        return [slice(None)]
    image = 3 * max(x[:1].numel(), r[:1].numel()) * x.element_size()
    step = max(1, _PORTION // max(1, image))
    return [slice(start, start + step) for start in range(0, max(1, len(x)), step)]


def _images(x: Tensor, some: slice) -> Tensor:
    """x[some]; of all images x itself, for a view is one operator more in an exported program."""
    return x if some == slice(None) else x[some]


def _divisors(x: Tensor, weight: Tensor, geometry: Geometry, threshold: float, cache: ModifiedWeights) -> Tensor:
    """c(max(x, 0), V), c(1[x > threshold], V) and c(1[x <= threshold], V), one batch after the other.

    The last is c(1, V), which is the same for all images, less the one before, where digits suffice: not in half types,
    nor on accelerators, whose float32 convolutions may be TF32, nor for an image with a place where less than a
    thousandth is inactive, as behind a max pool.
    """
    few = tracing() or x.dtype in (torch.float16, torch.bfloat16) or x.device.type != "cpu"
    found = geometry.apply(_bases(x, threshold, inactive=few), weight)
    if few or len(x) == 0:
        return found
    kept = cache.get(weight, ("all", geometry), lambda _: {})  # for the latest size of image
    everything = kept.get(x.shape[1:])
    if everything is None:
        everything = geometry.apply(torch.ones_like(x[:1]), weight)
        kept.clear()
        kept[x.shape[1:]] = everything
    divisors = _stack(found, 3 * len(x))
    both, inactive = divisors.split([2 * len(x), len(x)])
    both.copy_(found)
    torch.sub(everything, found[len(x) :], out=inactive)
    scarce = (inactive < everything * 1e-3).flatten(1).any(1)
    if bool(scarce.any()):
        inactive[scarce] = geometry.apply((x[scarce] <= threshold).to(x.dtype), weight)
    return divisors


def _bases(x: Tensor, threshold: float, inactive: bool = True) -> Tensor:
    """max(x, 0), active and (on demand) inactive, one batch after the other, each image in the order of x."""
    if tracing():
        return torch.cat([x.clamp(min=0), (x > threshold).to(x.dtype), (x <= threshold).to(x.dtype)])
    stacked = _stack(x, (3 if inactive else 2) * len(x))
    for part, make in zip(stacked.split(len(x)) if len(x) else (), _BASES, strict=False):
        make(x, threshold, part)
    return stacked


_BASES: tuple[Callable[[Tensor, float, Tensor], Tensor], ...] = (
    lambda x, threshold, out: torch.clamp(x, min=0, out=out),
    lambda x, threshold, out: torch.gt(x, threshold, out=out),
    lambda x, threshold, out: torch.le(x, threshold, out=out),
)


def _stack(x: Tensor, count: int) -> Tensor:
    """Memory for `count` images in sequence, each in the order of those of x."""
    order = sorted(range(1, x.ndim), key=lambda d: -x.stride(d))
    stacked = x.new_empty((count, *(x.shape[d] for d in order)))
    return stacked.permute(0, *(order.index(d) + 1 for d in range(1, x.ndim)))


def winner(step: StepView, given: list[Any]) -> Given:
    """All of a window's relevance to its greatest max(x, 0), the first of several."""
    tensors = [one[0] if isinstance(one, dict) else one.tensor() for one in given]
    found = steps.pulled_back(step, step.get(step.source).clamp(min=0), tensors)
    return {step.source: [Relevance(one) for one in found]}


def shares(step: StepView, given: list[Any]) -> Given:
    """Average pools and resizing: by max(x, 0) times the pool's weight, by the weight alone where all are 0."""
    x = step.get(step.source).clamp(min=0)

    def run(value: Tensor) -> Any:
        return step.run(lambda ref: value if ref == step.source else step.get(ref))

    result, weights = run(x), run(torch.ones_like(x[:1]))
    found = []
    for one in given:
        r = one.tensor()
        message = torch.where(result == 0, 0, r / _safe(result))
        part = transpose(step.node, message, step.active, step.shapes, step.get)[step.source]
        empty = torch.where(result == 0, r / weights, 0)
        rest = transpose(step.node, empty, step.active, step.shapes, step.get)[step.source]
        assert isinstance(part, Tensor)
        assert isinstance(rest, Tensor)
        found.append(Relevance(torch.addcmul(rest, x, part)))
    return {step.source: found}


def _proportional(
    walk: RelevanceWalk, step: StepView, given: list[Any], branch: int, shortcut: int, meeting: int
) -> Given:
    """Both operands in proportion to their magnitudes, walked apart to where they meet and put together there."""
    if branch == shortcut:
        return {branch: given}
    along, aside = step.get(branch).abs(), step.get(shortcut).abs()
    total = along + aside
    share = torch.where(total == 0, 0.5, along / _safe(total))
    whole = [one.tensor() for one in given]
    parts = [share * r for r in whole]
    rest = [r - one for r, one in zip(whole, parts, strict=True)]
    weights = [_ratio(_size(one), _size(r)) for one, r in zip(parts, whole, strict=True)]
    down = _walked(walk, step, branch, meeting, parts)
    short = _walked(walk, step, shortcut, meeting, rest)
    found = []
    for one, other, weight in zip(down, short, weights, strict=True):
        have, want = ops.relevance_budgets(other), ops.relevance_budgets(one)
        scale = torch.where(have == 0, 0, want / _safe(have))
        positive, negative = (s.reshape(-1, *(1,) * (one.ndim - 1)) for s in scale.unbind(1))
        brought = positive * other.clamp(min=0) + negative * other.clamp(max=0)
        w = weight.reshape(-1, *(1,) * (one.ndim - 1))
        nothing = (want.sum(1) == 0).reshape(w.shape)
        found.append(Relevance(torch.where(nothing, other, w * one + (1 - w) * brought)))
    return {meeting: found}


def _walked(walk: RelevanceWalk, step: StepView, start: int, end: int, given: list[Tensor]) -> list[Tensor]:
    if start == end:
        return given
    found: dict[int, list[Any]] = {start: [Relevance(one) for one in given]}
    assert step.passed is not None
    walk.propagate(step.passed, walk.between(end, start), found)
    if end not in found:
        return [torch.zeros_like(step.get(end)) for _ in given]
    return [one.tensor() for one in found[end]]


def _size(r: Tensor) -> Tensor:
    return r.flatten(1).abs().sum(1)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    return torch.where(other == 0, 0.5, one / _safe(other))


def _safe(divisor: Tensor) -> Tensor:
    """1 for 0 in a trace, whose gradient would have the 0 / 0 that is not chosen; numbers need no such pass."""
    return torch.where(divisor == 0, 1, divisor) if tracing() else divisor


def _branches(program: Program, stop: int, first: int, second: int) -> tuple[tuple[int, int], int]:
    """How many convolutions each operand has back to where they meet, and the last value they have in common."""
    inside = program.descendants(stop)
    one, other = (program.ancestors(frozenset({operand})) & inside for operand in (first, second))
    common = one & other

    def convolutions(own: set[int]) -> int:
        return sum(program.nodes[index].kind == "conv" for index in own - common)

    return (convolutions(one), convolutions(other)), max(common, default=stop)


def _block_input(program: Program, operands: list[int]) -> int | None:
    """The operand that all other operands are computed from: the input of a dense block."""
    for operand in operands:
        others = [other for other in operands if other != operand]
        if others and all(operand in program.ancestors(frozenset({other})) for other in others):
            return operand
    return None


#: Networks whose published start is not where the general search ends.
_STARTS = {"AlexNet": "features", "DenseNet": "features"}


def start_layer(program: Program, model: nn.Module, spatial_rank: int) -> int | str:
    """Where the walk starts: a layer's name, or the index of the last activation of the last convolution, sum or
    concatenation with spatial extent, before any pool (of that itself, where no activation follows).

    Raises ValueError where there is none.
    """
    if type(model).__name__ in _STARTS:
        return _STARTS[type(model).__name__]
    needed = program.ancestors(program.output_indices) & program.descendants(program.input)
    readers: dict[int, list[Node]] = {}
    for index in sorted(needed):
        for ref in program.nodes[index].refs():
            readers.setdefault(ref, []).append(program.nodes[index])
    for index in sorted(needed, reverse=True):
        node = program.nodes[index]
        shape = node.shape or ()
        spatial = len(shape) == spatial_rank + 2 and any((size or 0) > 1 for size in shape[2:])
        if spatial and (node.kind in ("conv", "cat") or op_name(node.target) == "add"):
            found = index
            while True:
                after = readers.get(index, [])
                if len(after) != 1 or (
                    after[0].kind not in ("activation", "norm") and "dropout" not in op_name(after[0].target)
                ):
                    return found
                index = after[0].index
                if after[0].kind == "activation":
                    found = index
    raise ValueError("the model has no convolution with spatial extent; pass layer=")
