"""Grad-CAM++."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastcam import ops

from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage, check_epsilon

__all__ = ["METHOD", "GradCamPpOptions", "grad_cam_pp"]


@dataclass(frozen=True)
class GradCamPpOptions(CamOptions):
    """As `CamOptions`, and

    epsilon  None: exact · a number: a = G^2 / (2 G^2 + S G^3 + epsilon), another map where gradients are small;
             pytorch-grad-cam's is 1e-6
    """

    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epsilon(self.epsilon)


def grad_cam_pp(passage: Passage, options: GradCamPpOptions) -> Evidence:
    """Channels weighted by their positive gradients, each position by how alone it is.

    alpha_k = sum_ij a_k[i,j] relu(G_k[i,j]),  G = d y / d A,  S_k = sum_ij A_k[i,j]
    a = G^2 / (2 G^2 + S_k G^3) = 1 / (2 + S_k G) where G != 0;  a = 0 where |2 + S_k G| < 1e-6
    M = relu(sum_k alpha_k A_k)

    The second spelling of a is exact and does not underflow. The score explained is the logit itself (the paper's
    eq. 19 with y instead of exp(y) before the softmax, as all public implementations do).
    Shapes: A and G (B, K, *spatial), alpha (B, K), M (B, *spatial); T targets add an axis after B.
    Cost: as Grad-CAM.
    Source: Chattopadhay et al., Grad-CAM++, WACV 2018, arXiv 1710.11063, eq. 10 and 19.
    """
    features, gradients = (planar(x, passage.spatial_rank) for x in (passage.features, passage.gradients()))
    if options.epsilon is None:
        return Evidence(weights=ops.channel_weights(features, gradients, mode="grad_cam_pp"))
    total = features.sum((-2, -1), keepdim=True)
    total = total.unsqueeze(1) if passage.targets.several else total
    square = gradients.square()
    share = torch.where(square != 0, square / (2 * square + total * square * gradients + options.epsilon), 0)
    return Evidence(weights=(share * gradients.relu()).sum((-2, -1)))


METHOD = Method(
    "grad_cam_pp",
    "channels weighted by positive gradients, lone positions more",
    "arXiv 1710.11063, eq. 10 and 19",
    grad_cam_pp,
    needs="gradients",
    options=GradCamPpOptions,
)
