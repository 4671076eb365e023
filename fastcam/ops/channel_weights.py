"""`channel_weights`: spatial reductions of features and multipliers to one coefficient a channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam._dtypes import accumulation_dtype
from fastcam._library import LIBRARY
from fastcam._tracing import graph_holds_ops
from fastcam.backends import implementation, plain_call, register
from fastcam.ops import _checks
from fastcam.reference.channel_weights import alpha, guarded_ratio

__all__ = ["MODES", "channel_weights"]

MODES = ("mean", "sum", "xgrad", "grad_cam_pp")


def channel_weights(
    features: Tensor, multipliers: Tensor, reference: Tensor | None = None, mode: str = "mean"
) -> Tensor:
    """Channel coefficients from features A' = features - reference (or features) and multipliers G (gradients).

    Formula, sums over positions, S = sum A', Z = H W:
        "mean":        sum G / Z                       (does not read the features; Grad-CAM)
        "sum":         sum G A'                        (gradient times input, LIFT-type sums)
        "xgrad":       sum G A' / S, 0 where |S| <= 1e-6 sum |A'|
        "grad_cam_pp": sum a max(G, 0) with a = 1 / (2 + S G), 0 where |2 + S G| < 1e-6
    Shapes: features (B,K,H,W); multipliers (B,K,H,W) or (B,T,K,H,W); reference (B,K,H,W) or (1,K,H,W). Returns (B,K) or
    (B,T,K). B or T may be 0.
    Dtype and layout: float64, float32, float16 or bfloat16 (multipliers may also be in the accumulation dtype), any
    strides; the result is contiguous in the accumulation dtype (float64 for float64, else float32).
    Differentiable in all three tensors; the guards are constants.
    Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes, an unknown mode, K = 0 or H W = 0.
    Cost: features and multipliers read once ("grad_cam_pp": features, then multipliers). Multipliers that are one value
    expanded over all positions are never expanded: the closed form costs at most one pass over the features.
    Source: Selvaraju et al. 2017 eq. 1; Fu et al. 2020 (XGrad-CAM) eq. 8; Chattopadhay et al. 2018 (Grad-CAM++) eq. 19.
    """
    found = plain_call("channel_weights", features, multipliers, reference, mode)
    if found is not NotImplemented:
        return found
    if not (_checks.alike(features, multipliers) and reference is None and mode in MODES):
        _check(features, multipliers, reference, mode)
    if _checks.spatially_constant(multipliers):
        return _closed_form(features, multipliers[..., 0, 0], reference, mode)
    if _checks.needs_grad(features, multipliers, reference):
        return _ChannelWeights.apply(features, multipliers, reference, mode)
    return _run(features, multipliers, reference, mode)


def _check(features: Tensor, multipliers: Tensor, reference: Tensor | None, mode: str) -> None:
    op = "channel_weights"
    _checks.check_features(op, features)
    _checks.check_companion(op, "multipliers", multipliers, features, or_accumulation=True)
    _checks.check_positional(op, "multipliers", multipliers, features)
    _checks.check_reference(op, reference, features)
    _checks.check_mode(op, mode, MODES)


def _closed_form(features: Tensor, g: Tensor, reference: Tensor | None, mode: str) -> Tensor:
    """The formulas for multipliers that do not depend on the position; g is (B,K) or (B,T,K)."""
    acc = accumulation_dtype(features.dtype)
    g = g.to(acc)
    if mode == "mean":
        return g.clone()
    a = features if reference is None else features.to(acc) - reference.to(acc)
    s = a.sum((2, 3), dtype=acc)
    s = s.unsqueeze(1) if g.dim() == 3 else s
    if mode == "sum":
        return g * s
    if mode == "xgrad":
        magnitude = torch.linalg.vector_norm(a, 1, (2, 3), dtype=acc).reshape(s.shape)
        return torch.where(s.abs() <= 1e-6 * magnitude, 0, g)
    return features.shape[2] * features.shape[3] * alpha(s, g) * g.relu()


def _run(features: Tensor, *rest: Any) -> Tensor:
    if graph_holds_ops():
        return torch.ops.fastcam.channel_weights.default(features, *rest)
    return implementation("channel_weights", _checks.device_type(features))(features, *rest)


class _ChannelWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, multipliers: Tensor, reference: Tensor | None, mode: str) -> Tensor:
        ctx.save_for_backward(features, multipliers, reference)
        ctx.mode = mode
        return _run(features, multipliers, reference, mode)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        features, multipliers, reference = ctx.saved_tensors
        (grad,) = grads
        g, c = multipliers.to(grad.dtype), grad[..., None, None]
        a = features.to(grad.dtype) if reference is None else features.to(grad.dtype) - reference.to(grad.dtype)
        if g.dim() == 5:
            a = a.unsqueeze(1)
        grad_a, grad_g = _GRADIENTS[ctx.mode](a, g, c)
        grad_a = grad_a.expand(g.shape)
        grad_a = grad_a.sum(1) if g.dim() == 5 else grad_a
        grad_reference = None if reference is None else (-grad_a).sum_to_size(reference.shape).to(reference.dtype)
        return grad_a.to(features.dtype), grad_g.expand(g.shape).to(multipliers.dtype), grad_reference, None


def _mean_gradient(a: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(c), c / (a.shape[-2] * a.shape[-1])


def _sum_gradient(a: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return c * g, c * a


def _xgrad_gradient(a: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    hw = (-2, -1)
    s, magnitude = a.sum(hw, keepdim=True), a.abs().sum(hw, keepdim=True)
    c_over_s = guarded_ratio(c, s, magnitude)
    ratio = guarded_ratio((g * a).sum(hw, keepdim=True), s, magnitude)
    return c_over_s * (g - ratio), c_over_s * a


def _grad_cam_pp_gradient(a: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    hw = (-2, -1)
    s, positive = a.sum(hw, keepdim=True), g.relu()
    al = alpha(s, g)
    grad_s = -(c * al * al * g * positive).sum(hw, keepdim=True)
    return grad_s, c * (al * (g > 0) - al * al * s * positive)


_GRADIENTS = {
    "mean": _mean_gradient,
    "sum": _sum_gradient,
    "xgrad": _xgrad_gradient,
    "grad_cam_pp": _grad_cam_pp_gradient,
}


def _reference(features: Tensor, multipliers: Tensor, reference: Tensor | None = None, mode: str = "mean") -> Tensor:
    _checks.refuse_grad("channel_weights", features, multipliers, reference)
    return references.channel_weights(features, multipliers, reference, mode)


def _fake(features: Tensor, multipliers: Tensor, reference: Tensor | None = None, mode: str = "mean") -> Tensor:
    return features.new_empty(multipliers.shape[:-2], dtype=accumulation_dtype(features.dtype))


LIBRARY.impl("channel_weights", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastcam::channel_weights", _fake, lib=LIBRARY)
register("channel_weights", torch.ops.fastcam.channel_weights.default, references.channel_weights)
