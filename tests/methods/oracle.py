"""The written formulas of the CAM family in plain PyTorch: hooks, autograd and loops; slower and simpler than the code
under test and sharing none of it. Works in the dtype it is given, float64 for the oracle proper.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Score = Callable[[object], Tensor]
METHODS = ["cam", "grad_cam", "grad_cam_pp", "xgrad_cam", "hires_cam", "layer_cam", "eigen_cam", "eigen_grad_cam"]
#: Methods whose definition stands on any head.
GENERAL = METHODS[1:]


def logit(classes: Sequence[int] | Tensor) -> Score:
    """The class's output, one class an image."""
    return lambda output: output.gather(1, torch.as_tensor(classes)[:, None])[:, 0]


def tap(
    model: nn.Module, layer: str, images: Tensor, score: Score, dtype: torch.dtype | None = torch.float64
) -> tuple[Tensor, Tensor, object]:
    """(A, d score / d A, output) at the last run of module `layer`, taken before anything writes into A."""
    model = copy.deepcopy(model).eval()
    if dtype is not None:
        model, images = model.to(dtype), images.to(dtype)
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: object, result: Tensor) -> Tensor:
        kept.append(result.detach().clone().requires_grad_())
        return kept[-1].clone()

    model.get_submodule(layer).register_forward_hook(hook)
    with torch.enable_grad():
        output = model(images)
        (gradient,) = torch.autograd.grad(score(output).sum(), kept[-1])
    return kept[-1].detach(), gradient, output


def coefficients(method: str, a: Tensor, g: Tensor) -> Tensor:
    """(K,) channel coefficients of one image; a, g (K, *spatial)."""
    alphas = []
    for a_k, g_k in zip(a, g, strict=True):
        total = a_k.sum()
        if method == "cam":  # pooled linear heads: W = Z G
            alpha = g_k.flatten()[0] * g_k.numel()
        elif method == "grad_cam":
            alpha = g_k.mean()
        elif method == "xgrad_cam":
            dead = total.abs() <= 1e-6 * a_k.abs().sum()
            alpha = total * 0 if dead else (g_k * a_k).sum() / total
        elif method == "grad_cam_pp":
            positive = g_k[(g_k > 0) & ((2 + total * g_k).abs() >= 1e-6)]  # relu(G) = 0 elsewhere
            alpha = (positive * positive**2 / (2 * positive**2 + total * positive**3)).sum()
        else:
            raise KeyError(method)
        alphas.append(alpha)
    return torch.stack(alphas)


def evidence(method: str, a: Tensor, g: Tensor, center: bool = True) -> Tensor:
    """(*spatial): the map of one image before ReLU; a, g (K, *spatial)."""
    if method == "eigen_cam":
        return principal(a, center)
    if method == "eigen_grad_cam":
        return principal(g * a, center)
    found = torch.zeros_like(a[0])
    if method in ("hires_cam", "layer_cam"):
        for a_k, g_k in zip(a, g, strict=True):
            found = found + (g_k.clamp(min=0) if method == "layer_cam" else g_k) * a_k
        return found
    for alpha, a_k in zip(coefficients(method, a, g), a, strict=True):
        found = found + alpha * a_k
    return found


def principal(a: Tensor, center: bool = True) -> Tensor:
    """Projection of the positions on the first right singular vector of the (Z, K) matrix; |max| >= |min|."""
    x = a.flatten(1).T
    if center:
        x = x - x.mean(0)
    _, values, rows = torch.linalg.svd(x, full_matrices=False)
    if len(values) > 1 and values[0] > 0:
        assert values[1] / values[0] < 0.999, "the test's features have no unique principal component"
    projection = x @ rows[0]
    if -projection.min() > projection.max():
        projection = -projection
    return projection.reshape(a.shape[1:])


def raw_maps(method: str, a: Tensor, g: Tensor, relu: bool | None = None) -> Tensor:
    """(B, *spatial) at layer size, after the method's ReLU, image by image."""
    found = torch.stack([evidence(method, *pair) for pair in zip(a, g, strict=True)])
    return found.clamp(min=0) if (method != "cam" if relu is None else relu) else found


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, *spatial) -> (B, *size): linear interpolation along each axis, pixel centres at (i + 1/2) / n."""
    for axis, wanted in enumerate(size, 1):
        given = maps.shape[axis]
        rows = torch.zeros(wanted, given, dtype=maps.dtype)
        for i in range(wanted):
            place = min(max((i + 0.5) * given / wanted - 0.5, 0.0), given - 1.0)
            low = int(place)
            rows[i, low] += 1 - (place - low)
            rows[i, min(low + 1, given - 1)] += place - low
        maps = torch.tensordot(rows, maps, dims=([1], [axis])).movedim(0, axis)
    return maps


def min_max(maps: Tensor) -> Tensor:
    """(u - min) / (max - min) image by image, zeros where constant."""
    found = torch.zeros_like(maps)
    for b, one in enumerate(maps):
        if one.max() > one.min():
            found[b] = (one - one.min()) / (one.max() - one.min())
    return found


def explain(
    model: nn.Module,
    layer: str,
    images: Tensor,
    method: str,
    score: Score,
    size: Sequence[int] | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(maps at `size` or the images' size, raw maps); formulas of half-precision networks in float32."""
    a, g, _ = tap(model, layer, images, score, dtype)
    if a.dtype in (torch.float16, torch.bfloat16):
        a, g = a.float(), g.float()
    raw = raw_maps(method, a, g)
    return min_max(resized(raw, size or images.shape[2:])), raw
