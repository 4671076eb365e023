"""Smooth Grad-CAM++."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcam import ops
from fastcam._dtypes import accumulation_dtype

from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage

__all__ = ["METHOD", "SmoothGradCamPpOptions", "smooth_grad_cam_pp"]

#: |2 + S r| below which a is 0, as in Grad-CAM++.
_CANCELLED = 1e-6


@dataclass(frozen=True)
class SmoothGradCamPpOptions(CamOptions):
    """As `CamOptions`, and

    n          noisy copies of each image
    noise_std  standard deviation of the noise, in the units of the images as the model sees them, after normalisation
               (`std` alone is how the images were normalised)
    seed       of the noise, which is drawn once for an image shape and is the same for all images
    """

    n: int = 4
    noise_std: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n must be an integer of at least 1; got {self.n!r}")
        if not 0 <= self.noise_std < math.inf:
            raise ValueError(f"noise_std must be finite and at least 0; got {self.noise_std!r}")


def smooth_grad_cam_pp(passage: Passage, options: SmoothGradCamPpOptions) -> Evidence:
    """Grad-CAM++ with powers of the gradient averaged over noisy copies of the image.

    alpha_k = sum_ij a_k[i,j] relu(<G_k>[i,j]),   G = d y / d A at x + N(0, noise_std^2),   <.> the mean over n copies
    a = <G^2> / (2 <G^2> + S_k <G^3>),  S_k = sum_ij A_k[i,j] of the clean image;  a = 0 where <G^2> = 0 or where
    |2 + S_k <G^3> / <G^2>| < 1e-6
    M = relu(sum_k alpha_k A_k)

    n = 1 with noise_std = 0 is Grad-CAM++, and so is every n on heads that are affine in the features: their gradients
    do not depend on the image. The classes explained are those of the clean image. The paper prints a first derivative
    in the numerator of a; this is the second, as in Grad-CAM++, where the formula comes from, and in TorchCAM, whose
    default n and deviation are used. The noise there differs from image to image; here one draw serves all, so that an
    image's map does not depend on its batch.

    Shapes: A and G (B, K, *spatial), alpha (B, K), M (B, *spatial); T targets add an axis after B.
    Errors: ValueError for n < 1 or a negative noise_std.
    Cost: as Grad-CAM++ where the head is affine and the targets are classes; else, beside the clean pass, n forward
    passes and n passes back through the head for each target. Three sums as large as G are kept, whatever n.
    Source: Omeiza et al., Smooth Grad-CAM++, arXiv 1908.01224, sec. 3; a as in Grad-CAM++, arXiv 1710.11063, eq. 10.
    """
    rank = passage.spatial_rank
    if passage.linear and passage.targets.indices is not None:
        features, gradients = (planar(x, rank) for x in (passage.features, passage.gradients()))
        return Evidence(weights=ops.channel_weights(features, gradients, mode="grad_cam_pp"))
    passage.release()
    powers = _Powers(rank)
    for noise in _noise(passage.images, options):
        powers.add(passage.again(passage.images + noise, options).gradients())
    total = passage.features.to(accumulation_dtype(passage.features.dtype)).flatten(2).sum(2)
    return Evidence(weights=powers.weights(total.unsqueeze(1) if passage.targets.several else total, options.n))


def _noise(images: Tensor, options: SmoothGradCamPpOptions) -> Iterator[Tensor]:
    """(1, C, *spatial), n times; drawn on the CPU, so that all devices see the same."""
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.n):
        yield torch.randn((1, *images.shape[1:]), generator=generator).to(images) * options.noise_std


class _Powers:
    """Sums of G, G^2 and G^3, each image's in units of the largest |G| it has had, so that no power vanishes."""

    def __init__(self, spatial_rank: int):
        self._rank = spatial_rank
        self._unit: Tensor | None = None
        self._sums: list[Tensor] = []

    def add(self, gradients: Tensor) -> None:
        gradients = gradients.to(accumulation_dtype(gradients.dtype))
        dims = tuple(range(-self._rank - 1, 0))
        largest = gradients.abs().amax(dims, keepdim=True)
        if self._unit is None:
            self._unit = torch.zeros_like(largest)
            self._sums = [torch.zeros(gradients.shape).to(gradients) for _ in range(3)]
        unit = torch.maximum(self._unit, largest)
        divisor = torch.where(unit == 0, 1, unit)
        shrink, scaled = self._unit / divisor, gradients / divisor
        self._unit, power = unit, scaled
        for exponent, total in enumerate(self._sums, 1):
            total.mul_(shrink**exponent).add_(power)
            power = power * scaled

    def weights(self, total: Tensor, count: int) -> Tensor:
        """(B[, T], K) coefficients from the features' sums S (B[, 1], K)."""
        assert self._unit is not None
        first, second, third = self._sums
        spread = total.reshape(*total.shape, *(1,) * self._rank) * self._unit
        bottom = 2 + spread * (third / torch.where(second == 0, 1, second))
        a = torch.where((second == 0) | (bottom.abs() < _CANCELLED), 0, 1 / bottom)
        positions = tuple(range(-self._rank, 0))
        return (a * first.clamp(min=0)).sum(positions) * (self._unit / count).squeeze(positions)


METHOD = Method(
    "smooth_grad_cam_pp",
    "Grad-CAM++ with powers of the gradient averaged over noisy images",
    "arXiv 1908.01224, sec. 3",
    smooth_grad_cam_pp,
    needs="gradients",
    options=SmoothGradCamPpOptions,
)
