"""LayerCAM."""

from __future__ import annotations

import torch

from ._maps import positionwise
from ._method import CamOptions, Evidence, Method, Passage

__all__ = ["METHOD", "layer_cam"]


def layer_cam(passage: Passage, options: CamOptions) -> Evidence:
    """Positive gradient times activation at every position, summed over channels; made for shallow layers.

    M = relu(sum_k relu(G_k) * A_k),  G = d y / d A

    Shapes: A and G (B, K, *spatial), M (B, *spatial); T targets add an axis after B.
    Cost: as Grad-CAM, and one pass over the gradients.
    Source: Jiang et al., LayerCAM, IEEE TIP 2021, DOI 10.1109/TIP.2021.3089943, eq. 6 and 7.
    """
    return Evidence(multipliers=positionwise(torch.relu, passage.gradients()))


METHOD = Method(
    "layer_cam",
    "positive gradient x activation at every position",
    "IEEE TIP 2021, DOI 10.1109/TIP.2021.3089943, eq. 6-7",
    layer_cam,
    needs="gradients",
)
