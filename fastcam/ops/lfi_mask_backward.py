"""`lfi_mask_backward`: the gradient of `lfi_mask` in the features. Registered for autograd, not exported."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam.ops import _checks
from fastcam.ops._plain import register_plain, run
from fastcam.ops.lfi_mask import check_grey

__all__ = ["lfi_mask_backward"]


def lfi_mask_backward(grad: Tensor, features: Tensor, grey: Tensor) -> Tensor:
    """Gradient in the features F, from that in the masks.

    Formula, for each channel with l = min F < u = max F, sums over its positions:
        d = grad grey / (u - l), 0 where F is 0;  N = (F - l) / (u - l)
        result = d + [F = l] (sum d N - sum d) / count(F = l) - [F = u] sum d N / count(F = u)
    A constant channel gets 0, a channel with a NaN NaN.
    Shapes: grad and features (B,K,h,w); grey (B,1,h,w). Returns (B,K,h,w). B may be 0.
    Dtype and layout: float64, float32, float16 or bfloat16, grad and features alike (grey may also be in the
    accumulation dtype), any strides. The result has the dtype and the strides of empty_like(features). Arithmetic in
    float64 for float64, else float32.
    Not differentiable. Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes, K = 0 or
    h w = 0, RuntimeError for inputs that require grad.
    Cost: features and grad read once, and again from the cache; the result written once.
    """
    _check(grad, features, grey)
    return run("lfi_mask_backward", grad, features, grey)


def _check(grad: Tensor, features: Tensor, grey: Tensor) -> None:
    op = "lfi_mask_backward"
    _checks.check_features(op, features)
    _checks.check_companion(op, "grad", grad, features, or_accumulation=False)
    _checks.check_same_shape(op, "grad", grad, features)
    check_grey(op, grey, features)
    _checks.check_no_grad(op, grad, features, grey)


def _fake(grad: Tensor, features: Tensor, grey: Tensor) -> Tensor:
    return torch.empty_like(features)


register_plain("lfi_mask_backward", references.lfi_mask_backward, _fake, _check)
