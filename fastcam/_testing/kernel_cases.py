"""Float64 oracles, inputs and tolerances of every op, for tests of any implementation.

The oracles are the written formulas: sums over materialised products, resizing by explicit interpolation matrices. They
share no code with the references or the kernels.

Tolerances follow the arithmetic. With eps of the accumulation type, a sum of products is allowed 8 eps times the sum
of the products' magnitudes (chains of additions are at most about a hundred long, and errors add up like their root),
and a scaled map that error, plus a few roundings of its values, divided by its range. Elementwise results are allowed 4
eps of their factors and one rounding to the result's type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LAYOUTS", "cam_map_oracle", "channel_weights_oracle", "check_cam_map", "check_channel_weights",
    "check_mask_by_features", "check_rescale_multipliers", "features_like", "mask_by_features_oracle",
    "rescale_multipliers_oracle",
]  # fmt: skip

#: name -> function that returns the same values in another memory layout
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last)
        if x.dim() == 4
        else x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    ),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def features_like(shape: Sequence[int], dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensor:
    """Normal values rounded to `dtype`, made on the CPU so that every device sees the same ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def _interpolation(inner: int, outer: int) -> Tensor:
    """(outer, inner) matrix of bilinear interpolation along one axis, align_corners=False."""
    matrix = torch.zeros(outer, inner, dtype=torch.float64)
    for row in range(outer):
        at = max((row + 0.5) * inner / outer - 0.5, 0.0)
        low = min(int(at), inner - 1)
        matrix[row, low] += 1 - (at - low)
        matrix[row, min(low + 1, inner - 1)] += at - low
    return matrix


def cam_map_oracle(
    features: Tensor, weights: Tensor, reference: Tensor | None = None, relu: bool = True, normalize: bool = True,
    size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(maps, raw, finite) in float64 on the CPU, and for each map the greatest sum of |w| |features - reference|."""
    products = _products(features, weights, reference)
    m = products.sum(-3)
    finite = m.isfinite().flatten(-2).all(-1)
    raw = torch.where(m <= 0, 0.0, m) if relu else m
    height, width = raw.shape[-2:]
    u = raw
    if size is not None and tuple(size) != (height, width):
        u = _interpolation(height, size[0]) @ raw @ _interpolation(width, size[1]).T
    magnitude = products.abs().sum(-3).flatten(-2).amax(-1)
    if not normalize:
        return u, raw, finite, magnitude
    low, high = u.amin((-2, -1), keepdim=True), u.amax((-2, -1), keepdim=True)
    flat = (raw.amin((-2, -1), keepdim=True) == raw.amax((-2, -1), keepdim=True)) | (low == high)
    maps = torch.where(flat, 0.0, (u - low) / torch.where(flat, 1.0, high - low))
    return torch.where(finite[..., None, None], maps, torch.nan), raw, finite, magnitude


def _products(features: Tensor, weights: Tensor, reference: Tensor | None) -> Tensor:
    difference = features.cpu().double() - (0 if reference is None else reference.cpu().double())
    w = weights.cpu().double()
    if w.dim() in (3, 5):
        difference = difference[:, None]
    return (w if w.dim() >= 4 else w[..., None, None]) * difference


def check_cam_map(got: tuple[Tensor, Tensor, Tensor], *arguments: Any) -> None:
    """Shapes, dtypes, layout, NaN and values of (maps, raw, finite) for these arguments of the op."""
    maps, raw, finite = got
    want_maps, want_raw, want_finite, magnitude = cam_map_oracle(*arguments)
    acc = torch.float64 if arguments[0].dtype == torch.float64 else torch.float32
    assert (maps.dtype, raw.dtype, finite.dtype) == (acc, acc, torch.bool)
    assert (maps.shape, raw.shape, finite.shape) == (want_maps.shape, want_raw.shape, want_finite.shape)
    assert maps.is_contiguous()
    assert raw.is_contiguous()
    assert finite.is_contiguous()
    assert torch.equal(finite.cpu(), want_finite)
    eps = torch.finfo(acc).eps
    error = 8 * eps * magnitude[..., None, None]
    _within(raw, want_raw, error, "raw")
    normalize = arguments[4] if len(arguments) > 4 else True
    greatest = want_raw.abs().amax((-2, -1), keepdim=True)
    error = error + 8 * eps * greatest
    if normalize:
        known = maps[finite]
        assert known.numel() == 0 or (known.amin() >= 0 and known.amax() <= 1)
        unscaled = [*arguments[:4], False, *arguments[5:6]]
        plain = cam_map_oracle(*unscaled)[0]
        extent = plain.amax((-2, -1), keepdim=True) - plain.amin((-2, -1), keepdim=True)
        # A map of one output, or of one value, is constant by definition, not by its extent.
        error = torch.where(want_maps.amax((-2, -1), keepdim=True) == 0, 0.0, 4 * error / extent + 4 * eps)
    _within(maps, want_maps, error, "maps")


def channel_weights_oracle(
    features: Tensor, multipliers: Tensor, reference: Tensor | None = None, mode: str = "mean"
) -> tuple[Tensor, Tensor]:
    """(coefficients, error in units of eps) in float64 on the CPU."""
    g = multipliers.cpu().double()
    a = features.cpu().double() - (0 if reference is None else reference.cpu().double())
    if g.dim() == 5:
        a = a[:, None].expand_as(g)
    positions = g.shape[-1] * g.shape[-2]
    products, shift, size = (g * a).sum((-2, -1)), a.sum((-2, -1)), a.abs().sum((-2, -1))
    if mode == "mean":
        return g.sum((-2, -1)) / positions, 8 * g.abs().sum((-2, -1)) / positions
    if mode == "sum":
        return products, 8 * (g * a).abs().sum((-2, -1))
    if mode == "xgrad":
        guard = shift.abs() <= 1e-6 * size
        safe = torch.where(guard, 1.0, shift)
        value = torch.where(guard, 0.0, products / safe)
        return value, 8 * ((g * a).abs().sum((-2, -1)) + value.abs() * size) / safe.abs()
    denominator = 2 + shift[..., None, None] * g
    guard = denominator.abs() < 1e-6
    alpha = torch.where(guard, 0.0, 1 / torch.where(guard, 1.0, denominator))
    terms = alpha * torch.where(g <= 0, 0.0, g)
    # d alpha = alpha^2 G dS, and the rounding of 2 + S G counts against a small denominator.
    wobble = (alpha**2 * g.clamp(min=0) * (g.abs() * size[..., None, None] + 2 + (denominator - 2).abs())).abs()
    return terms.sum((-2, -1)), 8 * (terms.abs() + wobble).sum((-2, -1))


def check_channel_weights(got: Tensor, *arguments: Any) -> None:
    """Shape, dtype, layout and values of the coefficients for these arguments of the op."""
    want, error = channel_weights_oracle(*arguments)
    acc = torch.float64 if arguments[0].dtype == torch.float64 else torch.float32
    assert (got.dtype, got.shape) == (acc, want.shape)
    assert got.is_contiguous()
    _within(got, want, error * torch.finfo(acc).eps, "coefficients")


def mask_by_features_oracle(
    images: Tensor, features: Tensor, start: int = 0, count: int | None = None, *, noise: Tensor | None = None,
    scale: float = 1.0, order: str = "resize_then_minmax",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(masked images, error) in float64 on the CPU, pair by pair."""
    x, f = images.cpu().double(), features.cpu().double()
    (_, _, height, width), (b, k, h, w) = x.shape, f.shape
    count = b * k - start if count is None else count
    eps = torch.finfo(torch.float64 if images.dtype == torch.float64 else torch.float32).eps
    down, right = _interpolation(h, height), _interpolation(w, width)
    results, errors = torch.empty(2, count, *x.shape[1:], dtype=torch.float64)
    for row in range(count):
        image, channel = divmod(start + row, k)
        raw = f[image, channel]
        u = down @ raw @ right.T
        extent, resized_extent = (v.max() - v.min() for v in (raw, u))
        # Source coordinates are rounded too, by eps times the map's size: values move by at most the extent a position.
        moved = 4 * eps * max(h, w) * extent + 8 * eps * raw.abs().max()
        if not raw.isfinite().all():
            mask, error = torch.full_like(u, torch.nan), 0.0
        elif extent == 0 or (order == "resize_then_minmax" and (resized_extent == 0 or height * width == 1)):
            mask, error = torch.zeros_like(u), 0.0
        elif order == "resize_then_minmax":
            mask, error = (u - u.min()) / resized_extent, float(moved / resized_extent) + 4 * eps
        else:
            mask, error = down @ ((raw - raw.min()) / extent) @ right.T, (4 * max(h, w) + 8) * eps
        added = torch.zeros_like(u) if noise is None else noise[row].cpu().double()
        results[row] = x[image] * scale * (mask + added)
        errors[row] = (x[image] * scale).abs() * (error + 4 * eps * (mask.abs() + added.abs()))
    # One rounding to the result's type; an interpreted bfloat16 store rounds by up to a whole unit.
    info = torch.finfo(images.dtype)
    return results, errors + info.eps * results.abs() + info.tiny * info.eps


def check_mask_by_features(got: Tensor, images: Tensor, *arguments: Any, **options: Any) -> None:
    """Shape, dtype, layout, NaN and values of the masked images for these arguments of the op."""
    want, error = mask_by_features_oracle(images, *arguments, **options)
    assert (got.dtype, got.shape) == (images.dtype, want.shape)
    last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    _within(got, want, error, "masked images")


def rescale_multipliers_oracle(
    multipliers: Tensor, inputs: Tensor, reference: Tensor, negative_slope: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(result, error in units of eps) in float64 on the CPU."""
    g, u, r = (x.cpu().double() for x in (multipliers, inputs, reference))
    r = r.expand_as(u)
    low, high = torch.minimum(u, r), torch.maximum(u, r)  # s is symmetric; both hand NaN on
    # The share of the step from low to high on the negative side: infinity has none, and NaN fails both comparisons.
    step = (high - low).nan_to_num(posinf=torch.nan, nan=torch.nan)
    share = torch.where(low > 0, 0.0, torch.where(high <= 0, 1.0, -low / step))
    return g * (1 + share * (negative_slope - 1)), 4 * g.abs() * max(1.0, abs(negative_slope))


def check_rescale_multipliers(got: Tensor, *arguments: Any) -> None:
    """Shape, dtype, layout and values of the multipliers for these arguments of the op."""
    multipliers, inputs, *_ = arguments
    want, error = rescale_multipliers_oracle(*arguments)
    assert (got.dtype, got.shape) == (multipliers.dtype, inputs.shape)
    assert got.stride() == torch.empty_like(multipliers).stride()
    acc = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    out = torch.finfo(got.dtype)
    error = error * torch.finfo(acc).eps + want.abs() * out.eps + out.smallest_normal * out.eps
    _within(got, want, error, "multipliers")


def _within(got: Tensor, want: Tensor, error: Tensor, name: str) -> None:
    """|got - want| <= error where `want` is finite, and the same NaN and infinity elsewhere."""
    got = got.cpu().double()
    usual = want.isfinite() & error.isfinite()
    excess = torch.where(usual, (got - want).abs() - error, -1.0)
    excess = torch.where(usual & got.isnan(), torch.inf, excess)
    if excess.numel() and excess.max() > 0:
        worst = int(excess.argmax())
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {excess.numel()} values differ; worst {got.flatten()[worst]}, "
            f"expected {want.flatten()[worst]} within {error.expand_as(want).flatten()[worst]}"
        )
    odd = ~want.isfinite()
    assert torch.equal(got[odd].nan_to_num(2.0, 1.0, -1.0), want[odd].nan_to_num(2.0, 1.0, -1.0)), (
        f"{name}: NaN or infinity"
    )
