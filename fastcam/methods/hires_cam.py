"""HiResCAM."""

from __future__ import annotations

from ._method import CamOptions, Evidence, Method, Passage

__all__ = ["METHOD", "hires_cam"]


def hires_cam(passage: Passage, options: CamOptions) -> Evidence:
    """Gradient times activation at every position, summed over channels.

    M = relu(sum_k G_k * A_k),  G = d y / d A

    With one linear layer after the map, sum_ij M (before the ReLU) is the score without its bias.
    Shapes: A and G (B, K, *spatial), M (B, *spatial); T targets add an axis after B.
    Cost: as Grad-CAM.
    Source: Draelos and Carin, HiResCAM, arXiv 2011.08891, eq. 3.
    """
    return Evidence(multipliers=passage.gradients())


METHOD = Method(
    "hires_cam", "gradient x activation at every position", "arXiv 2011.08891, eq. 3", hires_cam, needs="gradients"
)
