"""FullGrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype

from ._maps import resized
from ._method import Evidence, Method, MethodOptions, Passage

__all__ = ["METHOD", "FullGradOptions", "full_grad"]

#: What each form adds to the range it divides by.
_EPS = {"authors": 1e-6, "per_channel": 1e-7}


@dataclass(frozen=True)
class FullGradOptions(MethodOptions):
    """As `MethodOptions`, and

    postprocess  how psi brings layers to one scale: "authors", over all channels together · "per_channel", each channel
                 by itself, and resized with align_corners=False, as pytorch-grad-cam does
    eps          added to the range that psi divides by; None: that of the form, 1e-6 or 1e-7. With 0 a constant layer
                 gives zeros
    """

    postprocess: Literal["authors", "per_channel"] = "authors"
    eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.postprocess not in _EPS:
            raise ValueError(f"postprocess must be one of {', '.join(map(repr, _EPS))}; got {self.postprocess!r}")
        if self.eps is not None and not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps must be None, or finite and at least 0; got {self.eps!r}")


def full_grad(passage: Passage, options: FullGradOptions) -> Evidence:
    """Input times gradient, and every bias times the gradient where it is added, each layer brought to one scale.

    M = psi(x dy/dx) + sum over layers of psi(b_l dy/dz_l),   z_l the layer's result, b_l the bias in it
    psi(P) = sum over channels of resize((|P| - min |P|) / (max |P| - min |P| + eps)),  min and max over the layer
    sum x dy/dx + sum over layers and positions of b_l dy/dz_l = y

    The sum is exact for networks of convolutions, linear layers, evaluated batch norms, (leaky) ReLU, max and average
    pools, additions and concatenations; `Attribution.delta` is what it misses by, which on other networks is what their
    smooth or saturating steps hold beyond their tangent. A batch norm's bias is beta - mean gamma / sqrt(variance +
    eps); that of other norms is beta; parameters and numbers added anywhere count as well. Biases of what is no feature
    map (the classifier, tokens) enter the sum but not the map.

    Shapes: x (B, C, *spatial) the images, M (B, *spatial), M >= 0; T targets add an axis after B. With `layer`, x are
    its features and everything that does not follow from them is a bias.
    Errors: ValueError for another `postprocess` or a negative eps; RuntimeError for a network that cannot be captured.
    Cost: the forward pass, recorded, and a backward pass for each target that frees each layer's gradient after use;
    `compile` leaves it as it is.
    Source: Srinivas and Fleuret, Full-Gradient Representation for Neural Network Visualization, NeurIPS 2019, arXiv
    1905.00780, eq. 3 and 6 and Definition 1; psi: idiap/fullgrad-saliency, saliency/fullgrad.py.
    """
    features = passage.features
    size = tuple(features.shape[2:])
    columns = [_Sum(size, options) for _ in range(passage.columns)]
    gradients = passage.full_gradients([column.add for column in columns])
    dtype = accumulation_dtype(features.dtype)
    parts = gradients.unbind(1) if passage.targets.several else [gradients]
    for column, part in zip(columns, parts, strict=True):
        column.add(features.to(dtype) * part, True)
    maps, totals = [column.map for column in columns], [column.total for column in columns]
    several = passage.targets.several
    total = torch.stack(totals, dim=1) if several else totals[0]
    delta = total - passage.scores().to(total.dtype)
    return Evidence(projection=torch.stack(maps, dim=1) if several else maps[0], delta=delta)


class _Sum:
    """Map and plain sum of the products of one target; no resized channel is ever kept."""

    def __init__(self, size: tuple[int, ...], options: FullGradOptions):
        self._size = size
        self._options = options
        self.map: Tensor = torch.zeros(())
        self.total: Tensor = torch.zeros(())

    def add(self, product: Tensor, is_map: bool) -> None:
        """product  (B, K, *spatial) where it is a feature map, else (B, n)"""
        self.total = self.total.to(product) + product.flatten(1).sum(1)
        if is_map:
            self.map = self.map.to(product) + _psi(product, self._size, self._options)


def _psi(product: Tensor, size: tuple[int, ...], options: FullGradOptions) -> Tensor:
    """(B, *size); the resize is linear, so it comes after the sum over channels."""
    together = options.postprocess == "authors"
    eps = _EPS[options.postprocess] if options.eps is None else options.eps
    dims = tuple(range(1 if together else 2, product.ndim))
    magnitude = product.abs()
    magnitude = magnitude - magnitude.amin(dims, keepdim=True)
    divisor = magnitude.amax(dims, keepdim=True) + eps
    found = (magnitude / torch.where(divisor == 0, 1, divisor)).sum(1)
    return found if tuple(found.shape[1:]) == size else resized(found, size, align_corners=together)


METHOD = Method(
    "full_grad",
    "input x gradient and every bias x gradient, summed over layers of one scale",
    "arXiv 1905.00780, eq. 3 and 6",
    full_grad,
    needs="biases",
    options=FullGradOptions,
    pixels=True,
)
