"""`cam_map`: features and weights to finished attribution maps in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam._dtypes import accumulation_dtype
from fastcam._library import LIBRARY
from fastcam._tracing import graph_holds_ops
from fastcam.backends import implementation, plain_call, register
from fastcam.ops import _checks
from fastcam.reference.cam_map import resize

__all__ = ["cam_map", "cam_map_with_raw"]

Outputs = tuple[Tensor, Tensor, Tensor]


def cam_map(
    features: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
    relu: bool = True,
    normalize: bool = True,
    size: Sequence[int] | None = None,
) -> Tensor:
    """The maps of `cam_map_with_raw`, which documents formula, shapes, errors and cost."""
    return cam_map_with_raw(features, weights, reference, relu, normalize, size)[0]


def cam_map_with_raw(
    features: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
    relu: bool = True,
    normalize: bool = True,
    size: Sequence[int] | None = None,
) -> Outputs:
    """Weighted channel reduction, ReLU, bilinear resize and min-max scaling, fused.

    Formula, with D = features - reference (or features):
        M[b,t,i,j] = sum_k w[b,t,k(,i,j)] D[b,k,i,j];  raw = max(M, 0) if relu else M;
        U = raw resized to `size`;  maps = (U - min U) / (max U - min U) per map if normalize else U.
    A constant map becomes zeros. A map with a non-finite M becomes NaN if normalize; NaN survives the ReLU.

    Shapes: features (B,K,H,W); reference (B,K,H,W) or (1,K,H,W); weights either channel coefficients (B,K) or (B,T,K),
    or per-position multipliers (B,K,H,W) or (B,T,K,H,W). Returns maps (B[,T],*size), raw (B[,T],H,W) and finite
    (B[,T]), True where all of M is finite. `size` (height, width) None keeps the layer's. B or T may be 0.
    Dtype and layout: float64, float32, float16 or bfloat16 in, any strides (contiguous and channels_last without a
    copy); maps and raw are contiguous in the accumulation dtype (float64 for float64, else float32).
    Differentiable in features, weights and reference; min and max share their gradient evenly among ties.
    Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes, K = 0, H W = 0 or a size below 1.
    Cost: features (and reference, multipliers) read once, maps and raw written once.
    Source: Zhou et al. 2016 (CAM), Selvaraju et al. 2017 (Grad-CAM), eq. 2; resize as aten upsample_bilinear2d with
    align_corners=False.
    """
    found = plain_call("cam_map", features, weights, reference, relu, normalize, size)
    if found is not NotImplemented:
        return found
    _check(features, weights, reference, size)
    if weights.dim() >= 4 and _checks.spatially_constant(weights):
        weights = weights[..., 0, 0]
    if weights.dim() < 4:
        weights = weights.to(accumulation_dtype(features.dtype))
    if _checks.needs_grad(features, weights, reference):
        return _CamMap.apply(features, weights, reference, relu, normalize, size)
    return _run(features, weights, reference, relu, normalize, size)


def _check(features: Tensor, weights: Tensor, reference: Tensor | None, size: Sequence[int] | None) -> None:
    op = "cam_map"
    _checks.check_features(op, features)
    _checks.check_companion(op, "weights", weights, features, or_accumulation=True)
    if weights.dim() >= 4:
        _checks.check_positional(op, "weights", weights, features)
    else:
        b, k = features.shape[:2]
        if weights.dim() not in (2, 3) or weights.shape[0] != b or weights.shape[-1] != k:
            raise ValueError(
                f"{op}: weights must be ({b}, {k}) or ({b}, T, {k}) channel coefficients or multipliers with the "
                f"features' trailing {tuple(features.shape[1:])}, got {tuple(weights.shape)}"
            )
    _checks.check_reference(op, reference, features)
    _checks.check_size(op, size)


def _run(features: Tensor, *rest: Any) -> Outputs:
    if graph_holds_ops():
        return torch.ops.fastcam.cam_map.with_raw(features, *rest)
    return implementation("cam_map", _checks.device_type(features))(features, *rest)


class _CamMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weights: Tensor,
        reference: Tensor | None,
        relu: bool,
        normalize: bool,
        size: Sequence[int] | None,
    ) -> Outputs:
        maps, raw, finite = _run(features, weights, reference, relu, normalize, size)
        ctx.mark_non_differentiable(finite)
        ctx.save_for_backward(features, weights, reference, raw)
        ctx.relu, ctx.normalize, ctx.size = relu, normalize, size
        return maps, raw, finite

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        features, weights, reference, raw = ctx.saved_tensors
        grad_maps, grad_raw = grads[:2]
        has_targets = weights.dim() in (3, 5)
        if not has_targets:
            weights, raw, grad_maps, grad_raw = (x.unsqueeze(1) for x in (weights, raw, grad_maps, grad_raw))
        grad_m = _post_backward(grad_maps, raw, ctx.normalize, ctx.size) + grad_raw
        if ctx.relu:
            grad_m = grad_m * (raw > 0)
        w = weights.to(raw.dtype)
        d = features.to(raw.dtype) if reference is None else features.to(raw.dtype) - reference.to(raw.dtype)
        if w.dim() == 3:
            grad_w = torch.einsum("bthw,bkhw->btk", grad_m, d)
            grad_d = torch.einsum("bthw,btk->bkhw", grad_m, w)
        else:
            grad_w = grad_m.unsqueeze(2) * d.unsqueeze(1)
            grad_d = (grad_m.unsqueeze(2) * w).sum(1)
        grad_w = (grad_w if has_targets else grad_w.squeeze(1)).to(weights.dtype)
        grad_reference = None if reference is None else (-grad_d).sum_to_size(reference.shape).to(reference.dtype)
        return grad_d.to(features.dtype), grad_w, grad_reference, None, None, None


def _post_backward(grad: Tensor, raw: Tensor, normalize: bool, size: Sequence[int] | None) -> Tensor:
    """Gradient of min-max scaling and resize: (B,T,*size) to (B,T,H,W)."""
    if normalize:
        u = resize(raw, size) if size is not None else raw
        grad = _min_max_backward(grad, u, raw)
    if size is None:
        return grad
    return _stretch(raw, raw.shape[2], size[0]) @ grad @ _stretch(raw, raw.shape[3], size[1]).T


def _stretch(like: Tensor, size_in: int, size_out: int) -> Tensor:
    """(in, out) matrix of the resize along one axis; unlike aten's backward it is deterministic on every device."""
    identity = torch.eye(size_in, dtype=like.dtype, device=like.device).unsqueeze(0)
    return torch.nn.functional.interpolate(identity, size_out, mode="linear", align_corners=False)[0]


def _min_max_backward(grad: Tensor, u: Tensor, raw: Tensor) -> Tensor:
    """With y = (u - min) / (max - min): dy/du directly, and through min and max, shared evenly among ties."""
    hw = (2, 3)
    low, high = u.amin(hw, keepdim=True), u.amax(hw, keepdim=True)
    flat = (low == high) | (raw.amin(hw, keepdim=True) == raw.amax(hw, keepdim=True))
    span = torch.where(flat, 1, high - low)
    g = grad / span
    gy = g * (u - low) / span
    at_low, at_high = (u == low).to(u.dtype), (u == high).to(u.dtype)
    total, weighted = g.sum(hw, keepdim=True), gy.sum(hw, keepdim=True)
    from_low = at_low * (weighted - total) / at_low.sum(hw, keepdim=True)
    from_high = at_high * -weighted / at_high.sum(hw, keepdim=True)
    return torch.where(flat, 0, g + from_low + from_high)


def _reference(
    features: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
    relu: bool = True,
    normalize: bool = True,
    size: Sequence[int] | None = None,
) -> Outputs:
    _checks.refuse_grad("cam_map", features, weights, reference)
    return references.cam_map(features, weights, reference, relu, normalize, size)


def _composite(*args: Any, **kwargs: Any) -> Tensor:
    return torch.ops.fastcam.cam_map.with_raw(*args, **kwargs)[0]


def _fake(
    features: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
    relu: bool = True,
    normalize: bool = True,
    size: Sequence[int] | None = None,
) -> Outputs:
    acc = accumulation_dtype(features.dtype)
    maps = list(weights.shape[: weights.dim() - (1 if weights.dim() < 4 else 3)])
    spatial = list(features.shape[2:])
    return (
        features.new_empty(maps + (spatial if size is None else list(size)), dtype=acc),
        features.new_empty(maps + spatial, dtype=acc),
        features.new_empty(maps, dtype=torch.bool),
    )


LIBRARY.impl("cam_map.with_raw", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("cam_map", _composite, "CompositeImplicitAutograd")
torch.library.register_fake("fastcam::cam_map.with_raw", _fake, lib=LIBRARY)
register("cam_map", torch.ops.fastcam.cam_map.with_raw, references.cam_map)
