"""Relevance walked backwards through a program, node by node, without autograd and without hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..capture import Program
from ..execute import Schedule
from ..nodes import ACTIVATIONS, LEAVES, Node, Ref, op_name, reads_size_alone
from ..rescale import UnsupportedOpError
from . import steps
from .layer import Geometry, Layer, ModifiedWeights, is_weighted, weight_and_bias
from .messages import NoRule, Relevance, add
from .rules import Epsilon, Gradient, Pass, Rectified, Rule, Weighted
from .steps import Given, StepView

__all__ = ["Composer", "Passed", "RelevanceWalk", "Way", "known", "nonnegative", "register_relevance_rule"]


class Composer(Protocol):
    """What chooses rules: a `Composite`, or a method's own."""

    def check(self, walk: RelevanceWalk) -> None:
        """Raise ValueError where the rules do not fit the network as a whole."""

    def way(self, walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
        """How relevance passes `node`."""


@dataclass(frozen=True)
class Way:
    """How relevance passes one step.

    take    (view of the step, relevance of its result for each target) -> relevance of what it reads
    inputs  whether it reads the step's active inputs
    output  whether it reads the step's result
    """

    take: Callable[[StepView, list[Any]], Given]
    inputs: bool = True
    output: bool = False


@dataclass
class Passed:
    """What a pass leaves for the walk back. Used up by it.

    values  by index: what was kept, the weights, the sizes
    shapes  shapes of the tensors computed
    taps    values whose relevance is wanted too, and `tapped`, where it is put, for each target
    """

    values: dict[int, Any]
    shapes: dict[int, torch.Size]
    taps: frozenset[int] = frozenset()
    tapped: dict[int, list[Tensor]] = field(default_factory=dict)


#: Steps that only move values, or add them up with equal weights and no share to give.
_MOVE_NAMES = """
reshape pad cat getitem index index_select slice_scatter select_scatter constant_pad_nd
reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
unfold gather copy masked_fill
"""
_MOVES = frozenset(_MOVE_NAMES.split())
#: Odd functions, and |x| = x sign(x): what leaves one came in through its input, as at the activations of `nodes`.
_ODD = frozenset(["abs", "asinh", "atan", "erf", "hardshrink", "sinh", "softshrink"])
_DROPPED_OUT = frozenset(["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"])
_AVERAGES = frozenset(["mean", "sum"])
#: Each element is that of one of the operands, which its derivative says; of equal ones half each.
_SELECTIONS = frozenset(["maximum", "minimum", "where"])
_NORM_NAMES = """
batch_norm _native_batch_norm_legit_no_training layer_norm native_layer_norm group_norm native_group_norm
instance_norm rms_norm
"""
_NORMS = frozenset(_NORM_NAMES.split())
_POSITIVE = frozenset(["relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "softmax", "exp", "square", "abs"])
_registered: dict[str, str | Callable[[StepView, list[Any]], Given]] = {}
_NAMED = ("pass", "gradient", "epsilon")


def register_relevance_rule(operator: str, rule: str | Callable[[Any, Tensor], dict[int, Tensor]]) -> None:
    """Teach the relevance engine an operator, for this process.

        fastcam.register_relevance_rule("mylib::swoosh", "pass")

    operator  name as the error gives it: "aten::cumprod", "mylib::swoosh"
    rule      "pass": the relevance of the result goes to the first activation, which has its shape
              "gradient": times the derivative at the values of the pass
              "epsilon": x times the derivative's transpose of R / st(result)
              or a callable (step, R) -> {index of a value read: its relevance}, which may read `step.get(index)`,
              `step.source` (the index of the first activation), `step.node` and `step.run(step.get)` (the result)

    Raises ValueError for another text or name, TypeError for another type.
    """
    if not isinstance(operator, str) or "::" not in operator:
        raise ValueError(f'operator must be named as the error names it, like "aten::cumprod"; got {operator!r}')
    if isinstance(rule, str) and rule not in _NAMED:
        raise ValueError(f"rule must be one of {', '.join(map(repr, _NAMED))} or a callable; got {rule!r}")
    if not isinstance(rule, str) and not callable(rule):
        raise TypeError(f"rule must be a text or a callable; got {type(rule).__name__}")
    if callable(rule):
        function = rule

        def take(step: StepView, given: list[Any]) -> Given:
            found: Given = {}
            for one in given:
                for ref, part in function(step, one.tensor()).items():
                    found.setdefault(ref, []).append(Relevance(part))
            return found

        _registered[operator] = take
    else:
        _registered[operator] = rule


def known() -> int:
    """A number that changes when rules are registered."""
    return hash(tuple(_registered.items()))


class RelevanceWalk:
    """The way back from some values of a program to value `stop`.

    program   with batch norms folded where they are to be
    stop      index of the value whose relevance is wanted: the image, or a feature map
    nodes     the steps after it, in order, as far as relevance may come from them
    sizes     values read that are the batch size
    composer  chooses the rules
    ends      values that must survive the pass beside what the rules read: where relevance starts, and outputs
    rest      steps that only the output needs, and no relevance passes
    beside    values that enter beside `stop` and follow from the image too: a skip around the layer. They take their
              shares, which go no further

    Raises UnsupportedOpError where a step has no rule.
    """

    def __init__(
        self, program: Program, stop: int, nodes: Sequence[Node], sizes: frozenset[int], composer: Composer,
        ends: frozenset[int], packed: bool, rest: Sequence[Node] = (), beside: frozenset[int] = frozenset(),
    ):  # fmt: skip
        self.program = program
        self.stop = stop
        self.nodes = nodes
        self.ends = ends
        self.first = _reads_image(program, nodes)
        self.nonnegative = nonnegative(program)
        self.weights = ModifiedWeights()
        self._sizes = sizes
        self._beside = frozenset(ref for ref in beside if (program.nodes[ref].dtype or torch.float32).is_floating_point)
        composer.check(self)
        made = {node.index for node in nodes}
        self._steps: list[tuple[Node, frozenset[int], Way]] = []
        keep = {stop} | {node.index for node in nodes if node.kind == "size"}
        varies = {stop} | self._beside
        for node in nodes:
            active = frozenset(ref for ref in node.refs() if ref in varies)
            if not active or node.kind == "size" or reads_size_alone(node, active):
                continue
            if node.dtype is not None and not node.dtype.is_floating_point:
                continue
            varies.add(node.index)
            way = registered_way(node) or composer.way(self, node, active)
            if way.inputs:
                keep |= active
            if way.output:
                keep.add(node.index)
            keep |= made.intersection(node.refs()) - active
            self._steps.append((node, active, way))
        self._needed = frozenset(keep)
        made |= {node.index for node in rest}
        self._schedule = Schedule(program, made, frozenset(keep) | ends, True, packed)

    def record(self, features: Tensor, given: Mapping[int, Any], batch: int) -> Passed:
        """Run the steps on `features`; `given` holds the weights and what else enters."""
        values = dict(given)
        values[self.stop] = features
        for index in self._sizes:
            values[index] = batch
        shapes = {self.stop: features.shape} | {index: values[index].shape for index in self._beside}
        self._schedule.run(values, shapes=shapes)
        return Passed(values, shapes)

    def relevance(
        self, passed: Passed, seeds: Mapping[int, list[Tensor]], taps: frozenset[int] = frozenset()
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """Relevance at `stop` for each target, and at the values of `taps`; uses `passed` up.

        seeds  index of a value -> its relevance, for each target
        """
        found: dict[int, list[Any]] = {ref: [Relevance(one) for one in many] for ref, many in seeds.items()}
        passed.taps = taps
        self.propagate(passed, self._steps, found)
        if self.stop not in found:
            raise RuntimeError("no relevance reaches the layer: the score does not depend on it")
        result = [one.tensor() for one in found.pop(self.stop)]
        if self.stop in taps:
            passed.tapped[self.stop] = result
        return result, passed.tapped

    def propagate(
        self, passed: Passed, part: Sequence[tuple[Node, frozenset[int], Way]], found: dict[int, list[Any]]
    ) -> None:
        """Walk back through some steps; `found` holds relevance by index, and in the end what lies before them."""
        for node, active, way in reversed(part):
            given = found.pop(node.index, None)
            if given is not None:
                if node.index in passed.taps:
                    passed.tapped[node.index] = [one.tensor() for one in given]
                    given = [Relevance(one) for one in passed.tapped[node.index]]
                step = StepView(node, active, passed.values.__getitem__, passed.shapes, passed)
                try:
                    pieces = way.take(step, given)
                except NoRule as error:
                    raise unsupported(node, str(error)) from error
                except Exception as error:
                    raise RuntimeError(f"{type(error).__name__}: {error}\nin the relevance rule of {node}") from error
                del given
                for ref, piece in pieces.items():
                    if ref not in self._beside:
                        accumulate(found, ref, piece)
            # Whatever reads a value comes after the step that made it, and so has had its turn.
            if node.index != self.stop:
                passed.values.pop(node.index, None)

    def between(self, start: int, end: int) -> list[tuple[Node, frozenset[int], Way]]:
        """The steps from value `start` on that lead to value `end`."""
        inside = self.program.ancestors(frozenset({end})) & self.program.descendants(start) - {start}
        return [step for step in self._steps if step[0].index in inside]


def accumulate(found: dict[int, list[Any]], ref: int, piece: list[Any]) -> None:
    """Add relevance at value `ref` to what it has."""
    earlier = found.get(ref)
    if earlier is None:
        found[ref] = list(piece)
        return
    merged: list[Any] = []
    for one, other in zip(earlier, piece, strict=True):
        if isinstance(one, dict):
            merged.append({k: one[k] + other[k] if k in one and k in other else (one | other)[k] for k in one | other})
        else:
            merged.append(add(one, other))
    found[ref] = merged


def nonnegative(program: Program) -> set[int]:
    """Indices of values that are known not to be negative."""
    found: set[int] = set()
    for node in program.nodes:
        name = op_name(node.target) if node.kind not in LEAVES else ""
        reads = [ref for ref in node.refs() if (program.nodes[ref].dtype or torch.float32).is_floating_point]
        clamped = name in ("clamp", "clamp_min", "hardtanh") and len(node.args) > 1 and _at_least_zero(node.args[1])
        kept = _keeps_sign(node, name) and bool(reads) and all(ref in found for ref in reads)
        if name in _POSITIVE or clamped or kept:
            found.add(node.index)
    return found


def _at_least_zero(bound: Any) -> bool:
    return isinstance(bound, (int, float)) and bound >= 0


def _keeps_sign(node: Node, name: str) -> bool:
    if name == "add" and node.kwargs:  # a factor
        return False
    if name in ("add", "mul", "mean", "sum", "amax", "max", "constant_pad_nd", "pad") or name in _DROPPED_OUT:
        return not any(isinstance(a, (int, float)) and not isinstance(a, bool) and a < 0 for a in node.args)
    return node.kind in ("pool", "cat", "reshape") or (node.kind == "resize" and "bicubic" not in name)


def _reads_image(program: Program, nodes: Sequence[Node]) -> frozenset[int]:
    """Weighted steps that read the image, perhaps padded, scaled or moved around first."""
    carried = {program.input}
    found = set()
    for node in nodes:
        if not carried.isdisjoint(node.refs()):
            if is_weighted(node):
                found.add(node.index)
            elif node.kind in ("reshape", "pad", "add", "mul", "cat") or op_name(node.target) == "batch_norm":
                carried.add(node.index)
    return frozenset(found)


def geometry_in(program: Program, node: Node) -> Geometry | None:
    """`Geometry.of`, which for padding "same" needs the kernel's size."""
    weight = node.args[1] if len(node.args) > 1 else None
    kernel = (program.nodes[weight.index].shape or ())[2:] if isinstance(weight, Ref) else ()
    return Geometry.of(node, tuple(size or 0 for size in kernel))


def weighted_way(walk: RelevanceWalk, node: Node, active: frozenset[int], rule: Weighted) -> Way:
    """A convolution or linear layer under `rule`."""
    geometry = geometry_in(walk.program, node)
    place = 1 if op_name(node.target) == "addmm" else 0
    source = node.args[place]
    if geometry is None or not isinstance(source, Ref) or active != frozenset({source.index}):
        raise unsupported(node, "its weight depends on the image, or its sizes do")
    signed = source.index not in walk.nonnegative

    def take(step: StepView, given: list[Any]) -> Given:
        weight, bias, _ = weight_and_bias(node, step.get) or (None, None, 0)
        if weight is None:
            raise NoRule("its weight is no matrix")
        x = step.get(source.index)
        output = step.get(node.index) if rule.needs_output else None
        layer = Layer(geometry, x, output, weight, bias, signed, walk.weights)
        prepared = rule.prepare(layer)
        return {source.index: [rule.send(layer, prepared, one) for one in given]}

    return Way(take, inputs=True, output=rule.needs_output)


def general_way(node: Node, active: frozenset[int], rules: Mapping[str, Rule]) -> Way:
    """A step without weights. `rules` by kind: activation, add, pool, max_pool, norm, product."""
    name = op_name(node.target)

    def bound(function: Callable[[StepView, Rule, list[Any]], Given], rule: Rule, inputs: bool = True) -> Way:
        return Way(lambda step, given: function(step, rule, given), inputs)

    if name in _DROPPED_OUT or name in ("detach", "alias", "clone", "contiguous", "neg"):
        return bound(steps.passed, Pass(), inputs=False)
    if node.kind in ("reshape", "cat", "pad") or name in _MOVES:
        return bound(steps.moved, Pass(), inputs=False)
    if node.kind == "activation" or name in ACTIVATIONS or name in _ODD:
        rule = rules["activation"]
        if isinstance(rule, Rectified) and name == "relu":
            return Way(bound(steps.rectified, rule).take, inputs=False, output=rule.mask)
        return bound(steps.activation, rule, inputs=not isinstance(rule, Pass))
    if name.startswith(("max_pool", "adaptive_max_pool")) or name in ("amax", "fractional_max_pool2d"):
        return bound(steps.max_pool, rules["max_pool"])
    if node.kind in ("pool", "resize") or name in _AVERAGES:
        rule = rules["pool"]
        return bound(steps.average, rule, inputs=not isinstance(rule, Gradient))
    if name in ("add", "sub", "rsub"):
        rule = rules["add"]
        return bound(steps.summed, rule, inputs=not isinstance(rule, (Pass, Gradient)))
    if name in ("mul", "div") and not node.kwargs:
        rule = rules["product"]
        return bound(steps.product, rule, inputs=isinstance(rule, Gradient))
    if name == "glu":
        rule = rules["product"]
        return bound(steps.gated, rule, inputs=isinstance(rule, Gradient))
    if name in _SELECTIONS:
        return bound(steps.derivative, Gradient())
    if name in _NORMS:
        rule = rules["norm"]
        if name == "batch_norm" and node.args[5] is not False:
            raise unsupported(node, "a norm by the batch's own statistics")
        moves = name == "batch_norm" and isinstance(rule, Gradient)  # affine: its derivative reads no values
        return bound(steps.norm, rule, inputs=not moves and not isinstance(rule, Pass))
    if isinstance(rules["activation"], Gradient) and isinstance(rules["add"], Gradient):
        return bound(steps.derivative, Gradient())
    raise unsupported(node)


def registered_way(node: Node) -> Way | None:
    """By the rule the user has registered for the step's operator, if any: it comes before every other."""
    rule = _registered.get(_full_name(node))
    if rule is None:
        return None
    if callable(rule):
        return Way(rule)
    if rule == "pass":
        return Way(lambda step, given: steps.passed(step, Pass(), given), inputs=False)
    if rule == "gradient":
        return Way(lambda step, given: steps.derivative(step, Gradient(), given))

    def epsilon(step: StepView, given: list[Any]) -> Given:
        result = step.run(step.get)
        shares = [Relevance(steps._share(one.tensor(), result, Epsilon().epsilon)) for one in given]
        found = steps.derivative(step, Gradient(), shares)
        return {ref: [Relevance(one.tensor(), step.get(ref)) for one in many] for ref, many in found.items()}

    return Way(epsilon)


def unsupported(node: Node, what: str = "") -> UnsupportedOpError:
    """The error for a step without a rule; `what` says more about it."""
    operator = _full_name(node)
    return UnsupportedOpError(
        f"no relevance rule for {operator}{what and f' ({what})'} at {node}; teach it with "
        f'fastcam.register_relevance_rule("{operator}", "pass"), or "gradient", "epsilon" or a callable '
        "(docs/relevance-rules.md)"
    )


def _full_name(node: Node) -> str:
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else op_name(node.target)
