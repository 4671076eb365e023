"""DeepLIFT's Rescale rule, operator by operator, and the registry that users may add to.

A rule turns multipliers at a step's result into multipliers at what the step reads, from the values of a target and a
reference pass. The rules here are exactly complete: the sum of multiplier times difference is the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..nodes import ACTIVATIONS, Node, Ref, op_name
from ..transpose import transpose
from . import maxima, normalisers, pointwise
from .step import Cotangents, Rule, Step

__all__ = ["AFFINE", "ELEMENTWISE", "Rule", "Step", "UnsupportedOpError", "known", "maxima", "pointwise"]
__all__ += ["register_rescale_rule", "registered", "rule_for", "unsupported"]


class UnsupportedOpError(RuntimeError):
    """A step of the network for which no Rescale rule is known."""


def _affine(step: Step, given: Any) -> Cotangents:
    """The ordinary transpose."""
    return transpose(step.node, given, step.active, step.shapes, step.target.__getitem__)


AFFINE = Rule(_affine, inputs=False)
ELEMENTWISE = Rule(pointwise.elementwise, output=True)
PRODUCT = Rule(pointwise.product)
_NAMED = {"affine": AFFINE, "elementwise": ELEMENTWISE, "product": PRODUCT}

#: Operators whose result is affine in every activation they read, whichever that is.
_AFFINE_KINDS = frozenset({"add", "cat", "reshape", "resize"})
_AFFINE_NAMES = """
mean sum cumsum neg rsub diff dropout feature_dropout alpha_dropout tril triu im2col col2im unfold fold
getitem index index_select gather copy slice_scatter select_scatter index_put masked_fill index_fill index_copy
index_add scatter_add fill rot90 diagonal hstack vstack dstack repeat_interleave
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bicubic2d_aa
pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d avg_pool1d avg_pool2d avg_pool3d
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
"""
_AFFINE = frozenset(_AFFINE_NAMES.split())
#: Operators affine in one activation while everything else they read is none.
_AFFINE_IN_ONE_KINDS = frozenset({"conv", "linear", "matmul", "mul"})
_FUNCTION_NAMES = """
exp expm1 log log1p log2 log10 sqrt rsqrt reciprocal pow square abs sign sin cos tan atan asinh sinh cosh erf
softshrink hardshrink erfc exp2 asin acos acosh atanh erfinv logit sinc lgamma round floor ceil trunc frac
"""
_ELEMENTWISE = (ACTIVATIONS - {"relu", "leaky_relu"}) | frozenset(_FUNCTION_NAMES.split())
_RULES = {
    "relu": Rule(pointwise.rectifier),
    "leaky_relu": Rule(pointwise.leaky_relu),
    "glu": Rule(pointwise.gated),
    "softmax": Rule(normalisers.softmax),
    "_softmax": Rule(normalisers.softmax),
    "log_softmax": Rule(normalisers.log_softmax),
    "_log_softmax": Rule(normalisers.log_softmax),
    "layer_norm": Rule(normalisers.layer_norm),
    "native_layer_norm": Rule(normalisers.layer_norm),
    "rms_norm": Rule(normalisers.rms_norm),
    "group_norm": Rule(normalisers.group_norm),
    "instance_norm": Rule(normalisers.instance_norm),
    "scaled_dot_product_attention": Rule(normalisers.attention),
    "amax": Rule(maxima.maximum),
    "max": Rule(maxima.maximum),
    "amin": Rule(maxima.minimum),
    "min": Rule(maxima.minimum),
    **{f"max_pool{n}d{suffix}": Rule(maxima.max_pool) for n in (1, 2, 3) for suffix in ("", "_with_indices")},
    **{f"adaptive_max_pool{n}d": Rule(maxima.max_pool) for n in (1, 2, 3)},
}
_OF_TWO = {
    "maximum": Rule(pointwise.maximum),
    "max": Rule(pointwise.maximum),
    "minimum": Rule(pointwise.minimum),
    "min": Rule(pointwise.minimum),
}
_JOINT = {
    "mul": PRODUCT,
    "div": Rule(pointwise.quotient),
    "matmul": Rule(pointwise.matrix_product),
    "mm": Rule(pointwise.matrix_product),
    "bmm": Rule(pointwise.matrix_product),
}
_registered: dict[str, Rule] = {}


def register_rescale_rule(operator: str, rule: str | Callable[[Step, Any], Cotangents] | Rule) -> None:
    """Teach the DeepLIFT engine an operator, for this process.

        fastcam.register_rescale_rule("mylib::swoosh", "elementwise")

    operator  name as the error gives it: "aten::cumprod", "mylib::swoosh"
    rule      "elementwise": slope (f(u) - f(u')) / (u - u') of a function of one tensor
              "affine": the ordinary transpose, by autograd
              "product": of two activations
              or a callable (step, multipliers at the result) -> {index: multipliers at that input}, which may read
              `step.operand(position)`, `step.result()` (each a pair: target, reference) and `step.source(position)`

    Raises ValueError for another text or name, TypeError for another type.
    Source: Shrikumar et al., arXiv 1704.02685, sec. 3.
    """
    if not isinstance(operator, str) or "::" not in operator:
        raise ValueError(f'operator must be named as the error names it, like "aten::cumprod"; got {operator!r}')
    if isinstance(rule, str):
        if rule not in _NAMED:
            raise ValueError(f"rule must be one of {', '.join(map(repr, _NAMED))} or a callable; got {rule!r}")
        _registered[operator] = _NAMED[rule]
    elif isinstance(rule, Rule):
        _registered[operator] = rule
    elif callable(rule):
        _registered[operator] = Rule(rule, output=True)
    else:
        raise TypeError(f"rule must be a text, a callable or a Rule; got {type(rule).__name__}")


def known() -> int:
    """A number that changes when rules are registered, for caches of what `rule_for` said."""
    return hash(tuple(_registered.items()))


def rule_for(node: Node, active: frozenset[int]) -> Rule:
    """The rule of `node`, which reads the values `active`; UnsupportedOpError where none is known."""
    operator = _full_name(node)
    name = operator.removeprefix("aten::")
    if operator in _registered:
        return _registered[operator]
    if node.kind in _AFFINE_KINDS or name in _AFFINE:
        return AFFINE
    reads = [ref for ref in node.refs() if ref in active]
    if name in _OF_TWO and len(node.args) > 1 and isinstance(node.args[1], Ref):
        return _OF_TWO[name]
    if name in ("clamp", "clamp_min") and tuple(node.args[1:]) == (0,):
        return _RULES["relu"]
    if name in _RULES:
        return _RULES[name]
    if name == "_native_batch_norm_legit_no_training" or (name == "batch_norm" and node.args[5] is False):
        return AFFINE
    if name in _ELEMENTWISE and len(reads) == 1 and node.args[0] == Ref(reads[0]):
        return ELEMENTWISE
    if name == "where" and node.args[0] not in [Ref(ref) for ref in reads]:
        return AFFINE
    if node.kind in _AFFINE_IN_ONE_KINDS:
        if len(reads) == 1 and (name != "div" or (node.args[0] == Ref(reads[0]) and not node.kwargs)):
            return AFFINE
        if name in _JOINT and not node.kwargs:
            return _JOINT[name]
    raise unsupported(node)


def unsupported(node: Node, what: str = "") -> UnsupportedOpError:
    """The error for a step without a rule; `what` says more about it."""
    operator = _full_name(node)
    return UnsupportedOpError(
        f"no DeepLIFT rule for {operator}{what and f' ({what})'} at {node}; if it is a function of one tensor, teach "
        f'it with fastcam.register_rescale_rule("{operator}", "elementwise"); one linear in what it reads is "affine", '
        "any other rule is a callable (docs/rescale-rules.md)"
    )


def registered(node: Node) -> bool:
    """Whether the user gave a rule for the node's operator."""
    return _full_name(node) in _registered


def _full_name(node: Node) -> str:
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else op_name(node.target)
