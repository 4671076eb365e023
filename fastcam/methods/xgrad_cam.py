"""XGrad-CAM."""

from __future__ import annotations

from dataclasses import dataclass

from fastcam import ops

from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage, check_epsilon

__all__ = ["METHOD", "XGradCamOptions", "xgrad_cam"]


@dataclass(frozen=True)
class XGradCamOptions(CamOptions):
    """As `CamOptions`, and

    epsilon  None: exact, with its guard · a number added to S_k instead: pytorch-grad-cam's is 1e-7, TorchCAM's 1e-8
    """

    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epsilon(self.epsilon)


def xgrad_cam(passage: Passage, options: XGradCamOptions) -> Evidence:
    """Channels weighted by their activation-weighted mean gradient, so that the maps sum to gradient x activation.

    alpha_k = sum_ij G_k[i,j] A_k[i,j] / S_k,  S_k = sum_ij A_k[i,j];  alpha_k = 0 where |S_k| <= 1e-6 sum_ij |A_k[i,j]|
    M = relu(sum_k alpha_k A_k)

    Conservation: sum_k alpha_k S_k = sum G * A. On global average pooling + linear it equals Grad-CAM.
    Shapes: A and G = d y / d A (B, K, *spatial), alpha (B, K), M (B, *spatial); T targets add an axis after B.
    Cost: as Grad-CAM.
    Source: Fu et al., Axiom-based Grad-CAM, BMVC 2020, arXiv 2008.02312, eq. 8.
    """
    features, gradients = (planar(x, passage.spatial_rank) for x in (passage.features, passage.gradients()))
    if options.epsilon is None:
        return Evidence(weights=ops.channel_weights(features, gradients, mode="xgrad"))
    product = ops.channel_weights(features, gradients, mode="sum")
    total = features.sum((-2, -1), dtype=product.dtype) + options.epsilon
    return Evidence(weights=product / (total.unsqueeze(1) if passage.targets.several else total))


METHOD = Method(
    "xgrad_cam",
    "channels weighted by gradient x activation over activation",
    "arXiv 2008.02312, eq. 8",
    xgrad_cam,
    needs="gradients",
    options=XGradCamOptions,
)
