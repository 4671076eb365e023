"""Relevance rules: what a step does with the relevance of its result.

A rule is a few numbers and one formula. R is the relevance at the step's result z = W x + b, R' what it gives at x;
c(u, V) is the step without bias, t(s, V) its transpose, u+ = max(u, 0), u- = min(u, 0), st(d) = d + eps sign d with
sign 0 = 1. Weighted steps see x >= 0 only (`Layer.parts`): there c(x+, W+) + c(x-, W-) is what W+ makes of x.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from fastcam import ops

from .layer import Layer
from .messages import Relevance, divided

__all__ = [
    "AlphaBeta", "Epsilon", "Flat", "Gamma", "Gradient", "MaxPool", "Norm", "Pass", "Raised", "Rap", "Rectified",
    "Rule", "WSquare", "Weighted", "ZBox", "ZPlus",
]  # fmt: skip

#: How much of W+ and of W- a message goes through.
Mix: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Rule:
    """How relevance passes a step."""


@dataclass(frozen=True)
class Weighted(Rule, ABC):
    """A rule for convolutions and linear layers.

    bias     whether biases take part, and so absorb relevance
    epsilon  stabiliser; 0 for a guarded division (x / 0 = 0)
    """

    needs_output: ClassVar[bool] = False

    # By keyword only, so that `Gamma(0.1)` is a Gamma of 0.1.
    bias: bool = field(default=True, kw_only=True)
    epsilon: float = field(default=1e-6, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias must be True or False; got {self.bias!r}")
        if not (isinstance(self.epsilon, (int, float)) and math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"epsilon must be a finite number, not negative; got {self.epsilon!r}")

    @abstractmethod
    def prepare(self, layer: Layer) -> Any:
        """What is the same for every target: the modified forward."""

    @abstractmethod
    def send(self, layer: Layer, prepared: Any, relevance: Relevance) -> Relevance:
        """R -> R'."""


@dataclass(frozen=True)
class Epsilon(Weighted):
    """R' = x t(R / st(z), W). One transpose."""

    needs_output = True

    epsilon: float = 1e-6

    def prepare(self, layer: Layer) -> Tensor:
        if self.bias or layer.bias is None:
            return layer.output
        return layer.output - layer.bias.reshape(-1, *(1,) * layer.geometry.rank)

    def send(self, layer: Layer, prepared: Tensor, relevance: Relevance) -> Relevance:
        return Relevance(layer.back(divided(relevance, prepared, self.epsilon), layer.weight), layer.inputs)


@dataclass(frozen=True)
class ZPlus(Weighted):
    """R' = x+ t(s, W+) + x- t(s, W-), s = R / st(c(x+, W+) + c(x-, W-) + b+). One forward, one transpose for x >= 0."""

    def prepare(self, layer: Layer) -> Tensor:
        return layer.positive_contributions(self.bias)

    def send(self, layer: Layer, prepared: Tensor, relevance: Relevance) -> Relevance:
        message = divided(relevance, prepared, self.epsilon)
        return Relevance(*layer.merged(layer.back(message, layer.split("positive"), layer.parts.shape)))


@dataclass(frozen=True)
class Raised(Weighted):
    """R' = x t(R / st(c(x, V) + b), V) with V = own W + positive W+, whatever the signs of x and b: the gamma rule
    (own 1, positive gamma) and the alpha1-beta0 rule (0, 1) as Captum has them. One forward, one transpose."""

    own: float = 1.0
    positive: float = 0.25

    def weight(self, layer: Layer) -> Tensor:
        return layer.raised(self.own, self.positive)

    def prepare(self, layer: Layer) -> Tensor:
        return layer.forward(layer.inputs, self.weight(layer), layer.bias if self.bias else None)

    def send(self, layer: Layer, prepared: Tensor, relevance: Relevance) -> Relevance:
        message = divided(relevance, prepared, self.epsilon)
        return Relevance(layer.back(message, self.weight(layer)), layer.inputs)


@dataclass(frozen=True)
class _Split(Weighted):
    """A rule with a message for positive and one for negative contributions. One forward, one transpose of both."""

    needs_output = True
    name: ClassVar[str]

    @property
    @abstractmethod
    def numbers(self) -> tuple[float, float]:
        """`first` and `second` of the op."""

    @property
    def mixes(self) -> tuple[Mix, Mix]:
        """For either message, how much of W+ and of W- it goes through."""
        return (1.0, 0.0), (0.0, 1.0)

    def prepare(self, layer: Layer) -> tuple[Tensor, Tensor]:
        output = layer.output
        if not self.bias and layer.bias is not None:
            output = output - layer.bias.reshape(-1, *(1,) * layer.geometry.rank)
        return output, layer.positive_contributions(self.bias)

    def send(self, layer: Layer, prepared: tuple[Tensor, Tensor], relevance: Relevance) -> Relevance:
        first, second = self.numbers
        output, positive = prepared
        shape = output.shape
        tensors = [relevance.values, output, positive, relevance.factor]
        if layer.geometry.rank == 0:  # features come last
            tensors = [None if x is None else x.reshape(-1, shape[-1]) for x in tensors]
        r, z, p, factor = tensors
        assert r is not None
        assert z is not None
        assert p is not None
        options = {"rule": self.name, "first": first, "second": second, "epsilon": self.epsilon}
        messages = ops.relevance_split(r, z, p, factor, **options)  # type: ignore[arg-type]
        if layer.geometry.rank == 0:
            messages = messages.reshape(*shape[:-1], -1)
        return Relevance(*layer.merged(layer.send_both(messages, *self.mixes)))


@dataclass(frozen=True)
class AlphaBeta(_Split):
    """R' = alpha x t(R / st(p), W+) - beta x t(R / st(n), W-) for the positive and negative contributions p, n to z.

    x stands for both its signs: positive contributions are x+ W+ and x- W-. alpha - beta = 1.
    """

    name = "alpha_beta"
    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.beta < 0 or not math.isclose(self.alpha - self.beta, 1):
            raise ValueError(
                f"alpha - beta must be 1 and neither negative; got alpha={self.alpha!r}, beta={self.beta!r}"
            )

    @property
    def numbers(self) -> tuple[float, float]:
        return self.alpha, self.beta


@dataclass(frozen=True)
class Gamma(_Split):
    """R' = x t(R / st(z + gamma p), W + gamma W+) where z > 0, x t(R / st(z + gamma n), W + gamma W-) where z < 0."""

    name = "gamma"
    gamma: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma must be a finite number, not negative; got {self.gamma!r}")

    @property
    def numbers(self) -> tuple[float, float]:
        return self.gamma, 1.0

    @property
    def mixes(self) -> tuple[Mix, Mix]:
        return (1 + self.gamma, 1.0), (1.0, 1 + self.gamma)


@dataclass(frozen=True)
class Rap(_Split):
    """Relative Attributing Propagation: C = x t(R+ / p, W+) + x t(R- / |n| + R / (p + |n|), |W-|), then the difference
    of the totals of C and R is taken from the entries of C that are not 0, in equal parts."""

    name = "rap"
    bias: bool = field(default=False, kw_only=True)
    epsilon: float = field(default=0.0, kw_only=True)

    @property
    def numbers(self) -> tuple[float, float]:
        return 1.0, 1.0

    @property
    def mixes(self) -> tuple[Mix, Mix]:
        return (1.0, 0.0), (0.0, -1.0)

    def send(self, layer: Layer, prepared: tuple[Tensor, Tensor], relevance: Relevance) -> Relevance:
        given = relevance.tensor()
        if layer.geometry.rank:
            found = super().send(layer, prepared, Relevance(given)).tensor()
        else:  # the released code treats both signs of R alike in linear layers
            output, positive = prepared
            messages = [ops.relevance_divide(given, d, epsilon=0.0) for d in (positive, 2 * positive - output)]
            found = Relevance(*layer.merged(layer.send_both(torch.cat(messages, -1), *self.mixes))).tensor()
        return Relevance(balanced(found, given))


def balanced(found: Tensor, given: Tensor) -> Tensor:
    """`found` less what it totals more than `given`, in equal parts from those of an image's entries that are not 0."""
    entries = found != 0
    # Summed over dimensions: a view as rows would tie an exported program to the memory layout of its trace.
    count = entries.sum(tuple(range(1, entries.ndim)))
    excess = found.sum(tuple(range(1, found.ndim))) - given.sum(tuple(range(1, given.ndim)))
    unit = torch.where(count > 0, excess / count.clamp(min=1), 0.0)
    return found - unit.reshape(-1, *(1,) * (found.ndim - 1)) * entries


@dataclass(frozen=True)
class ZBox(Weighted):
    """R' = (x - low) t(s, W+) + (x - high) t(s, W-), s = R / st(c(x, W) - c(low, W+) - c(high, W-)).

    low, high  bounds of x: numbers, tensors that broadcast to x, or "minmax": least and greatest value of each image
    """

    needs_output = True
    low: float | Tensor | Literal["minmax"] = "minmax"
    high: float | Tensor | Literal["minmax"] = "minmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if all(isinstance(v, (int, float)) for v in (self.low, self.high)) and self.low > self.high:  # type: ignore[operator]
            raise ValueError(f"low must not exceed high; got low={self.low!r}, high={self.high!r}")
        for name, value in (("low", self.low), ("high", self.high)):
            if isinstance(value, str) and value != "minmax":
                raise ValueError(f"{name} must be a number, a tensor or 'minmax'; got {value!r}")

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each (B or 1, 1 or C, ...), of as many dimensions as x."""
        found = []
        for value, extreme in ((self.low, torch.amin), (self.high, torch.amax)):
            if isinstance(value, str):
                bound = extreme(x.flatten(1), 1).reshape(-1, *(1,) * (x.ndim - 1))
            elif isinstance(value, Tensor):
                bound = value.to(x)
                bound = bound.reshape(*(1,) * (x.ndim - bound.ndim), *bound.shape)
            else:
                bound = x.new_full((1,) * x.ndim, float(value))
            found.append(bound)
        return found[0], found[1]

    def prepare(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        x = layer.inputs
        low, high = self.bounds(x)
        sums = layer.output
        if layer.bias is not None:
            sums = sums - layer.bias.reshape(-1, *(1,) * layer.geometry.rank)
        for bound, sign in ((low, "positive"), (high, "negative")):
            weight = layer.modified(sign)  # type: ignore[arg-type]
            if bound[0].numel() == 1:  # one number an image: the same sums, scaled
                sums = sums - bound * layer.forward(torch.ones_like(x[:1]), weight)
            else:
                sums = sums - layer.forward(bound.expand(bound.shape[0], *x.shape[1:]).contiguous(), weight)
        return sums, low, high

    def send(self, layer: Layer, prepared: tuple[Tensor, Tensor, Tensor], relevance: Relevance) -> Relevance:
        sums, low, high = prepared
        message = divided(relevance, sums, self.epsilon)
        up, down = layer.back_by_sign(message)
        return Relevance(((layer.inputs - low) * up).addcmul_(layer.inputs - high, down))


@dataclass(frozen=True)
class WSquare(Weighted):
    """R' = t(R / st(c(1, W^2) + b^2), W^2), whatever x is."""

    def prepare(self, layer: Layer) -> Tensor:
        bias = None if layer.bias is None or not self.bias else layer.bias.square()
        return layer.forward(torch.ones_like(layer.inputs[:1]), layer.modified("square"), bias)

    def send(self, layer: Layer, prepared: Tensor, relevance: Relevance) -> Relevance:
        given = relevance.tensor()
        message = ops.relevance_divide(given, prepared.expand_as(given), epsilon=self.epsilon)
        return Relevance(layer.back(message, layer.modified("square")))


@dataclass(frozen=True)
class Flat(Weighted):
    """R' = t(R / st(c(1, 1)), 1): equal shares for everything a step reads, whatever x and W are."""

    bias: bool = field(default=False, kw_only=True)

    def prepare(self, layer: Layer) -> Tensor:
        return layer.forward(torch.ones_like(layer.inputs[:1]), layer.modified("ones"))

    def send(self, layer: Layer, prepared: Tensor, relevance: Relevance) -> Relevance:
        given = relevance.tensor()
        message = ops.relevance_divide(given, prepared.expand_as(given), epsilon=self.epsilon)
        geometry = layer.geometry
        if geometry.transposed or geometry.groups > 1:
            return Relevance(layer.back(message, layer.modified("ones")))
        # All weights are one, so channels are added up first and the sum goes to each of them.
        dim = 1 if geometry.rank else -1
        message = message.sum(dim, keepdim=True)
        weight = layer.weight.new_ones((1, 1, *layer.weight.shape[2:]))
        shape = list(layer.inputs.shape)
        shape[dim] = 1
        return Relevance(layer.back(message, weight, torch.Size(shape)).expand_as(layer.inputs))


@dataclass(frozen=True)
class Gradient(Weighted):
    """R' = t(R, W): the ordinary transpose, at any step; elsewhere than at weighted steps the derivative at x."""

    def prepare(self, layer: Layer) -> None:
        return None

    def send(self, layer: Layer, prepared: None, relevance: Relevance) -> Relevance:
        return Relevance(layer.back(relevance.tensor(), layer.weight))


@dataclass(frozen=True)
class Pass(Rule):
    """R' = R, where the step keeps the shape; for sums and products of two tensors, see `walk`."""


@dataclass(frozen=True)
class Norm(Rule):
    """R' = x J^T (R / st(f(x))) for sums, means, average pools and resizing, whose weights are not negative."""

    epsilon: float = 1e-6


@dataclass(frozen=True)
class Rectified(Rule):
    """R' = max(R, 0) at ReLUs; with `mask` also 0 where x <= 0 (guided backpropagation; without: DeconvNet). Any other
    activation has its derivative."""

    mask: bool = True


@dataclass(frozen=True)
class MaxPool(Rule):
    """Where a window's relevance goes.

    "winner"        to its maximum, the first of several
    "proportional"  in proportion to max(x, 0), to all alike where that is 0
    "ties"          to its maxima in equal parts

    epsilon  None, or the maximum z lets only z / st(z) of it through: nothing where it is 0
    """

    share: Literal["winner", "proportional", "ties"] = "winner"
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.share not in ("winner", "proportional", "ties"):
            raise ValueError(f"max_pool must be 'winner', 'proportional' or 'ties'; got {self.share!r}")
