"""`mask_by_features`: images multiplied by their own feature maps, a chunk of (image, channel) pairs at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam._library import LIBRARY
from fastcam._tracing import graph_holds_ops
from fastcam.backends import implementation, plain_call, register
from fastcam.ops import _checks
from fastcam.reference.mask_by_features import result_format

__all__ = ["ORDERS", "mask_by_features"]

ORDERS = ("resize_then_minmax", "minmax_then_resize")


def mask_by_features(
    images: Tensor,
    features: Tensor,
    start: int = 0,
    count: int | None = None,
    *,
    noise: Tensor | None = None,
    scale: float = 1.0,
    order: str = "resize_then_minmax",
) -> Tensor:
    """The masked images of Score-CAM and its relatives: every feature map, resized and scaled, times its image.

    Formula, for the pairs p = b K + k of an image b and a channel k, with minmax(X) = (X - min X) / (max X - min X):
        mask = minmax(U), U = features[b,k] resized to (H,W)        order "resize_then_minmax"
        mask = minmax(features[b,k]) resized to (H,W)               order "minmax_then_resize"
        result[i] = images[b] * scale * (mask + noise[i])           for p = start + i
    The mask of a constant map is zero, before noise. A map with a non-finite value gives NaN in its whole row.

    Shapes: images (B,C,H,W); features (B,K,h,w); noise (count,H,W) or None. Returns (count,C,H,W); `count` None is all
    pairs from `start` on. B and count may be 0. Results of chunks are the slices of the whole result, bit for bit.
    Dtype and layout: images float64, float32, float16 or bfloat16; features and noise in the images' dtype or their
    accumulation dtype (float64 for float64, else float32), in which all arithmetic is done. Any strides; the result has
    the images' dtype and is channels_last where they are channels_last (and not also contiguous), else contiguous.
    Not differentiable: inputs that require grad are refused unless they are detached or grad mode is off.
    Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes, C, H W, K or h w = 0, pairs out of
    range, an unknown order or a scale that is not finite; RuntimeError for inputs that require grad.
    Cost: feature maps and noise read once, images once a pair (from cache, if the chunk's images fit), the result
    written once. Memory beside the result: one map a thread on CPUs, the chunk's feature maps on GPUs. Images of
    another layout than the result's are copied, only those of the chunk.
    Source: Wang et al. 2020 (Score-CAM), s(Up(A)) times the image; Wang et al. 2020 (SS-CAM) for noise, Naidu et al.
    2020 (IS-CAM) for scale; resize as aten upsample_bilinear2d with align_corners=False.
    """
    found = plain_call("mask_by_features", images, features, start, count, noise, scale, order)
    if found is not NotImplemented:
        return found
    _check(images, features, start, count, noise, scale, order)
    if graph_holds_ops():
        call = torch.ops.fastcam.mask_by_features.default
    else:
        call = implementation("mask_by_features", _checks.device_type(images))
    return call(images, features, start, count, noise=noise, scale=scale, order=order)


def _check(
    images: Tensor, features: Tensor, start: int, count: int | None, noise: Tensor | None, scale: float, order: str
) -> None:
    op = "mask_by_features"
    _checks.check_features(op, images, "images", "(B,C,H,W)")
    _checks.check_features(op, features)
    _checks.check_companion(op, "features", features, images, or_accumulation=True, of="images")
    if features.shape[0] != images.shape[0]:
        raise ValueError(
            f"{op}: images and features must have one batch size, got images {tuple(images.shape)} and features "
            f"{tuple(features.shape)}"
        )
    rows = _check_pairs(op, features.shape[0] * features.shape[1], start, count)
    if noise is not None:
        _checks.check_companion(op, "noise", noise, images, or_accumulation=True, of="images")
        if noise.shape != (rows, *images.shape[2:]):
            raise ValueError(f"{op}: noise must be {(rows, *images.shape[2:])}, got {tuple(noise.shape)}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: scale must be a number, got {scale!r}")
    if not -math.inf < scale < math.inf:  # unlike isfinite, a comparison can be traced
        raise ValueError(f"{op}: scale must be finite, got {scale!r}")
    _checks.check_mode(op, order, ORDERS, "order")
    _checks.check_no_grad(op, images, features, noise)


def _check_pairs(op: str, pairs: int, start: int, count: int | None) -> int:
    """Rows of the result."""
    for name, value in (("start", start), ("count", 0 if count is None else count)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if start < 0 or start > pairs:
        raise ValueError(f"{op}: start must be in 0..{pairs}, the number of (image, channel) pairs, got {start}")
    if count is None:
        return pairs - start
    if count < 0 or start + count > pairs:
        raise ValueError(
            f"{op}: count must be None or in 0..{pairs - start}, the number of pairs from start = {start} on, of "
            f"{pairs} in all, got {count}"
        )
    return count


def _reference(
    images: Tensor,
    features: Tensor,
    start: int = 0,
    count: int | None = None,
    *,
    noise: Tensor | None = None,
    scale: float = 1.0,
    order: str = "resize_then_minmax",
) -> Tensor:
    _checks.check_no_grad("mask_by_features", images, features, noise)
    return references.mask_by_features(images, features, start, count, noise=noise, scale=scale, order=order)


def _fake(
    images: Tensor,
    features: Tensor,
    start: int = 0,
    count: int | None = None,
    *,
    noise: Tensor | None = None,
    scale: float = 1.0,
    order: str = "resize_then_minmax",
) -> Tensor:
    rows = features.shape[0] * features.shape[1] - start if count is None else count
    return torch.empty(
        (rows, *images.shape[1:]), dtype=images.dtype, device=images.device, memory_format=result_format(images)
    )


LIBRARY.impl("mask_by_features", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastcam::mask_by_features", _fake, lib=LIBRARY)
register("mask_by_features", torch.ops.fastcam.mask_by_features.default, references.mask_by_features)
