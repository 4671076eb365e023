"""From evidence to maps: the shared end of all CAM-type methods, for any number of spatial dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastcam import ops

from ._method import Evidence

__all__ = ["finish", "min_max", "planar", "positionwise", "resized"]

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Not `functional.interpolate`, which reads the number of rows as an integer and so fixes it in a trace.
_UPSAMPLE = {
    1: torch.ops.aten.upsample_linear1d.default,
    2: torch.ops.aten.upsample_bilinear2d.default,
    3: torch.ops.aten.upsample_trilinear3d.default,
}


def planar(features: torch.Tensor, spatial_rank: int) -> torch.Tensor:
    """(B[, T], K, *spatial) with two spatial dimensions, as the ops take them; a view where strides allow."""
    if spatial_rank == 1:
        return features.unsqueeze(-2)
    return features if spatial_rank == 2 else features.flatten(-2)


def positionwise(function: Callable[[torch.Tensor], torch.Tensor], gradients: torch.Tensor) -> torch.Tensor:
    """An elementwise function of gradients; one value per channel where they are the same at every position."""
    uniform = [dim for dim in range(2, gradients.ndim) if gradients.stride(dim) == 0]
    compact = gradients
    for dim in uniform:
        compact = compact.narrow(dim, 0, 1)
    return function(compact).expand_as(gradients)


def finish(
    features: torch.Tensor,
    evidence: Evidence,
    relu: bool,
    normalize: bool,
    size: Sequence[int] | None,
    signed: bool = False,
) -> Maps:
    """Maps at `size` (None: layer size), maps at layer size after ReLU, and whether each is finite.

    features  (B, K, *spatial);  returns (B[, T], *size), (B[, T], *spatial), (B[, T])

    Resize is linear, bilinear or trilinear (align_corners=False); scaling follows it: min-max, or where `signed` by
    the largest magnitude. A constant map becomes zeros. Two-dimensional maps take one fused op for all but the latter.
    """
    scaled = normalize and not signed
    reference = evidence.reference
    if evidence.projection is not None:
        # A projection is a one-channel feature map with weight one, one row for each map.
        rank = features.ndim - 2
        rows = evidence.projection.flatten(0, -rank - 1).unsqueeze(1)
        found = _reduce(rows, rows.new_ones((rows.shape[0], 1)), None, relu, scaled, size)
        lead = evidence.projection.shape[: -rank or None]
        maps, raw, finite = (part.unflatten(0, lead) if len(lead) > 1 else part for part in found)
    elif evidence.multipliers is not None:
        factors = planar(evidence.multipliers, features.ndim - 2)
        maps, raw, finite = _reduce(features, factors, reference, relu, scaled, size)
    else:
        assert evidence.weights is not None
        maps, raw, finite = _reduce(features, evidence.weights, reference, relu, scaled, size)
    if signed and normalize:
        largest = maps.flatten(finite.ndim).abs().amax(-1).reshape(*finite.shape, *(1,) * (maps.ndim - finite.ndim))
        maps = maps / torch.where(largest == 0, 1, largest)  # no gradient of it has 0 / 0
    return maps, raw, finite


def _reduce(
    features: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor | None,
    relu: bool,
    normalize: bool,
    size: Sequence[int] | None,
) -> Maps:
    rank = features.ndim - 2
    flat = planar(features, rank)
    base = None if reference is None else planar(reference, rank)
    if rank < 3:
        wide = size if size is None or rank == 2 else (1, *size)
        maps, raw, finite = ops.cam_map_with_raw(flat, weights, base, relu=relu, normalize=normalize, size=wide)
        return (maps, raw, finite) if rank == 2 else (maps.squeeze(-2), raw.squeeze(-2), finite)
    _, plane, finite = ops.cam_map_with_raw(flat, weights, base, relu=relu, normalize=False)
    raw = plane.unflatten(-1, features.shape[-2:])
    maps = raw if size is None else resized(raw, size)
    if normalize:
        rows = maps.flatten(0, -4).flatten(1).unsqueeze(1).unsqueeze(1)
        scaled = ops.cam_map(rows, rows.new_ones((rows.shape[0], 1)), relu=False)
        maps = torch.where(finite[..., None, None, None], scaled.reshape(maps.shape), torch.nan)
    return maps, raw, finite


def resized(maps: torch.Tensor, size: Sequence[int], align_corners: bool = False) -> torch.Tensor:
    """(..., *spatial) -> (..., *size), linear, bilinear or trilinear."""
    rank = len(size)
    rows = maps.flatten(0, -rank - 1).unsqueeze(1)
    found = _UPSAMPLE[rank](rows, list(size), align_corners)
    return found.reshape(*maps.shape[:-rank], *size)


def min_max(maps: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(m - min) / (max - min + epsilon) for each row of (B, *spatial); zeros where a row is constant."""
    positions = tuple(range(1, maps.ndim))
    low, high = maps.amin(positions, keepdim=True), maps.amax(positions, keepdim=True)
    span = high - low
    if epsilon >= torch.finfo(span.dtype).tiny:
        return (maps - low) / (span + epsilon)
    return torch.where(span == 0, 0, (maps - low) / torch.where(span == 0, 1, span + epsilon))
