"""LFI-CAM."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._method import CamOptions, Evidence, Method, Passage

__all__ = ["METHOD", "lfi_cam"]


def lfi_cam(passage: Passage, options: CamOptions) -> Evidence:
    """The attention map that an LFI-CAM network has learned to make on its way to the scores.

    A = minmax(relu(sum_k s_k F_k)),  s = softmax(FIN(features, image))

    The network predicts the importance s of its last feature maps F itself; no gradient is taken. The map is the same
    for every class, and so for every target asked for. `Attribution.weights` is s.

    Shapes: F (B, K, h, w), s (B, K), A (B, h, w); T targets repeat A along an axis after B.
    Errors: TypeError for a model that is no `fastcam.nn.LFICAM` (or returns no attention and importance as it does).
    Cost: the network's forward pass.
    Source: Lee et al., LFI-CAM, ICCV 2021, arXiv 2105.00937.
    """
    attention, importance = (getattr(passage.output, name, None) for name in ("attention", "importance"))
    if not isinstance(attention, Tensor) or not isinstance(importance, Tensor):
        raise TypeError(
            f"lfi_cam reads the attention of a fastcam.nn.LFICAM; this model returns {type(passage.output).__name__}. "
            "Wrap its backbone: fastcam.nn.LFICAM(backbone, num_classes), and train it"
        )
    found, shown = attention.squeeze(1), importance
    if passage.targets.several:
        found, shown = (x.unsqueeze(1).repeat(1, passage.columns, *(1,) * (x.ndim - 1)) for x in (found, shown))
    return Evidence(projection=found, shown=shown)


def _backbone(program: Any, model: nn.Module, spatial_rank: int) -> str | None:
    return "backbone" if isinstance(getattr(model, "backbone", None), nn.Module) else None


METHOD = Method(
    "lfi_cam",
    "attention map of a network trained with a feature-importance branch (fastcam.nn.LFICAM)",
    "arXiv 2105.00937",
    lfi_cam,
    needs="features",
    start=_backbone,
    explains="images of an LFICAM network",
)
