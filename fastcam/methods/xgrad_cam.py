"""XGrad-CAM."""

from __future__ import annotations

from fastcam import ops

from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage

__all__ = ["METHOD", "xgrad_cam"]


def xgrad_cam(passage: Passage, options: CamOptions) -> Evidence:
    """Channels weighted by their activation-weighted mean gradient, so that the maps sum to gradient x activation.

    alpha_k = sum_ij G_k[i,j] A_k[i,j] / S_k,  S_k = sum_ij A_k[i,j];  alpha_k = 0 where |S_k| <= 1e-6 sum_ij |A_k[i,j]|
    M = relu(sum_k alpha_k A_k)

    Conservation: sum_k alpha_k S_k = sum G * A. On global average pooling + linear it equals Grad-CAM.
    Shapes: A and G = d y / d A (B, K, *spatial), alpha (B, K), M (B, *spatial); T targets add an axis after B.
    Cost: as Grad-CAM.
    Source: Fu et al., Axiom-based Grad-CAM, BMVC 2020, arXiv 2008.02312, eq. 8.
    """
    features, gradients = (planar(x, passage.spatial_rank) for x in (passage.features, passage.gradients()))
    return Evidence(weights=ops.channel_weights(features, gradients, mode="xgrad"))


METHOD = Method(
    "xgrad_cam",
    "channels weighted by gradient x activation over activation",
    "arXiv 2008.02312, eq. 8",
    xgrad_cam,
    needs="gradients",
)
