"""`relevance_combine`: the end of Attribution Equilibrium's step through a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam.backends import plain_call
from fastcam.ops import _checks
from fastcam.ops._plain import check_alike, register_plain, run
from fastcam.ops.relevance_equilibrium import check_budgets, check_thrice

__all__ = ["relevance_combine"]


def relevance_combine(
    inputs: Tensor, parts: Tensor, budgets: Tensor, shift: bool = True, threshold: float = 0.0
) -> Tensor:
    """Relevance at a convolution's inputs x from the three messages (tC, tA, tB) transposed through |W|.

    Formula, elementwise:
        C = max(x, 0) tC
        R = C - [C != 0] / n + (tA where x > threshold, else tB)
        n is the number of elements of the image's C that are not 0. Nothing is taken away where `shift` is False, n = 0
        or the image's positive budget is 0.
    Shapes: inputs (B,C,...), any number of dimensions from two on, any of them may be 0; parts (3B,C,...): tC of all
    images, then tA, then tB; budgets (B,2), of the relevance above. Returns (B,C,...).
    Dtype and layout: float64, float32, float16 or bfloat16, inputs and parts alike, budgets in the accumulation dtype;
    any strides. The result has the dtype and the strides of empty_like(inputs). Arithmetic in float64 for float64, else
    float32; n is an integer.
    Not differentiable. Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes and a threshold
    that is negative or not finite, RuntimeError for inputs that require grad.
    Cost: inputs and tC read twice (once without `shift`), tA and tB once, the result written once.
    Source: Nam & Lee 2024 (Attribution Equilibrium), rules read in the authors' public code.
    """
    found = plain_call("relevance_combine", inputs, parts, budgets, shift, threshold)
    if found is not NotImplemented:
        return found
    _check(inputs, parts, budgets, shift, threshold)
    return run("relevance_combine", inputs, parts, budgets, shift, threshold)


def _check(inputs: Tensor, parts: Tensor, budgets: Tensor, shift: bool = True, threshold: float = 0.0) -> None:
    op = "relevance_combine"
    check_alike(op, "inputs", inputs)
    check_thrice(op, "parts", parts, inputs, of="inputs")
    check_budgets(op, budgets, inputs)
    _checks.check_not_negative(op, "threshold", threshold)


def _fake(inputs: Tensor, parts: Tensor, budgets: Tensor, shift: bool = True, threshold: float = 0.0) -> Tensor:
    return torch.empty_like(inputs)


register_plain("relevance_combine", references.relevance_combine, _fake, _check)
