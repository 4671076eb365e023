"""`lfi_mask`: a grey image under every channel of its features, the input of LFI-CAM's importance network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam._dtypes import accumulation_dtype
from fastcam._library import LIBRARY
from fastcam.backends import chosen, plain_call, register
from fastcam.ops import _checks
from fastcam.ops._once import differentiable_once
from fastcam.ops._plain import run
from fastcam.reference.lfi_mask import normalized

__all__ = ["lfi_mask"]


def lfi_mask(features: Tensor, grey: Tensor) -> Tensor:
    """Each channel scaled to 0..1 over its positions, times the grey image.

    Formula, with l = min F and u = max F of each channel:
        N = (F - l) / (u - l), 1 in a constant channel, 0 where F is 0;  masks = N grey.
    A NaN makes all masks of its channel NaN, and of no other.
    Shapes: features (B,K,h,w); grey (B,1,h,w). Returns (B,K,h,w). B may be 0.
    Dtype and layout: float64, float32, float16 or bfloat16 (grey may also be in the accumulation dtype), any strides
    (contiguous and channels_last without a copy). The result has the dtype and the strides of empty_like(features).
    Arithmetic in float64 for float64, else float32.
    Differentiable once in both tensors, a second derivative is a RuntimeError, as is a call inside torch.func; min and
    max share their gradient evenly, constant channels have none.
    Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes, K = 0 or h w = 0.
    Cost: features read twice (the second time from the cache), masks written once; backward: features and the gradient
    read once, features again from the cache. Only the arguments are kept for it.
    Source: Lee et al. 2021 (LFI-CAM), the masks of its feature importance network.
    """
    found = plain_call("lfi_mask", features, grey)
    if found is not NotImplemented:
        return found
    _checks.refuse_transforms("lfi_mask")
    _checks.check_features("lfi_mask", features)
    check_grey("lfi_mask", grey, features)
    if _checks.needs_grad(features, grey):
        return _LfiMask.apply(features, grey)
    return run("lfi_mask", features, grey)


def check_grey(op: str, grey: Tensor, features: Tensor) -> None:
    """A value for every position of each image."""
    _checks.check_companion(op, "grey", grey, features, or_accumulation=True)
    b, _, h, w = features.shape
    if grey.shape != (b, 1, h, w):
        raise ValueError(f"{op}: grey must be {(b, 1, h, w)}, got {tuple(grey.shape)}")


class _LfiMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, grey: Tensor) -> Tensor:
        ctx.backend = "auto" if torch.compiler.is_compiling() else chosen()
        ctx.save_for_backward(features, grey)
        return run("lfi_mask", features, grey)

    @staticmethod
    @differentiable_once("lfi_mask")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        features, grey = saved
        grad_features = grad_grey = None
        if ctx.needs_input_grad[0]:
            grad_features = run("lfi_mask_backward", grad, features, grey)
        if ctx.needs_input_grad[1]:
            grad_grey = (grad.to(accumulation_dtype(grad.dtype)) * normalized(features)).sum(1, keepdim=True)
            grad_grey = grad_grey.to(grey.dtype)
        return grad_features, grad_grey


def _reference(features: Tensor, grey: Tensor) -> Tensor:
    _checks.refuse_grad("lfi_mask", features, grey)
    _checks.check_features("lfi_mask", features)
    check_grey("lfi_mask", grey, features)  # the formula alone would broadcast what kernels refuse
    return references.lfi_mask(features, grey)


def _fake(features: Tensor, grey: Tensor) -> Tensor:
    return torch.empty_like(features)


LIBRARY.impl("lfi_mask", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastcam::lfi_mask", _fake, lib=LIBRARY)
register("lfi_mask", torch.ops.fastcam.lfi_mask.default, references.lfi_mask)
