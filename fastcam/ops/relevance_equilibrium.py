"""`relevance_equilibrium`: the three messages of Attribution Equilibrium at a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam._dtypes import accumulation_dtype
from fastcam.backends import plain_call
from fastcam.ops import _checks
from fastcam.ops._plain import check_alike, register_plain, run

__all__ = ["relevance_equilibrium"]


def relevance_equilibrium(relevance: Tensor, budgets: Tensor, divisors: Tensor, ratio: float = 2.0) -> Tensor:
    """Relevance R brought to the budgets +ratio and -1, +1, and -1, each divided by its own divisor.

    Formula, elementwise, for budgets (p, q) of an image and divisors (zC, zA, zB), 0 / 0 = 0 and x / 0 = 0 throughout:
        P = max(R, 0) / p,  N = min(R, 0) / q
        sC = (ratio P + N) / zC,  sA = P / zA,  sB = N / zB
    Shapes: relevance (B,C,...), any number of dimensions from two on, any of them may be 0; budgets (B,2); divisors
    (3B,C,...): zC of all images, then zA, then zB. Returns (3B,C,...) in the same order.
    Dtype and layout: float64, float32, float16 or bfloat16, relevance and divisors alike, budgets in the accumulation
    dtype; any strides. The result has the divisors' dtype and the strides of empty_like(divisors). Arithmetic in
    float64 for float64, else float32.
    Not differentiable. Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes and a ratio
    that is negative or not finite, RuntimeError for inputs that require grad.
    Cost: each tensor read once, the result written once. What does not lie in its memory order is copied.
    Source: Nam & Lee 2024 (Attribution Equilibrium), rules read in the authors' public code.
    """
    found = plain_call("relevance_equilibrium", relevance, budgets, divisors, ratio)
    if found is not NotImplemented:
        return found
    _check(relevance, budgets, divisors, ratio)
    return run("relevance_equilibrium", relevance, budgets, divisors, ratio)


def _check(relevance: Tensor, budgets: Tensor, divisors: Tensor, ratio: float = 2.0) -> None:
    op = "relevance_equilibrium"
    check_alike(op, "relevance", relevance)
    check_budgets(op, budgets, relevance)
    check_thrice(op, "divisors", divisors, relevance, of="relevance")
    _checks.check_not_negative(op, "ratio", ratio)


def check_budgets(op: str, budgets: Tensor, relevance: Tensor) -> None:
    """(B,2) in the accumulation dtype."""
    _checks.check_tensor(op, "budgets", budgets)
    if budgets.device != relevance.device:
        raise ValueError(f"{op}: budgets must be on {relevance.device}, got {budgets.device}")
    acc = accumulation_dtype(relevance.dtype)
    if budgets.dtype != acc:
        raise TypeError(f"{op}: budgets must be {acc} for {relevance.dtype}, got {budgets.dtype}")
    if tuple(budgets.shape) != (relevance.shape[0], 2):
        raise ValueError(f"{op}: budgets must be {(relevance.shape[0], 2)}, got {tuple(budgets.shape)}")
    _checks.check_no_grad(op, budgets)


def check_thrice(op: str, name: str, value: Tensor, like: Tensor, *, of: str) -> None:
    """(3B,C,...) for `like` (B,C,...)."""
    _checks.check_companion(op, name, value, like, or_accumulation=False, of=of)
    if value.shape[1:] != like.shape[1:] or value.shape[0] != 3 * like.shape[0]:
        expected = (3 * like.shape[0], *like.shape[1:])
        raise ValueError(f"{op}: {name} must be {expected}, three times the {of}, got {tuple(value.shape)}")
    _checks.check_no_grad(op, value)


def _fake(relevance: Tensor, budgets: Tensor, divisors: Tensor, ratio: float = 2.0) -> Tensor:
    return torch.empty_like(divisors)


register_plain("relevance_equilibrium", references.relevance_equilibrium, _fake, _check)
