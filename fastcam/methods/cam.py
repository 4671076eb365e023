"""CAM."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._method import CamOptions, Evidence, Method, Passage

__all__ = ["METHOD", "ClassActivationOptions", "cam"]


@dataclass(frozen=True)
class ClassActivationOptions(CamOptions):
    """As `CamOptions`, but `relu` is off: the original CAM keeps negative evidence before min-max scaling."""

    relu: bool = False


def cam(passage: Passage, options: ClassActivationOptions) -> Evidence:
    """Channels weighted by the classifier's own weights.

    M = sum_k W[c,k] A_k,  for a head y = W mean_ij(A) + b; no ReLU by default

    On any head that is affine in the features with the same gradient at all positions, W[c,k] stands for
    Z d y / d A_k (Z positions), the same number for pooling + linear.
    Shapes: A (B, K, *spatial), W[c] (B, K), M (B, *spatial); T targets add an axis after B.
    Errors: ValueError where the head is not of this form.
    Cost: the forward pass, no gradient.
    Source: Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016, arXiv 1512.04150, eq. 2.
    """
    if not passage.uniform:
        raise ValueError(
            f"cam needs a head that averages layer '{passage.layer}' over positions and is linear from there to the "
            "scores, in a model that can be captured; use method='grad_cam', which needs neither"
        )
    gradients = passage.gradients()
    spatial = passage.features.shape[2:]
    return Evidence(weights=gradients.flatten(-len(spatial))[..., 0] * math.prod(spatial))


METHOD = Method(
    "cam",
    "channels weighted by the linear classifier (global pooling heads)",
    "arXiv 1512.04150, eq. 2",
    cam,
    needs="gradients",
    options=ClassActivationOptions,
)
