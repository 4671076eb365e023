"""`lfi_attend`: LFI-CAM's attention map from features and channel importances, and the features it attends to."""

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

__all__ = ["CONSTANT_MAPS", "lfi_attend"]

CONSTANT_MAPS = ("raw", "zeros")


def lfi_attend(features: Tensor, importance: Tensor, constant_map: str = "raw") -> tuple[Tensor, Tensor]:
    """The features, raised where the attention map of their weighted sum is high; and that map.

    Formula, for each image:
        P = max(sum_k s_k F_k, 0);  A = (P - min P) / (max P - min P);  attended = (1 + A) F.
    A constant P gives A = P if constant_map is "raw", 0 if "zeros". NaN survives the ReLU; where P is not finite
    throughout, A is NaN throughout.
    Shapes: features (B,K,h,w); importance (B,K). Returns attended (B,K,h,w) and attention (B,1,h,w). B may be 0.
    Dtype and layout: float64, float32, float16 or bfloat16 (importance may also be in the accumulation dtype), any
    strides (contiguous and channels_last without a copy). attended has the dtype and the strides of
    empty_like(features); attention is contiguous in the accumulation dtype (float64 for float64, else float32).
    Differentiable once in both tensors, a second derivative is a RuntimeError, as is a call inside torch.func; min and
    max share their gradient evenly among ties.
    Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes, an unknown constant_map, K = 0 or
    h w = 0.
    Cost: features read twice (the second time from the cache), attended written once; backward: features and the
    gradient likewise. The arguments and two maps are kept for it.
    Source: Lee et al. 2021 (LFI-CAM), its attention branch.
    """
    found = plain_call("lfi_attend", features, importance, constant_map)
    if found is not NotImplemented:
        return found[:2]
    _checks.refuse_transforms("lfi_attend")
    _check(features, importance, constant_map)
    if _checks.needs_grad(features, importance):
        return _LfiAttend.apply(features, importance, constant_map)
    attended, attention, _ = run("lfi_attend", features, importance, constant_map)
    return attended, attention


def _check(features: Tensor, importance: Tensor, constant_map: str) -> None:
    op = "lfi_attend"
    _checks.check_features(op, features)
    check_importance(op, importance, features)
    _checks.check_mode(op, constant_map, CONSTANT_MAPS, "constant_map")


def check_importance(op: str, importance: Tensor, features: Tensor) -> None:
    """A value for every channel of each image."""
    _checks.check_companion(op, "importance", importance, features, or_accumulation=True)
    if importance.shape != features.shape[:2]:
        raise ValueError(f"{op}: importance must be {tuple(features.shape[:2])}, got {tuple(importance.shape)}")


class _LfiAttend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, importance: Tensor, constant_map: str) -> tuple[Tensor, Tensor]:
        attended, attention, raw = run("lfi_attend", features, importance, constant_map)
        ctx.backend = "auto" if torch.compiler.is_compiling() else chosen()
        ctx.save_for_backward(features, importance, attention, raw)
        ctx.constant_map = constant_map
        ctx.set_materialize_grads(False)
        return attended, attention

    @staticmethod
    @differentiable_once("lfi_attend")
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_attended: Tensor | None, grad_attention: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        features, importance, attention, raw = saved
        if grad_attended is None:
            grad_attended = torch.zeros_like(features)
        given = grad_attended, grad_attention, None, features, importance, attention, raw, ctx.constant_map
        return *run("lfi_attend_backward", *given), None


def _reference(features: Tensor, importance: Tensor, constant_map: str = "raw") -> tuple[Tensor, Tensor, Tensor]:
    _checks.refuse_grad("lfi_attend", features, importance)
    _check(features, importance, constant_map)  # the formula alone would broadcast what kernels refuse
    return references.lfi_attend(features, importance, constant_map)


def _fake(features: Tensor, importance: Tensor, constant_map: str = "raw") -> tuple[Tensor, Tensor, Tensor]:
    b, _, h, w = features.shape
    acc = accumulation_dtype(features.dtype)
    attention, raw = (features.new_empty((b, 1, h, w), dtype=acc) for _ in range(2))
    return torch.empty_like(features), attention, raw


LIBRARY.impl("lfi_attend", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastcam::lfi_attend", _fake, lib=LIBRARY)
register("lfi_attend", torch.ops.fastcam.lfi_attend.default, references.lfi_attend)
