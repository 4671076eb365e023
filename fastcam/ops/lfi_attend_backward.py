"""`lfi_attend_backward`: the gradients of `lfi_attend`. Registered for autograd, not exported."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam._dtypes import accumulation_dtype
from fastcam.ops import _checks
from fastcam.ops._plain import register_plain, run
from fastcam.ops.lfi_attend import CONSTANT_MAPS, check_importance

__all__ = ["lfi_attend_backward"]

Gradients = tuple[Tensor, Tensor]


def lfi_attend_backward(
    grad_attended: Tensor,
    grad_attention: Tensor | None,
    grad_raw: Tensor | None,
    features: Tensor,
    importance: Tensor,
    attention: Tensor,
    raw: Tensor,
    constant_map: str = "raw",
) -> Gradients:
    """Gradients in the features F and the importances s, from those in the results of `lfi_attend` (None: 0).

    Formula, for each image, P = raw and A = attention as the op returned them, l = min P < u = max P:
        a = sum_k grad_attended_k F_k + grad_attention;  d = a / (u - l)
        p = d + [P = l] (sum d A - sum d) / count(P = l) - [P = u] sum d A / count(P = u), + grad_raw;  0 where P <= 0
        grad_features_k = (1 + A) grad_attended_k + s_k p;  grad_importance_k = sum p F_k
    Of a constant P, p is a ("raw") or 0 ("zeros"), + grad_raw. An image whose attention is NaN has NaN for p.
    Shapes: grad_attended and features (B,K,h,w); importance (B,K); all maps (B,1,h,w). Returns (B,K,h,w) and (B,K). B
    may be 0.
    Dtype and layout: float64, float32, float16 or bfloat16, grad_attended and features alike; importance in their dtype
    or, like the maps, in the accumulation dtype; any strides. grad_features has the dtype and the strides of
    empty_like(features), grad_importance is contiguous in importance's dtype. Arithmetic in float64 for float64, else
    float32.
    Not differentiable. Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes, an unknown
    constant_map, K = 0 or h w = 0, RuntimeError for inputs that require grad.
    Cost: features and grad_attended read once, and again from the cache; grad_features written once.
    """
    _check(grad_attended, grad_attention, grad_raw, features, importance, attention, raw, constant_map)
    given = grad_attended, grad_attention, grad_raw, features, importance, attention, raw, constant_map
    found: Gradients = run("lfi_attend_backward", *given)
    return found


def _check(
    grad_attended: Tensor,
    grad_attention: Tensor | None,
    grad_raw: Tensor | None,
    features: Tensor,
    importance: Tensor,
    attention: Tensor,
    raw: Tensor,
    constant_map: str = "raw",
) -> None:
    op = "lfi_attend_backward"
    _checks.check_features(op, features)
    _checks.check_companion(op, "grad_attended", grad_attended, features, or_accumulation=False)
    _checks.check_same_shape(op, "grad_attended", grad_attended, features)
    check_importance(op, importance, features)
    for name, value in (("attention", attention), ("raw", raw)):
        _check_map(op, name, value, features)
    for name, gradient in (("grad_attention", grad_attention), ("grad_raw", grad_raw)):
        if gradient is not None:
            _check_map(op, name, gradient, features)
    _checks.check_mode(op, constant_map, CONSTANT_MAPS, "constant_map")
    _checks.check_no_grad(op, grad_attended, grad_attention, grad_raw, features, importance, attention, raw)


def _check_map(op: str, name: str, value: Tensor, features: Tensor) -> None:
    """A value for every position of each image, in the accumulation dtype."""
    _checks.check_companion(op, name, value, features, or_accumulation=True)
    b, _, h, w = features.shape
    acc = accumulation_dtype(features.dtype)
    if value.dtype != acc:
        raise TypeError(f"{op}: {name} must be {acc} for {features.dtype} features, got {value.dtype}")
    if value.shape != (b, 1, h, w):
        raise ValueError(f"{op}: {name} must be {(b, 1, h, w)}, got {tuple(value.shape)}")


def _fake(
    grad_attended: Tensor,
    grad_attention: Tensor | None,
    grad_raw: Tensor | None,
    features: Tensor,
    importance: Tensor,
    attention: Tensor,
    raw: Tensor,
    constant_map: str = "raw",
) -> Gradients:
    return torch.empty_like(features), importance.new_empty(importance.shape)


register_plain("lfi_attend_backward", references.lfi_attend_backward, _fake, _check)
