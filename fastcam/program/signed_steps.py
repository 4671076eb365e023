"""RevealCancel, step by step: positive and negative parts of differences forwards, their multipliers backwards.

A difference from the reference is kept as two parts, d = p + n, and each part has its own multiplier. Affine steps send
what raises their result to its positive part and what lowers it to its negative part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .nodes import Node, Ref, map_refs, op_name
from .rescale import AFFINE, ELEMENTWISE, Step, UnsupportedOpError, maxima, pointwise, rule_for
from .rescale.pointwise import secant
from .transpose import Cotangent, transpose

__all__ = ["Multipliers", "Parts", "SignedRule", "SignedStep", "by_sign", "parts_of", "signed_rule_for"]


class Parts(NamedTuple):
    """A value in both passes, and the two parts of its difference; tuples of them for several results.

    The difference of the passes is what the parts add up to, and exact where they are equal.
    """

    reference: Any
    target: Any
    positive: Any
    negative: Any


class Multipliers(NamedTuple):
    """Multipliers of a difference's two parts."""

    positive: Cotangent
    negative: Cotangent


Saved: TypeAlias = Any
_REFERENCE, _TARGET, _POSITIVE, _NEGATIVE = range(4)


@dataclass(frozen=True)
class SignedStep:
    """A step, as a rule sees it.

    parts   of the values it reads that differ between the passes, by index
    get     everything else it reads: weights, sizes, constants
    shapes  of the former
    """

    node: Node
    parts: Mapping[int, Parts]
    get: Callable[[int], Any]
    shapes: Mapping[int, torch.Size]

    @property
    def source(self) -> int:
        """Index of the one value read that differs."""
        return next(ref for ref in self.node.refs() if ref in self.parts)

    def run(self, which: int, constant: Callable[[int], Any] | None = None) -> Any:
        """The step's operator on the reference (0), the target (1), the positive (2) or the negative parts (3)."""
        constant = constant or self.get
        return self.at(lambda ref: self.parts[ref][which] if ref in self.parts else constant(ref))

    def passes(self) -> tuple[Any, Any]:
        """The step's operator on reference and target."""
        return self.run(_REFERENCE), self.run(_TARGET)

    def at(self, value: Callable[[int], Any]) -> Any:
        return self.node.target(*map_refs(self.node.args, value), **map_refs(self.node.kwargs, value))

    def transposed(self, given: Cotangent, constant: Callable[[int], Any] | None = None) -> dict[int, Cotangent]:
        return transpose(self.node, given, frozenset(self.parts), self.shapes, constant or self.get)


@dataclass(frozen=True)
class SignedRule:
    """forward   step -> parts of the result, and what `backward` will need of them
    backward  (step without values, saved, multipliers at the result) -> multipliers at what the step reads
    """

    forward: Callable[[SignedStep], tuple[Parts, Saved]]
    backward: Callable[[SignedStep, Saved, Multipliers], dict[int, Multipliers]]


def parts_of(difference: Tensor) -> tuple[Tensor, Tensor]:
    return difference.clamp(min=0), difference.clamp(max=0)


def by_sign(difference: Tensor, given: Multipliers) -> Any:
    """The multiplier of a difference taken as a whole: that of the part it is, the mean of both where it is zero."""
    positive, negative = _tensors(given)
    middle = (positive + negative) / 2
    return torch.where(difference > 0, positive, torch.where(difference < 0, negative, middle))


def _tensors(given: Multipliers) -> tuple[Tensor, Tensor]:
    positive, negative = given
    assert isinstance(positive, Tensor)
    assert isinstance(negative, Tensor)
    return positive, negative


# --- weighted sums: the Linear rule ---


def _weight(step: SignedStep) -> int:
    """Index of the constant that the one difference is multiplied by."""
    return next(a.index for a in step.node.args[:2] if isinstance(a, Ref) and a.index != step.source)


def _halves(step: SignedStep) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """The step's constants with the positive and with the negative weights only, and without biases."""
    weight = _weight(step)

    def half(**bound: float) -> Callable[[int], Any]:
        def get(ref: int) -> Any:
            value = step.get(ref)
            if ref == weight:
                return value.clamp(**bound)
            return torch.zeros_like(value) if isinstance(value, Tensor) else value

        return get

    return half(min=0), half(max=0)


def _weigh(step: SignedStep) -> tuple[Parts, Saved]:
    reference, target, _, _ = step.parts[step.source]
    difference = target - reference
    regrouped = Parts(reference, target, *parts_of(difference))
    step = dataclasses.replace(step, parts={step.source: regrouped})
    up, down = _halves(step)
    positive = step.run(_POSITIVE, up) + step.run(_NEGATIVE, down)
    negative = step.run(_NEGATIVE, up) + step.run(_POSITIVE, down)
    return Parts(*step.passes(), positive, negative), difference


def _weigh_back(step: SignedStep, difference: Saved, given: Multipliers) -> dict[int, Multipliers]:
    up, down = _halves(step)

    def back(one: Cotangent, half: Callable[[int], Any]) -> Tensor:
        found = step.transposed(one, half)[step.source]
        assert isinstance(found, Tensor)
        return found

    rising, falling = (
        back(given.positive, one) + back(given.negative, other) for one, other in ((up, down), (down, up))
    )
    whole = by_sign(difference, Multipliers(rising, falling))
    return {step.source: Multipliers(whole, whole)}


# --- what scales, adds or moves: parts stay what they are ---


def _factor(step: SignedStep) -> Any:
    node = step.node
    name = op_name(node.target)
    if name == "batch_norm":
        weight, variance = (map_refs(node.args[at], step.get) for at in (1, 4))
        factor = (variance + node.args[7]).rsqrt()
        factor = factor if weight is None else factor * weight
        return factor.reshape(1, -1, *(1,) * (len(step.shapes[step.source]) - 2))
    other = next(arg for arg in node.args if arg != Ref(step.source))
    factor = map_refs(other, step.get)
    factor = factor if isinstance(factor, Tensor) else torch.tensor(factor, dtype=torch.float64)
    return 1 / factor if name == "div" else factor


def _scale(step: SignedStep) -> tuple[Parts, Saved]:
    _, _, p, n = step.parts[step.source]
    up, down = (half.to(device=p.device, dtype=p.dtype) for half in parts_of(_factor(step)))
    return Parts(*step.passes(), p * up + n * down, n * up + p * down), (up, down)


def _scale_back(step: SignedStep, saved: Saved, given: Multipliers) -> dict[int, Multipliers]:
    up, down = saved
    positive, negative = _tensors(given)
    shape = step.shapes[step.source]
    first, second = positive * up + negative * down, negative * up + positive * down
    return {step.source: Multipliers(first.sum_to_size(shape), second.sum_to_size(shape))}


def _signs(node: Node) -> list[tuple[Any, float]]:
    factor = node.kwargs.get("alpha", 1)
    name = op_name(node.target)
    if name == "neg":
        return [(node.args[0], -1)]
    signs = {"add": (1, factor), "sub": (1, -factor), "rsub": (-factor, 1)}[name]
    return list(zip(node.args, signs, strict=False))


def _add(step: SignedStep) -> tuple[Parts, Saved]:
    passes = step.passes()
    positive, negative = torch.zeros_like(passes[0]), torch.zeros_like(passes[0])
    for arg, sign in _signs(step.node):
        if isinstance(arg, Ref) and arg.index in step.parts:
            p, n = (part * sign for part in step.parts[arg.index][_POSITIVE:])
            positive, negative = (positive + p, negative + n) if sign > 0 else (positive + n, negative + p)
    return Parts(*passes, positive, negative), None


def _add_back(step: SignedStep, saved: Saved, given: Multipliers) -> dict[int, Multipliers]:
    found: dict[int, Multipliers] = {}
    for arg, sign in _signs(step.node):
        if isinstance(arg, Ref) and arg.index in step.parts:
            parts = [(part * sign).sum_to_size(step.shapes[arg.index]) for part in _tensors(given)]
            parts = parts if sign > 0 else parts[::-1]
            earlier = found.get(arg.index)
            if earlier is not None:
                parts = [one + other for one, other in zip(parts, earlier, strict=True)]
            found[arg.index] = Multipliers(*parts)
    return found


def _move(step: SignedStep) -> tuple[Parts, Saved]:
    """Steps without a negative coefficient; constants they move along are no part of a difference."""

    def blank(ref: int) -> Any:
        value = step.get(ref)
        return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    positive, negative = step.run(_POSITIVE, blank), step.run(_NEGATIVE, blank)
    if op_name(step.node.target) in ("pad", "constant_pad_nd", "where"):  # which may bring numbers along
        offset = step.at(lambda ref: torch.zeros_like(step.parts[ref].positive) if ref in step.parts else blank(ref))
        positive, negative = positive - offset, negative - offset
    return Parts(*step.passes(), positive, negative), None


def _move_back(step: SignedStep, saved: Saved, given: Multipliers) -> dict[int, Multipliers]:
    first, second = step.transposed(given.positive), step.transposed(given.negative)
    return {ref: Multipliers(first[ref], second[ref]) for ref in first}


# --- functions of one value: the RevealCancel rule ---


def _function(step: SignedStep) -> tuple[Parts, Saved]:
    """y+ = [f(u'+p) - f(u') + f(u'+p+n) - f(u'+n)] / 2, y- likewise; their slopes over p and n are the multipliers.

    Where u'+p or u'+n lies outside the domain of f (a negative number at a root or logarithm, across the pole of 1/u),
    both parts have Rescale's slope [f(u) - f(u')] / (u - u'), which is complete too.
    """
    u, other, p, n = step.parts[step.source]
    name = op_name(step.node.target)

    def f(x: Tensor) -> Tensor:
        return step.at(lambda ref: x if ref in step.parts else step.get(ref))

    points = (u, u + p, u + n, other)
    values = [f(x) for x in points]

    def slope(part: Tensor, *pairs: tuple[int, int]) -> Tensor:
        found = torch.zeros_like(u)
        for start, end in pairs:
            # Rounding must not pull points apart that no part lies between.
            x, y = (torch.where(part == 0, at[start], at[end]) for at in (points, values))
            found = found + secant(f, name, x, points[start], y, values[start]) / 2
        return found

    y, y_p, y_n, y_both = values
    positive, negative = ((y_p - y) + (y_both - y_n)) / 2, ((y_n - y) + (y_both - y_p)) / 2
    rising, falling = slope(p, (0, 1), (2, 3)), slope(n, (0, 2), (1, 3))
    if name in _BOUNDED:
        outside = ~(y_p.isfinite() & y_n.isfinite())
        if name == "reciprocal" or (name == "pow" and _has_pole(step.node)):
            outside = outside | ((u + p).sign() != u.sign()) | ((u + n).sign() != u.sign())
        whole = secant(f, name, other, u, y_both, y)
        rising, falling = (torch.where(outside, whole, one) for one in (rising, falling))
        positive, negative = torch.where(outside, whole * p, positive), torch.where(outside, whole * n, negative)
    return Parts(y, y_both, positive, negative), (rising, falling)


def _has_pole(power: Node) -> bool:
    exponent = power.args[1]
    return isinstance(exponent, (int, float)) and exponent < 0


#: Functions that are not defined, or not continuous, on all numbers.
_BOUNDED_NAMES = """
log log1p log2 log10 sqrt rsqrt reciprocal pow asin acos acosh atanh erfinv logit lgamma
"""
_BOUNDED = frozenset(_BOUNDED_NAMES.split())


def _function_back(step: SignedStep, saved: Saved, given: Multipliers) -> dict[int, Multipliers]:
    rising, falling = saved
    positive, negative = _tensors(given)
    return {step.source: Multipliers(positive * rising, negative * falling)}


# --- maxima, quotients and gated linear units: the Rescale rule on the whole difference ---


def _window(step: SignedStep) -> tuple[Parts, Saved]:
    read = {ref: (one.reference, one.target) for ref, one in step.parts.items()}
    reference, target = step.passes()
    if isinstance(reference, Tensor):
        difference = target - reference
        return Parts(reference, target, *parts_of(difference)), (read, difference)
    difference = target[0] - reference[0]
    positive, negative = parts_of(difference)
    return Parts(reference, target, (positive,), (negative,)), (read, difference)


def _window_back(step: SignedStep, saved: Saved, given: Multipliers) -> dict[int, Multipliers]:
    read, difference = saved
    first = [part[0] if isinstance(part, dict) else part for part in given]
    constants = {ref: step.get(ref) for ref in step.node.refs() if ref not in read}
    rescale = Step(
        step.node,
        frozenset(read),
        constants | {ref: target for ref, (_, target) in read.items()},
        constants | {ref: reference for ref, (reference, _) in read.items()},
        step.shapes,
    )
    found = rule_for(step.node, rescale.active).apply(rescale, by_sign(difference, Multipliers(*first)))
    return {ref: Multipliers(whole, whole) for ref, whole in found.items()}


_WEIGHTED = SignedRule(_weigh, _weigh_back)
_SCALED = SignedRule(_scale, _scale_back)
_SUMMED = SignedRule(_add, _add_back)
_MOVED = SignedRule(_move, _move_back)
_FUNCTION = SignedRule(_function, _function_back)
_WINDOW = SignedRule(_window, _window_back)


def signed_rule_for(node: Node, differing: frozenset[int], numbers: frozenset[int]) -> SignedRule:
    """The rule of `node`, which reads the values `differing`; UnsupportedOpError where RevealCancel has none.

    numbers  what else it reads that is computed from the images: comparisons, positions of maxima
    """
    name = op_name(node.target)
    alone = sum(ref in differing for ref in node.refs()) == 1
    leads = bool(node.args) and isinstance(node.args[0], Ref) and node.args[0].index in differing
    if not numbers:
        if name in ("add", "sub", "rsub", "neg"):
            return _SUMMED
        if alone and ((leads and node.kind in ("conv", "linear")) or name in ("matmul", "mm", "bmm")):
            return _WEIGHTED
        if alone and (name == "mul" or (leads and name == "div" and not node.kwargs)):
            return _SCALED
        if name == "batch_norm" and node.args[5] is False and alone:
            return _SCALED
        try:
            rule = rule_for(node, differing)
        except UnsupportedOpError:
            rule = None
        if alone and leads and (rule is ELEMENTWISE or name in ("relu", "leaky_relu")):
            return _FUNCTION
        if rule is not None and rule.apply in _WHOLE:
            return _WINDOW
        if rule is AFFINE and node.kind not in ("conv", "linear", "matmul", "mul", "norm") and _non_negative(node):
            return _MOVED
    raise UnsupportedOpError(
        f"no RevealCancel rule for {name} at {node}: it has rules for affine steps, functions of one value, maxima and "
        "quotients; rule='rescale' also knows products of activations, softmax and norms"
    )


#: Rules of Rescale that RevealCancel takes over.
_WHOLE = (maxima.max_pool, maxima.maximum, maxima.minimum, pointwise.quotient, pointwise.gated)


def _non_negative(node: Node) -> bool:
    name = op_name(node.target)
    aten = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    return (aten or name == "getitem") and name not in ("diff", "neg") and "bicubic" not in name
