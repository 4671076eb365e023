"""Composites: which rule each step of a network gets."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..nodes import Node, op_name
from . import steps
from .layer import is_weighted
from .rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    MaxPool,
    Norm,
    Pass,
    Raised,
    Rectified,
    Rule,
    Weighted,
    ZBox,
    ZPlus,
)
from .walk import RelevanceWalk, Way, general_way, unsupported, weighted_way

__all__ = ["COMPOSITES", "Composite", "as_captum", "named"]

_ALLOWED: dict[str, tuple[type[Rule], ...]] = {
    "activation": (Pass, Gradient, Rectified),
    "add": (Norm, Pass, Gradient),
    "pool": (Norm, Gradient),
    "max_pool": (MaxPool,),
    "norm": (Pass, Gradient, Epsilon),
}


@dataclass(frozen=True, eq=False)
class Composite:
    """A rule for each kind of step, with exceptions for the first layer and for layers by name.

        Composite(conv=ZPlus(), linear=Epsilon(), first=Flat(), names={"layer4.*": Gamma(0.1)})

    conv, linear  rules of convolutions and linear layers; `first`, where given, of the one that reads the image
    activation    Pass(), Gradient() or Rectified()
    add           Norm(), Pass() or Gradient(), for sums of two activations (residual connections)
    pool          Norm() or Gradient(), for average pools, means and resizing
    max_pool      a MaxPool
    norm          Pass(), Gradient() or Epsilon(), for norms that are not folded into the convolution before them
    names         pattern of dotted module names (`*` matches any part) -> rule of the steps inside; the first match
                  counts
    """

    conv: Weighted = field(default_factory=ZPlus)
    linear: Weighted = field(default_factory=Epsilon)
    first: Weighted | None = None
    activation: Rule = field(default_factory=Pass)
    add: Rule = field(default_factory=Norm)
    pool: Rule = field(default_factory=Norm)
    max_pool: MaxPool = field(default_factory=MaxPool)
    norm: Rule = field(default_factory=Pass)
    names: Mapping[str, Rule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weighted: dict[str, Rule] = {"conv": self.conv, "linear": self.linear}
        given = weighted if self.first is None else weighted | {"first": self.first}
        for name, rule in given.items():
            if not isinstance(rule, Weighted):
                raise TypeError(f"{name} must be a rule of weighted layers, such as ZPlus(); got {rule!r}")
        for name, kinds in _ALLOWED.items():
            if not isinstance(getattr(self, name), kinds):
                wanted = ", ".join(f"{kind.__name__}()" for kind in kinds)
                raise TypeError(f"{name} must be one of {wanted}; got {getattr(self, name)!r}")
        for pattern, rule in self.names.items():
            if not isinstance(pattern, str) or not isinstance(rule, Rule):
                raise TypeError(f"names must map patterns of module names to rules; got {pattern!r}: {rule!r}")

    def check(self, walk: RelevanceWalk) -> None:
        """As `walk.Composer`: every pattern of `names` must match a step of the network."""
        modules = {node.module for node in walk.program.nodes}
        for pattern in self.names:
            if not any(fnmatch.fnmatchcase(module, pattern) for module in modules):
                close = difflib.get_close_matches(pattern, modules, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"the composite's pattern {pattern!r} matches no module that takes a step{hint}")

    def weighted(self, kind: str, module: str, first: bool) -> Weighted:
        """The rule of a convolution ("conv") or linear layer ("linear") inside `module`."""
        exception = self.exception(module)
        if isinstance(exception, Weighted):
            return exception
        if first and self.first is not None:
            return self.first
        return self.conv if kind == "conv" else self.linear

    def way(self, walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
        """As `walk.Composer`."""
        if is_weighted(node):
            kind = "conv" if node.kind == "conv" else "linear"
            rule = self.weighted(kind, node.module, node.index in walk.first)
            return weighted_way(walk, node, active, rule)
        if op_name(node.target) in ("einsum", "tensordot") and sum(ref in active for ref in node.refs()) == 1:
            linear = self.weighted("linear", node.module, False)
            if not isinstance(linear, (Epsilon, Gradient)):
                raise unsupported(node, f"its rules are Epsilon and Gradient, not {type(linear).__name__}")
            return Way(lambda step, given: steps.linear_map(step, linear, given), isinstance(linear, Epsilon))
        exception = self.exception(node.module)
        rules = {
            "activation": self.activation,
            "add": self.add,
            "pool": self.pool,
            "max_pool": self.max_pool,
            "norm": self.norm,
            "product": Gradient() if isinstance(self.add, Gradient) else Pass(),
        }
        for kind, kinds in _ALLOWED.items():
            if isinstance(exception, kinds):
                rules[kind] = exception
        return general_way(node, active, rules)

    def exception(self, module: str) -> Rule | None:
        """The rule that `names` gives steps of `module`, if any."""
        for pattern, rule in self.names.items():
            if fnmatch.fnmatchcase(module, pattern):
                return rule
        return None


def _epsilon_plus(**options: Any) -> Composite:
    return Composite(conv=_made(ZPlus, options), linear=_made(Epsilon, options))


def _flat(composite: Callable[..., Composite]) -> Callable[..., Composite]:
    return lambda **options: replace(composite(**options), first=_made(Flat, options, "bias"))


def _alpha_beta(**options: Any) -> Composite:
    return Composite(conv=_made(AlphaBeta, options), linear=_made(Epsilon, options))


def _gamma_box(**options: Any) -> Composite:
    for bound in ("low", "high"):
        if options.get(bound) is None:
            raise ValueError(
                "composite 'epsilon_gamma_box' needs low= and high=, the least and greatest values of a prepared "
                "image: numbers, tensors or 'minmax'"
            )
    return Composite(conv=_made(Gamma, options), linear=_made(Epsilon, options), first=_made(ZBox, options, "bias"))


def _excitation(**options: Any) -> Composite:
    plus = _made(ZPlus, options)
    return Composite(conv=plus, linear=plus, activation=Gradient(), norm=Gradient())


def _backpropagation(activation: Rule) -> Callable[..., Composite]:
    def make(**options: Any) -> Composite:
        through = Gradient()
        return Composite(through, through, None, activation, through, through, MaxPool(), through)

    return make


def _made(rule: type[Any], options: dict[str, Any], *without: str) -> Any:
    known = {name: options[name] for name in rule.__dataclass_fields__ if options.get(name) is not None}
    return rule(**{name: value for name, value in known.items() if name not in without})


#: Name -> composite for the numbers `epsilon`, `gamma`, `alpha`, `beta`, `low`, `high` and `bias`, as far as it has
#: them.
COMPOSITES: dict[str, Callable[..., Composite]] = {
    "epsilon_plus": _epsilon_plus,
    "epsilon_plus_flat": _flat(_epsilon_plus),
    "epsilon_gamma_box": _gamma_box,
    "epsilon_alpha2_beta1": _alpha_beta,
    "epsilon_alpha2_beta1_flat": _flat(_alpha_beta),
    "excitation_backprop": _excitation,
    "guided_backprop": _backpropagation(Rectified(mask=True)),
    "deconvnet": _backpropagation(Rectified(mask=False)),
}


def named(name: str, **options: Any) -> Composite:
    """The composite of this name; ValueError with the names there are."""
    if name not in COMPOSITES:
        close = difflib.get_close_matches(str(name), COMPOSITES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no composite {name!r}; {hint}composites: {', '.join(COMPOSITES)}")
    found = COMPOSITES[name](**options)
    rules = [rule for rule in (found.conv, found.linear, found.first) if not isinstance(rule, (Gradient, type(None)))]
    usual = {"bias": True}
    for option, value in options.items():
        read = any(option in rule.__dataclass_fields__ for rule in rules)
        if not read and value is not None and value != usual.get(option):
            raise ValueError(f"composite {name!r} has no {option}; it was given {option}={value!r}")
    return found


def as_captum(composite: Composite, epsilon: float = 1e-9) -> Composite:
    """The composite as Captum computes it, with one stabiliser for all steps.

    Raw biases, signs of inputs not told apart, and the epsilon rule at pools, sums and norms; a maximum of 0 passes
    nothing on. ValueError for a rule Captum does not have.
    """

    def translated(rule: Rule) -> Rule:
        if isinstance(rule, Epsilon):
            return Epsilon(epsilon, bias=rule.bias)
        if isinstance(rule, Gamma):
            return Raised(1.0, rule.gamma, bias=rule.bias, epsilon=epsilon)
        if isinstance(rule, ZPlus) or (isinstance(rule, AlphaBeta) and rule.beta == 0):
            return Raised(0.0, 1.0, bias=rule.bias, epsilon=epsilon)
        raise ValueError(
            f"convention='captum' has the rules Epsilon, Gamma and ZPlus (its alpha1-beta0), and none like {rule!r}; "
            "use convention='zennit'"
        )

    found: dict[str, Any] = {
        "conv": translated(composite.conv),
        "linear": translated(composite.linear),
        "first": None if composite.first is None else translated(composite.first),
        "names": {pattern: translated(rule) for pattern, rule in composite.names.items()},
        "max_pool": replace(composite.max_pool, epsilon=epsilon),
    }
    return replace(composite, add=Norm(epsilon), pool=Norm(epsilon), norm=Epsilon(epsilon), **found)
