"""Eigen-CAM and EigenGrad-CAM: the features' first principal component."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastcam._dtypes import accumulation_dtype
from fastcam._tracing import tracing

from ._method import CamOptions, Evidence, Method, Passage

__all__ = ["EIGEN_CAM", "EIGEN_GRAD_CAM", "EigenOptions", "eigen_cam", "eigen_grad_cam", "first_component"]
__all__ += ["smoothed"]


@dataclass(frozen=True)
class EigenOptions(CamOptions):
    """As `CamOptions`, and

    center  subtract each channel's mean over positions first
    """

    center: bool = True


def eigen_cam(passage: Passage, options: EigenOptions) -> Evidence:
    """The projection of the features on their first principal component; the same for every class.

    X = the Z x K matrix of A (positions by channels), columns centred;  M = relu(X v_1), v_1 its first right singular
    vector, signed so that |max| >= |min| of X v_1 (on a tie: sum_k v_1[k] >= 0)

    Not unique where the two top singular values are equal. Whether the paper centres is not confirmed; `center=False`
    does not.
    Shapes: A (B, K, *spatial), M (B, *spatial), repeated for T targets an image.
    Cost: the forward pass and one power iteration on a min(Z, K) Gram matrix an image; no gradient.
    Source: Muhammad and Yeasin, Eigen-CAM, IJCNN 2020, arXiv 2008.00299; the sign rule is Seg-Eigen-CAM's.
    """
    found = first_component(passage.features, passage.spatial_rank, options.center)
    if passage.targets.several:
        assert passage.targets.indices is not None
        found = found.unsqueeze(1).expand(-1, passage.targets.indices.shape[1], *found.shape[1:])
    return Evidence(projection=found)


def eigen_grad_cam(passage: Passage, options: EigenOptions) -> Evidence:
    """Eigen-CAM of gradient x activation, which makes it a map of one class.

    X = the Z x K matrix of G * A, G = d y / d A, columns centred;  M = relu(X v_1), signed as in `eigen_cam`

    Shapes: A and G (B, K, *spatial), M (B, *spatial); T targets add an axis after B.
    Cost: as Grad-CAM, and one power iteration on a min(Z, K) Gram matrix a map.
    Source: Gildenblat et al., pytorch-grad-cam, eigen_grad_cam.py (no paper).
    """
    gradients = passage.gradients()
    features = passage.features.unsqueeze(1) if passage.targets.several else passage.features
    return Evidence(projection=first_component(gradients * features, passage.spatial_rank, options.center))


def smoothed(passage: Passage, evidence: Evidence) -> Evidence:
    """Evidence whose map is the first principal component of the weighted maps, instead of their sum."""
    features, rank = passage.features, passage.spatial_rank
    factors = evidence.multipliers
    if factors is None:
        assert evidence.weights is not None
        factors = evidence.weights.reshape(*evidence.weights.shape, *(1,) * rank)
    if evidence.reference is not None:
        features = features - evidence.reference
    product = factors * (features.unsqueeze(1) if passage.targets.several else features)
    shown = evidence.shown if evidence.shown is not None else evidence.weights
    found = first_component(product, rank, True)
    return Evidence(projection=found, shown=shown, delta=evidence.delta, extra=evidence.extra)


def first_component(features: torch.Tensor, spatial_rank: int, center: bool) -> torch.Tensor:
    """(..., K, *spatial) -> (..., *spatial): X v_1 as in `eigen_cam`. NaN where the features are not finite.

    Works on the smaller of the two Gram matrices, in float32 or float64.
    """
    spatial = features.shape[-spatial_rank:]
    x = features.flatten(-spatial_rank).mT.to(accumulation_dtype(features.dtype))  # (..., Z, K)
    finite = x.isfinite().all(-1).all(-1)
    x = torch.where(finite[..., None, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    if center:
        x = x - x.mean(-2, keepdim=True)
    if x.shape[-2] <= x.shape[-1]:
        value, vector = _top_eigenpair(x @ x.mT)
        projection = vector * value.sqrt()
    else:
        _, vector = _top_eigenpair(x.mT @ x)
        projection = (x @ vector.unsqueeze(-1)).squeeze(-1)
    low, high = -projection.amin(-1, keepdim=True), projection.amax(-1, keepdim=True)
    channels = (x.mT @ projection.unsqueeze(-1)).squeeze(-1).sum(-1, keepdim=True)
    flip = (low > high) | ((low == high) & (channels < 0))
    projection = torch.where(flip, -projection, projection)
    projection = torch.where(
        finite.unsqueeze(-1), projection, torch.full((), torch.nan, dtype=x.dtype, device=x.device)
    )
    return projection.unflatten(-1, spatial)


#: Rows of all matrices together up to which LAPACK is quicker: twice at this number, thirty times at 4.
_FEW = 128


def _top_eigenpair(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest eigenvalue (..., 1) and its unit eigenvector (..., n) of positive semi-definite matrices (..., n, n).

    Of a few small ones on the CPU LAPACK's. Else 65536 steps of power iteration, most of them by squaring the matrix:
    products only, so that a batch runs like one matrix and nothing waits on LAPACK's serial sweeps. Directions whose
    eigenvalue is below 0.9997 of the largest are gone to 1e-7; closer ones are as good as equal in float32. A zero
    matrix has the value zero.
    """
    few = gram.device.type == "cpu" and not tracing() and math.prod(gram.shape[:-1]) <= _FEW
    if few and math.isfinite(gram.diagonal(dim1=-2, dim2=-1).sum()):
        values, vectors = torch.linalg.eigh(gram)
        return values[..., -1:].clamp_min(0), vectors[..., -1]
    squarings = 16 if gram.shape[-1] <= 256 else 8
    tiny = torch.finfo(gram.dtype).tiny
    power = gram
    for _ in range(squarings):
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(tiny)
        power = power @ power
    # The column of the largest diagonal entry cannot be orthogonal to the top eigenvector.
    start = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*gram.shape[:-1], 1)
    vector = power.gather(-1, start)
    for _ in range(65536 >> squarings):
        vector = power @ (vector / vector.norm(dim=-2, keepdim=True).clamp_min(tiny))
    vector = vector / vector.norm(dim=-2, keepdim=True).clamp_min(tiny)
    value = (vector.mT @ (gram @ vector)).squeeze(-1).clamp_min(0)
    return value, vector.squeeze(-1)


EIGEN_CAM = Method(
    "eigen_cam",
    "first principal component of the features, the same for every class",
    "arXiv 2008.00299",
    eigen_cam,
    needs="features",
    options=EigenOptions,
)
EIGEN_GRAD_CAM = Method(
    "eigen_grad_cam",
    "first principal component of gradient x activation",
    "pytorch-grad-cam, eigen_grad_cam.py",
    eigen_grad_cam,
    needs="gradients",
    options=EigenOptions,
)
