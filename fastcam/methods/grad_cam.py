"""Grad-CAM."""

from __future__ import annotations

from fastcam import ops

from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage

__all__ = ["METHOD", "grad_cam"]


def grad_cam(passage: Passage, options: CamOptions) -> Evidence:
    """Channels weighted by their mean gradient.

    alpha_k = mean_ij d y / d A_k[i,j];    M = relu(sum_k alpha_k A_k)

    Shapes: A and its gradient (B, K, *spatial), alpha (B, K), M (B, *spatial); T targets add an axis after B.
    Cost: the forward pass; closed form on pooled linear heads, else one backward pass through the head.
    Source: Selvaraju et al., Grad-CAM, ICCV 2017, arXiv 1610.02391, eq. 1 and 2.
    """
    features, gradients = (planar(x, passage.spatial_rank) for x in (passage.features, passage.gradients()))
    return Evidence(weights=ops.channel_weights(features, gradients, mode="mean"))


METHOD = Method(
    "grad_cam", "channels weighted by their mean gradient", "arXiv 1610.02391, eq. 1-2", grad_cam, needs="gradients"
)
