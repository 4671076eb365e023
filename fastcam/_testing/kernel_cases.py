"""Float64 oracles, inputs and tolerances of every op, for tests of any implementation.

The oracles are the written formulas: sums over materialised products, resizing by explicit interpolation matrices. They
share no code with the references or the kernels.

Tolerances follow the arithmetic. With eps of the accumulation type, a sum of products is allowed 8 eps times the sum
of the products' magnitudes (chains of additions are at most about a hundred long, and errors add up like their root),
and a scaled map that error, plus a few roundings of its values, divided by its range. Elementwise results are allowed 4
eps of their factors and one rounding to the result's type.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "LAYOUTS", "LFI_CHECKS", "RELEVANCE_CHECKS", "RULES", "TERMS", "WEIGHTINGS", "cam_map_oracle",
    "channel_weights_oracle", "check_cam_map", "check_channel_weights", "check_lfi_attend",
    "check_lfi_attend_backward", "check_lfi_mask", "check_lfi_mask_backward", "check_mask_by_features",
    "check_overlay", "check_perturb_by_rank", "check_relevance_add", "check_relevance_budgets",
    "check_relevance_combine", "check_relevance_divide", "check_relevance_equilibrium", "check_relevance_split",
    "check_rescale_multipliers", "check_similarity_weights", "features_like", "lfi_arguments", "lfi_attend_oracle",
    "lfi_many_channels", "lfi_mask_oracle", "mask_by_features_oracle", "overlay_arguments",
    "perturb_arguments", "perturb_by_rank_oracle",
    "relevance_arguments", "relevance_combine_oracle", "relevance_equilibrium_oracle", "relevance_split_oracle",
    "rescale_multipliers_oracle", "similarity_weights_oracle",
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


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (...,h,w) at another size: bilinear, align_corners=False."""
    rows, columns = (
        [_tap(at, inner, outer) for at in range(outer)] for inner, outer in zip(maps.shape[-2:], size, strict=True)
    )
    top, low, down = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    left, right, across = (torch.tensor(x, dtype=torch.float64) for x in zip(*columns, strict=True))
    upper, lower = (maps[..., x.long(), :] for x in (top, low))
    upper, lower = ((1 - across) * x[..., left.long()] + across * x[..., right.long()] for x in (upper, lower))
    return (1 - down[:, None]) * upper + down[:, None] * lower


def _tap(row: int, inner: int, outer: int) -> tuple[int, int, float]:
    """The two source rows that a row mixes, and the share of the second."""
    at = max((row + 0.5) * inner / outer - 0.5, 0.0)
    low = min(int(at), inner - 1)
    return low, min(low + 1, inner - 1), at - low


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
        u = _resized(raw, size)
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
    lost = arguments[0].shape[1] * torch.finfo(acc).smallest_normal * eps  # each product's underflow
    error = 8 * eps * magnitude[..., None, None] + lost
    _within(raw, want_raw, error, "raw")
    normalize = arguments[4] if len(arguments) > 4 else True
    greatest = want_raw.abs().amax((-2, -1), keepdim=True)
    error = error + 8 * eps * greatest
    if maps.shape[-2:] != raw.shape[-2:]:  # source coordinates are rounded too
        lowest = want_raw.amin((-2, -1), keepdim=True)
        error = error + 4 * eps * max(raw.shape[-2:]) * (want_raw.amax((-2, -1), keepdim=True) - lowest)
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
    info = torch.finfo(acc)
    lost = arguments[0].shape[-1] * arguments[0].shape[-2] * info.smallest_normal * info.eps  # each term's underflow
    rounded = 2 if acc == torch.float64 else 1  # the oracle rounds as well
    _within(got, want, rounded * error * info.eps + lost, "coefficients")


def mask_by_features_oracle(
    images: Tensor, features: Tensor, start: int = 0, count: int | None = None, *, noise: Tensor | None = None,
    scale: float = 1.0, order: str = "resize_then_minmax",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(masked images, error) in float64 on the CPU, pair by pair."""
    x, f = images.cpu().double(), features.cpu().double()
    (_, _, height, width), (b, k, h, w) = x.shape, f.shape
    count = b * k - start if count is None else count
    acc = torch.finfo(torch.float64 if images.dtype == torch.float64 else torch.float32)
    eps, least = acc.eps, acc.tiny * acc.eps
    results, errors = torch.empty(2, count, *x.shape[1:], dtype=torch.float64)
    for row in range(count):
        image, channel = divmod(start + row, k)
        raw = f[image, channel]
        u = _resized(raw, (height, width))
        extent, resized_extent = (v.max() - v.min() for v in (raw, u))
        # Source coordinates are rounded too, by eps times the map's size: values move by at most the extent a position.
        # Of subnormal maps every product is rounded to a multiple of the least number.
        moved = 4 * eps * max(h, w) * extent + 8 * eps * raw.abs().max() + 4 * least
        if not raw.isfinite().all():
            mask, error = torch.full_like(u, torch.nan), 0.0
        elif extent == 0 or (order == "resize_then_minmax" and (resized_extent == 0 or height * width == 1)):
            mask, error = torch.zeros_like(u), 0.0
        elif order == "resize_then_minmax":
            mask, error = (u - u.min()) / resized_extent, float(moved / resized_extent) + 4 * eps
        else:
            mask = _resized((raw - raw.min()) / extent, (height, width))
            error = (4 * max(h, w) + 8) * eps
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
    _within(got, _stored(want, torch.finfo(images.dtype)), error, "masked images")


def overlay_arguments(
    shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", targets: int = 0, signed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(images, maps, table of 37 colours) of overlay: values in and out of range, zeros, NaN and infinity."""
    b, _, h, w = shape
    images = 0.6 * features_like(shape, dtype, 1) + 0.5
    maps = features_like((b, targets, h, w) if targets else (b, h, w), dtype, 2) * 0.7
    maps = maps if signed else maps.abs()
    maps[..., 0, :2] = 0
    for x in (images, maps):
        for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            x.view(-1)[5 * i + 3 :: 97] = value
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    table = 255 * torch.rand((37, 3), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return LAYOUTS[layout](images), LAYOUTS[layout](maps), table.to(acc)


def check_overlay(
    got: Tensor, images: Tensor, maps: Tensor, table: Tensor, alpha: float = 0.8, signed: bool = False, *,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
) -> None:  # fmt: skip
    """Shape, dtype, layout and every byte for these arguments of the op.

    Three numbers are rounded on the way, the pixel, the entry and the result: where rounding errors could have put one
    of them on either side of a half, both are right.
    """
    assert (got.dtype, got.shape) == (torch.uint8, (*maps.shape, 3))
    assert got.is_contiguous()
    eps = torch.finfo(torch.float64 if images.dtype == torch.float64 else torch.float32).eps
    x, m, colours = (t.cpu().double().numpy() for t in (images, maps, table))
    scale, shift = (np.array(v or d, dtype=float).reshape(1, -1, 1, 1) for v, d in ((std, 1.0), (mean, 0.0)))
    with np.errstate(invalid="ignore"):
        x = np.broadcast_to(x * scale + shift, (len(x), 3, *x.shape[2:]))
        wobble = 255 * eps * (4 * np.abs(np.clip(np.nan_to_num(x), -2, 2)) + 4 * np.abs(shift))
    pixel = np.moveaxis(255 * np.clip(np.where(np.isnan(x), 0, x), 0, 1), 1, -1)
    wobble = np.moveaxis(np.broadcast_to(wobble, x.shape), 1, -1)
    if m.ndim == 4:
        pixel, wobble = pixel[:, None], wobble[:, None]
    lowest = -1.0 if signed else 0.0
    value = np.clip(np.where(np.isnan(m), 0, m), lowest, 1)
    place, opacity = (value - lowest) / (1 - lowest) * (len(colours) - 1), (alpha * np.sqrt(np.abs(value)))[..., None]
    found, good = got.cpu().numpy(), np.zeros(got.shape, bool)
    for pixel_side, place_side in itertools.product((-1, 1), repeat=2):
        p = np.rint(pixel + pixel_side * wobble)
        colour = colours[np.clip(np.rint(place + place_side * 4 * eps * len(colours)), 0, len(colours) - 1).astype(int)]
        want = np.clip(p + opacity * (colour - p), 0, 255)
        good |= np.abs(found - want) <= 0.5 + 255 * 8 * eps
    assert good.all(), f"{(~good).sum()} of {good.size} bytes differ, first {np.argwhere(~good)[0].tolist()}"


def perturb_arguments(
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: str = "contiguous",
    plain: bool = True,
    ranks: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, baseline, ranks with ties, counts) of perturb_by_rank; a NaN in each of the images and the baseline."""
    b, c, h, w = shape
    images = features_like(shape, dtype, 1)
    baseline = features_like((1, c, 1, 1) if plain else shape, dtype, 2)
    images[0, 0, 0, 0], baseline[0, -1, 0, 0] = torch.nan, torch.nan
    order = torch.rand((b, h * w), generator=torch.Generator().manual_seed(3)).argsort().view(b, h, w)
    counts = torch.tensor([h * w // 2, 0, 1, h * w, h * w // 3, 2**40, -1, h * w - 1, 2, 5])
    base = baseline if plain else LAYOUTS[layout](baseline)
    return LAYOUTS[layout](images), base, (order - order % 2).to(ranks), counts


def perturb_by_rank_oracle(
    images: Tensor, baseline: Tensor, ranks: Tensor, counts: Tensor, *, keep: bool = False
) -> np.ndarray:
    """The perturbed images as words of their own width, pixel by pixel."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[images.dtype.itemsize]
    x, base = (t.cpu().contiguous().view(bits).numpy() for t in (images, baseline))
    base = np.broadcast_to(base, x.shape)
    result = np.empty((len(x), len(counts), *x.shape[1:]), x.dtype)
    for b, step in np.ndindex(*result.shape[:2]):
        reached = ranks[b].cpu().long().numpy() < int(counts[step])
        result[b, step] = np.where(reached != keep, base[b], x[b])
    return result


def check_perturb_by_rank(got: Tensor, images: Tensor, *arguments: Any, **options: Any) -> None:
    """Shape, dtype, layout and every bit of the perturbed images for these arguments of the op."""
    want = torch.from_numpy(perturb_by_rank_oracle(images, *arguments, **options))
    assert (got.dtype, got.shape) == (images.dtype, want.shape)
    last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    if not got.numel():
        return
    assert got.flatten(0, 1).is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    differ = got.cpu().contiguous().view(want.dtype) != want
    first = differ.nonzero()[:1].tolist()
    assert not first, f"{int(differ.sum())} of {differ.numel()} values differ, first {first}"


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
    _within(got, _stored(want, out), error, "multipliers")


TERMS = ("cosine", "dot", "neg_sq", "cross", "inverse")
WEIGHTINGS = ("minmax", "ratio", "raw")


def similarity_weights_oracle(
    first: Tensor, second: Tensor, term: str = "cosine", weighting: str = "minmax", dissimilarity: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """(contributions, weights, total), each with its error without the last rounding, in float64 on the CPU."""
    u, v = torch.broadcast_tensors(first.cpu().double(), second.cpu().double())
    eps = torch.finfo(torch.float64).eps
    if term == "cosine":
        lengths = [(x * x).sum(1, keepdim=True).sqrt().clamp(min=1e-12) for x in (u, v)]
        c = u * v / (lengths[0] * lengths[1])
    elif term == "neg_sq":
        c = -(u - v).square()
    elif term == "inverse":
        c = (1 + (u - v).abs()).reciprocal()
    else:
        c = u * v * (2 if term == "cross" else 1)
    c = -c if dissimilarity else c
    total, wobble = c.sum(1), 32 * eps * c.abs().sum(1)
    w, error = c, 8 * eps * c.abs()
    if weighting == "minmax":
        extent = c.amax(1, keepdim=True) - c.amin(1, keepdim=True)
        w = torch.where(extent == 0, 1.0, (c - c.amin(1, keepdim=True)) / extent)
        error = 8 * eps * (w + torch.where(extent == 0, 0.0, c.abs().amax(1, keepdim=True) / extent))
        flawed = ~(u.isfinite() & v.isfinite()).all(1) | ~total.isfinite()
        w = w.masked_fill(flawed[:, None], torch.nan)
    elif weighting == "ratio":
        size = torch.where(total == 0, 1.0, total.abs())
        w = c / size[:, None]
        error = w.abs() * (8 * eps + torch.where(total == 0, 0.0, wobble / size))[:, None]
    return [(c, 8 * eps * c.abs()), (w, error), (total, wobble)]


def check_similarity_weights(got: Sequence[Tensor], *arguments: Any) -> None:
    """Shapes, dtypes, layouts, NaN and values of (contributions, weights, total) for these arguments of the op."""
    acc = torch.float64 if arguments[0].dtype == torch.float64 else torch.float32
    info = torch.finfo(acc)
    names = ("contributions", "weights", "total")
    for x, name, (want, error) in zip(got, names, similarity_weights_oracle(*arguments), strict=True):
        assert (x.dtype, x.shape) == (acc, want.shape)
        assert x.is_contiguous()
        error = error + info.eps * want.abs() + info.smallest_normal * info.eps
        _within(x, want.to(acc).double(), error, name)


RULES = ("alpha_beta", "gamma", "rap")


def relevance_arguments(
    op: str, shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", device: str = "cpu", seed: int = 0
) -> tuple[Tensor, ...]:
    """The tensors of a relevance_* op without its factor, with exact zeros, cancellations, budgets of zero."""

    def normal(number: int, times: int = 1) -> Tensor:
        x = features_like((times * shape[0], *shape[1:]), dtype, 10 * seed + number)
        x.view(-1)[number :: 7 + number] = 0
        return x

    r = normal(0)
    budgets = r.double().abs().flatten(1).sum(1)[:, None] * torch.tensor([1.5, 0.25], dtype=torch.float64)
    budgets = budgets.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if len(r) > 1:
        budgets[-1] = 0
    p = normal(1).abs()
    z = (p - normal(2).abs()).to(dtype)
    z.view(-1)[3::11] = p.view(-1)[3::11] * (1 - 6 * torch.finfo(dtype).eps)  # no more than rounding below p
    tensors: tuple[Tensor, ...] = {
        "relevance_divide": lambda: (r, normal(1)),
        "relevance_add": lambda: (r, normal(1), normal(2)),
        "relevance_split": lambda: (r, z, p),
        "relevance_budgets": lambda: (r,),
        "relevance_equilibrium": lambda: (r, budgets, normal(1, 3)),
        "relevance_combine": lambda: (r, normal(1, 3), budgets),
    }[op]()
    return tuple((x if x is budgets else LAYOUTS[layout](x)).to(device) for x in tensors)


def _double(*tensors: Tensor | None) -> list[Tensor]:
    return [torch.ones((), dtype=torch.float64) if x is None else x.cpu().double() for x in tensors]


def _over(r: Tensor, d: Tensor, epsilon: float) -> Tensor:
    """r over d, which epsilon moves away from zero on its own side; no divisor, no result."""
    d = d + torch.copysign(torch.tensor(epsilon, dtype=torch.float64), torch.where(d == 0, 1.0, d))
    return (r / d).masked_fill(d == 0, 0.0)


def _worse(*summands: Tensor) -> Tensor:
    """How much larger a relative error of the summands is in their sum."""
    total = sum(summands).abs()
    return torch.nan_to_num(sum(x.abs() for x in summands) / total, 1.0, 1.0).clamp(min=1.0)


def relevance_split_oracle(
    relevance: Tensor, output: Tensor, positive: Tensor, factor: Tensor | None = None, *, rule: str, first: float = 2.0,
    second: float = 1.0, epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(messages, error in units of eps) in float64 on the CPU."""
    r, z, p, f = _double(relevance, output, positive, factor)
    r = r * f
    n = (z - p).masked_fill(p - z <= 8 * torch.finfo(relevance.dtype).eps * p, 0.0)
    if rule == "alpha_beta":
        u, v = first * _over(r, p, epsilon), (-second * _over(r, n, epsilon)).masked_fill(n == 0, 0.0)
        error_u, error_v = u.abs(), v.abs()
    elif rule == "gamma":
        u = _over(r.masked_fill(z <= 0, 0.0), z + first * p, epsilon)
        v = _over(r, z + first * n, epsilon).masked_fill(z >= 0, 0.0)
        error_u, error_v = u.abs() * _worse(z, first * p), v.abs() * _worse(z, first * n)
    else:
        own, shared = _over(torch.where(r >= 0, 0.0, r), n.abs(), 0.0), _over(r, p - n, 0.0)
        u, v = _over(torch.where(r <= 0, 0.0, r), p, 0.0), own + shared
        error_u, error_v = u.abs(), own.abs() + shared.abs() * _worse(p, n)
    return torch.cat([u, v], 1), 8 * torch.cat([error_u, error_v], 1)


def relevance_equilibrium_oracle(
    relevance: Tensor, budgets: Tensor, divisors: Tensor, ratio: float = 2.0
) -> tuple[Tensor, Tensor]:
    """(messages, error in units of eps) in float64 on the CPU."""
    r, totals, z = _double(relevance, budgets, divisors)
    totals = totals.reshape(-1, 2, *(1,) * (r.dim() - 1))
    positive = _over(torch.where(r <= 0, 0.0, r), totals[:, 0], 0.0)
    negative = _over(torch.where(r >= 0, 0.0, r), totals[:, 1], 0.0)
    want = _over(torch.cat([ratio * positive + negative, positive, negative]), z, 0.0)
    return want, 8 * want.abs()


def relevance_combine_oracle(
    inputs: Tensor, parts: Tensor, budgets: Tensor, shift: bool = True, threshold: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(relevance, error in units of eps) in float64 on the CPU. No product of the tests underflows in float32."""
    x, t, totals = _double(inputs, parts, budgets)
    want, errors = torch.empty_like(x), torch.empty_like(x)
    for b, image in enumerate(x):
        shared, active, inactive = t[b], t[len(x) + b], t[2 * len(x) + b]
        c = (image * shared).masked_fill(image <= 0, 0.0)
        counted = (c != 0).double()
        taken = 1 / max(int(counted.sum()), 1) if shift and totals[b, 0] > 0 else 0.0
        added = torch.where(image > threshold, active, inactive)
        want[b] = c - taken * counted + added
        errors[b] = 8 * (c.abs() + taken * counted + added.abs())
    return want, errors


def check_relevance_divide(
    got: Tensor, relevance: Tensor, divisor: Tensor, factor: Tensor | None = None, epsilon: float = 1e-6
) -> None:
    """Shape, dtype, layout, NaN and values for these arguments of the op."""
    r, d, f = _double(relevance, divisor, factor)
    want = _over(r * f, d, epsilon)
    _check_relevance(got, relevance, want, 8 * want.abs(), "messages")


def check_relevance_add(
    got: Sequence[Tensor], relevance: Tensor, first: Tensor, second: Tensor, factor: Tensor | None = None,
    epsilon: float = 1e-6,
) -> None:  # fmt: skip
    """Shapes, dtypes, layouts, NaN and values for these arguments of the op."""
    r, a, b, f = _double(relevance, first, second, factor)
    share = _over(r * f, a + b, epsilon)
    assert len(got) == 2
    for result, summand, name in zip(got, (a, b), ("first", "second"), strict=True):
        _check_relevance(result, relevance, summand * share, 8 * (summand * share).abs(), name)


def check_relevance_split(got: Tensor, *arguments: Any, **options: Any) -> None:
    """Shape, dtype, layout, NaN and values for these arguments of the op."""
    relevance = arguments[0]
    want, error = relevance_split_oracle(*arguments, **options)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(relevance.dim(), torch.contiguous_format)
    if relevance.is_contiguous() or not relevance.is_contiguous(memory_format=last):
        last = torch.contiguous_format
    like = torch.empty(want.shape, dtype=relevance.dtype, memory_format=last)
    _check_relevance(got, like, want, error, "messages")


def check_relevance_budgets(got: Tensor, relevance: Tensor) -> None:
    """Shape, dtype, layout, NaN and values for this argument of the op."""
    (r,) = _double(relevance)
    want = torch.stack([torch.maximum(x, torch.zeros_like(x)).flatten(1).sum(1) for x in (r, -r)], 1)
    acc = torch.float64 if relevance.dtype == torch.float64 else torch.float32
    assert (got.dtype, got.shape) == (acc, want.shape)
    assert got.is_contiguous()
    _within(got, want, 8 * want * torch.finfo(acc).eps, "budgets")


def check_relevance_equilibrium(got: Tensor, *arguments: Any) -> None:
    """Shape, dtype, layout, NaN and values for these arguments of the op."""
    _check_relevance(got, arguments[2], *relevance_equilibrium_oracle(*arguments), "messages")


def check_relevance_combine(got: Tensor, *arguments: Any) -> None:
    """Shape, dtype, layout, NaN and values for these arguments of the op."""
    _check_relevance(got, arguments[0], *relevance_combine_oracle(*arguments), "relevance")


def _check_relevance(got: Tensor, like: Tensor, want: Tensor, error: Tensor, name: str) -> None:
    """As empty_like(like), `want` to an error in units of eps and one rounding to the result's type."""
    assert (got.dtype, got.shape) == (like.dtype, like.shape)
    assert got.stride() == torch.empty_like(like).stride()
    acc = torch.float64 if like.dtype == torch.float64 else torch.float32
    out = torch.finfo(got.dtype)
    error = error * torch.finfo(acc).eps + want.abs() * out.eps + out.smallest_normal * out.eps
    _within(got, _stored(want, out), error, name)


def _stored(want: Tensor, out: torch.finfo) -> Tensor:
    """Infinity where a result's type ends."""
    beyond = want.abs() >= out.max * (1 + out.eps / 4)
    return torch.where(beyond, torch.copysign(torch.tensor(torch.inf).double(), want), want)


#: op -> what checks its results
RELEVANCE_CHECKS: dict[str, Callable[..., None]] = {
    "relevance_divide": check_relevance_divide,
    "relevance_add": check_relevance_add,
    "relevance_split": check_relevance_split,
    "relevance_budgets": check_relevance_budgets,
    "relevance_equilibrium": check_relevance_equilibrium,
    "relevance_combine": check_relevance_combine,
}


def lfi_arguments(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: str = "contiguous",
    wide: bool = False,
    device: str = "cpu",
) -> tuple[Any, ...]:
    """The tensors of an lfi_* op: features with zeros, ties, a constant and a dead channel, an image without attention.

    wide       grey and importance in the accumulation dtype
    """
    b, k, h, w = shape
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    features, grad = features_like(shape, dtype, 1), features_like(shape, dtype, 2)
    features[:, ::2] = features[:, ::2].relu()
    features[:, 1::3] = (4 * features[:, 1::3]).round() / 4
    features[0, 0], features[-1, -1] = 0.5, 0
    grey = features_like((b, 1, h, w), acc if wide else dtype, 3)
    importance = features_like((b, k), acc if wide else dtype, 4)
    if b > 2:
        features[1], importance[1] = features[1].abs(), -importance[1].abs()
    grad_attention, grad_raw = features_like((b, 1, h, w), acc, 5), features_like((b, 1, h, w), acc, 6)
    raw = lfi_attend_oracle(features, importance)[2].to(acc)
    attention = _scaled(raw.double(), "raw").to(acc)
    features, grad = (LAYOUTS[layout](x.to(device)) for x in (features, grad))
    tensors: dict[str, tuple[Tensor, ...]] = {
        "lfi_mask": (features, grey),
        "lfi_mask_backward": (grad, features, grey),
        "lfi_attend": (features, importance),
        "lfi_attend_backward": (grad, grad_attention, grad_raw, features, importance, attention, raw),
    }
    return tuple(x.to(device) for x in tensors[op])


def lfi_many_channels(channels: int, height: int, width: int, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """(features, importance) in float32 as after a ReLU and a softmax.

    The map's range is a tenth of its values: what their sums over the channels are off counts ten times.
    """
    features = LAYOUTS[layout](features_like((2, channels, height, width), torch.float32, 21).relu())
    return features, features_like((2, channels), torch.float32, 22).softmax(1)


def _scaled(p: Tensor, constant_map: str) -> Tensor:
    """Min-max scaling over positions that autograd can go through."""
    low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
    flat = low == high
    kept = p if constant_map == "raw" else torch.zeros_like(p)
    found = torch.where(flat, kept, (p - low) / torch.where(flat, 1.0, high - low))
    return torch.where(p.isfinite().all(-1, True).all(-2, True), found, torch.nan)


def lfi_mask_oracle(features: Tensor, grey: Tensor) -> Tensor:
    """The masks in float64 on the CPU."""
    f, g = _double(features, grey)
    low, high = f.amin((2, 3), keepdim=True), f.amax((2, 3), keepdim=True)
    flat = low == high
    n = torch.where(flat, 1.0, (f - low) / torch.where(flat, 1.0, high - low))
    return torch.where((f == 0) & ~f.isnan().any(-1, True).any(-2, True), 0.0, n) * g


def lfi_attend_oracle(
    features: Tensor, importance: Tensor, constant_map: str = "raw"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(attended, attention, raw) in float64 on the CPU, and each image's greatest sum of |s| |F|."""
    f, s = _double(features, importance)
    products = s[:, :, None, None] * f
    m = products.sum(1, keepdim=True)
    raw = torch.where(m <= 0, 0.0, m)
    attention = _scaled(raw, constant_map)
    magnitude = products.abs().sum(1, keepdim=True).amax((2, 3), keepdim=True)
    return (1 + attention) * f, attention, raw, magnitude


def check_lfi_mask(got: Tensor, features: Tensor, grey: Tensor) -> None:
    """Shape, dtype, layout, NaN and values for these arguments of the op."""
    want = lfi_mask_oracle(features, grey)
    _check_relevance(got, features, want, 8 * want.abs(), "masks")


def check_lfi_mask_backward(got: Tensor, grad: Tensor, features: Tensor, grey: Tensor) -> None:
    """Shape, dtype, layout, NaN and values for these arguments of the op: autograd through the oracle."""
    g, f, shade = _double(grad, features, grey)
    f.requires_grad_()
    (want,) = torch.autograd.grad(lfi_mask_oracle(f, shade), f, g)
    f = f.detach()
    extent = f.amax((2, 3), keepdim=True) - f.amin((2, 3), keepdim=True)
    passed = (g * shade / torch.where(extent == 0, 1.0, extent)).abs()
    _check_relevance(got, features, want, 16 * (passed + passed.sum((2, 3), keepdim=True)), "gradient")


def check_lfi_attend(got: Sequence[Tensor], features: Tensor, importance: Tensor, constant_map: str = "raw") -> None:
    """Shapes, dtypes, layouts, NaN and values of (attended, attention, raw) for these arguments of the op."""
    attended, attention, raw = got
    want_attended, want_attention, want_raw, magnitude = lfi_attend_oracle(features, importance, constant_map)
    acc = torch.float64 if features.dtype == torch.float64 else torch.float32
    assert (attention.dtype, raw.dtype) == (acc, acc)
    assert attention.is_contiguous()
    assert raw.is_contiguous()
    assert attention.shape == raw.shape == want_raw.shape
    eps = torch.finfo(acc).eps
    error = 8 * magnitude * torch.ones_like(want_raw)
    _within(raw, want_raw, error * eps, "raw")
    extent = want_raw.amax((2, 3), keepdim=True) - want_raw.amin((2, 3), keepdim=True)
    error = torch.where(extent == 0, error, 4 * error / extent + 4)
    _within(attention, want_attention, error * eps, "attention")
    f = features.cpu().double().abs()
    _check_relevance(attended, features, want_attended, (error + 8 * (1 + want_attention.abs())) * f, "attended")


def check_lfi_attend_backward(
    got: Sequence[Tensor], grad_attended: Tensor, grad_attention: Tensor | None, grad_raw: Tensor | None,
    features: Tensor, importance: Tensor, attention: Tensor, raw: Tensor, constant_map: str = "raw",
) -> None:  # fmt: skip
    """Shapes, dtypes, layouts and values of both gradients for these arguments: autograd through the scaling of raw."""
    g, f, s, p = _double(grad_attended, features, importance, raw)
    given, extra = (torch.zeros_like(p) if x is None else x.cpu().double() for x in (grad_attention, grad_raw))
    p.requires_grad_()
    a = _scaled(p, constant_map)
    (grad_p,) = torch.autograd.grad([(1 + a) * f, a], p, [g, given], allow_unused=True, materialize_grads=True)
    a, p = a.detach(), p.detach()
    pre = torch.where(p > 0, grad_p + extra, 0.0)
    s = s[:, :, None, None]
    want, want_importance = (1 + a) * g + s * pre, (pre * f).sum((2, 3))
    extent = p.amax((2, 3), keepdim=True) - p.amin((2, 3), keepdim=True)
    size = ((g * f).abs().sum(1, keepdim=True) + given.abs()) / torch.where(extent == 0, 1.0, extent)
    size = size + size.sum((2, 3), keepdim=True) + extra.abs()
    assert len(got) == 2
    _check_relevance(got[0], features, want, 16 * ((1 + a) * g.abs() + s.abs() * size), "gradient of the features")
    like = torch.empty(importance.shape, dtype=importance.dtype)
    _check_relevance(got[1], like, want_importance, 16 * (size * f.abs()).sum((2, 3)), "gradient of the importances")


#: op -> what checks its results
LFI_CHECKS: dict[str, Callable[..., None]] = {
    "lfi_mask": check_lfi_mask,
    "lfi_mask_backward": check_lfi_mask_backward,
    "lfi_attend": check_lfi_attend,
    "lfi_attend_backward": check_lfi_attend_backward,
}


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
