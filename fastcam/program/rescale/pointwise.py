"""Activations and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcam import ops

from ..nodes import Ref, op_name
from .step import Cotangents, Step

__all__ = [
    "elementwise",
    "gated",
    "leaky_relu",
    "matrix_product",
    "maximum",
    "minimum",
    "product",
    "quotient",
    "rectifier",
]
__all__ += ["secant"]

#: |u - u'| up to which a smooth function's slope is its derivative at the midpoint, wrong by (u - u')^2 f''' / 24, not
#: a quotient of differences that cancel.
_NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}
_NEAR_HALF = 3e-2
_SMOOTH_NAMES = """
gelu silu sigmoid tanh softplus mish log_sigmoid exp expm1 exp2 log log1p sqrt rsqrt reciprocal pow square sin cos atan
erf erfc
"""
_SMOOTH = frozenset(_SMOOTH_NAMES.split())
#: Those that bend ever more towards 0: there "near" is relative to |u| and |u'|.
_BENDS_AT_ZERO = frozenset({"log", "sqrt", "rsqrt", "reciprocal", "pow"})


def elementwise(step: Step, given: Tensor) -> Cotangents:
    """g (f(u) - f(u')) / (u - u'), and the derivative at the midpoint where u and u' are (nearly) equal."""
    (u, u_ref), (v, v_ref) = step.operand(), step.result()
    if v.shape != u.shape:
        raise NotImplementedError("a function of one tensor that changes its shape")
    return {step.source(): given * secant(step.run, op_name(step.node.target), u, u_ref, v, v_ref)}


def secant(f: Callable[[Tensor], Any], name: str, u: Tensor, u_ref: Tensor, v: Tensor, v_ref: Tensor) -> Tensor:
    """(v - v') / (u - u') for v = f(u), and the derivative at the midpoint where u and u' are (nearly) equal.

    name  the operator, which tells how near is near
    """
    difference = u - u_ref
    bound: float | Tensor = _NEAR.get(u.dtype, _NEAR_HALF) if name in _SMOOTH else 0.0
    if name in _BENDS_AT_ZERO:
        bound = bound * torch.minimum(u.abs(), u_ref.abs()).clamp(max=1)
    near = difference.abs() <= bound
    with torch.enable_grad():
        # Away from there the derivative is not used, only kept from being NaN.
        middle = torch.where(near, (u + u_ref) / 2, u).requires_grad_()
        (slope,) = torch.autograd.grad(f(middle).sum(), middle)
    return torch.where(near, slope, (v - v_ref) / torch.where(near, 1, difference))


def rectifier(step: Step, given: Tensor) -> Cotangents:
    """ReLU, by the fused op."""
    return {step.source(): ops.rescale_multipliers(given, *step.operand())}


def leaky_relu(step: Step, given: Tensor) -> Cotangents:
    """Leaky ReLU, by the fused op."""
    return {step.source(): ops.rescale_multipliers(given, *step.operand(), step.constant(1, 0.01))}


def product(step: Step, given: Tensor) -> Cotangents:
    """Of two activations: a b - a' b' = (a - a') (b + b')/2 + (b - b') (a + a')/2."""
    (a, a_ref), (b, b_ref) = step.operand(0), step.operand(1)
    return _joined(step, given * (b + b_ref) / 2, given * (a + a_ref) / 2)


def quotient(step: Step, given: Tensor) -> Cotangents:
    """a / b as the product of a and 1/b, whose slope is -1 / (b b')."""
    (a, a_ref), (b, b_ref) = step.operand(0), step.operand(1)
    return _joined(step, given * (1 / b + 1 / b_ref) / 2, -given * (a + a_ref) / 2 / (b * b_ref))


def gated(step: Step, given: Tensor) -> Cotangents:
    """Gated linear unit: the product of the half a of its input and sigmoid(b), b the other half."""
    dim = step.constant(1, -1)
    (a, b), (a_ref, b_ref) = (x.chunk(2, dim) for x in step.operand())
    s, s_ref = b.sigmoid(), b_ref.sigmoid()
    slope = secant(torch.sigmoid, "sigmoid", b, b_ref, s, s_ref)
    return {step.source(): torch.cat([given * (s + s_ref) / 2, given * (a + a_ref) / 2 * slope], dim)}


def maximum(step: Step, given: Tensor) -> Cotangents:
    """Of two activations: max(a, b) = b + relu(a - b), half to each where they are equal."""
    slope = _larger(step)
    return _joined(step, given * slope, given * (1 - slope))


def minimum(step: Step, given: Tensor) -> Cotangents:
    """Of two activations: min(a, b) = a + b - max(a, b)."""
    slope = _larger(step)
    return _joined(step, given * (1 - slope), given * slope)


def _larger(step: Step) -> Tensor:
    """The slope of relu(a - b), 1/2 where both passes have a = b."""
    (a, a_ref), (b, b_ref) = step.operand(0), step.operand(1)
    d, d_ref = a - b, a_ref - b_ref
    equal = d == d_ref
    return torch.where(equal, (d.sign() + 1) / 2, (d.relu() - d_ref.relu()) / torch.where(equal, 1, d - d_ref))


def matrix_product(step: Step, given: Tensor) -> Cotangents:
    """As `product`, for matrices (..., m, k) and (..., k, n)."""
    (a, a_ref), (b, b_ref) = step.operand(0), step.operand(1)
    return _joined(step, given @ ((b + b_ref) / 2).mT, ((a + a_ref) / 2).mT @ given)


def _joined(step: Step, first: Tensor, second: Tensor) -> Cotangents:
    """The parts of the first two arguments, each summed to its shape; added where both are one value."""
    found: Cotangents = {}
    for argument, part in zip(step.node.args[:2], (first, second), strict=True):
        if isinstance(argument, Ref) and argument.index in step.active:
            part = part.sum_to_size(step.shapes[argument.index])
            earlier = found.get(argument.index)
            found[argument.index] = part if earlier is None else earlier + part
    return found
