"""DeepLIFT at the input pixels or at a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastcam import ops

from ._maps import planar
from ._method import Evidence, Method, MethodOptions, Passage
from ._references import ReferenceSpec, check_reference, references

__all__ = ["METHOD", "DeepLiftOptions", "deep_lift"]


@dataclass(frozen=True)
class DeepLiftOptions(MethodOptions):
    """As `MethodOptions`, and

    reference             "black", "white", "mean", "image_mean", "blur", "noise", a tensor of images normalised as the
                          explained ones are (which cannot be checked), or a list of these, to be averaged over
    seed                  of "noise"
    return_contributions  also `extra["contributions"]`: the map before its sum over channels, (B, C, *spatial)
    """

    reference: ReferenceSpec = "black"
    seed: int = 0
    return_contributions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reference(self.reference)


def deep_lift(passage: Passage, options: DeepLiftOptions) -> Evidence:
    """Contributions of pixels, or of a layer's features, to the difference of the score from a reference image's.

    R = sum_c m_c (x_c - x'_c);    sum over positions of R = y(x) - y(x')

    with m the Rescale multipliers of the score y. ReLU as a function, in place or re-used, overlapping max pools, skip
    connections, concatenation, products of activations, softmax and norms all keep the sum exact; `Attribution.delta`
    is what it lacks by rounding. The map is signed; normalised, it is divided by its largest magnitude.

    Shapes: x (B, C, *spatial) the images, or the features of `layer`; R (B, *spatial); T targets add an axis after B.
    Several references: their maps are averaged.
    Errors: ValueError for a reference of another shape, dtype or device, not finite, or an empty list;
    UnsupportedOpError naming the step that has no rule, and how to give it one.
    Cost: the forward pass and a pass back of about the same cost for each target; for each reference a forward pass, on
    one image for "black", "white", "mean" and "noise", which are kept for the explainer's next calls.
    Source: Shrikumar et al., Learning Important Features Through Propagating Activation Differences, ICML 2017, arXiv
    1704.02685, sec. 3.5.1.
    """
    found = references(passage, options.reference, options.seed)
    maps, deltas, parts = [], [], []
    for reference in found:
        multipliers, base = passage.difference(reference)
        rank = passage.spatial_rank
        features, flat, m = (planar(x, rank) for x in (passage.features, base, multipliers))
        raw = ops.cam_map_with_raw(features, m, flat, relu=False, normalize=False)[1]
        maps.append(raw.reshape(*raw.shape[:-2], *passage.features.shape[2:]))
        deltas.append(passage.residual(raw.sum((-2, -1)), reference))
        if options.return_contributions:
            gap = passage.features - base
            parts.append(multipliers * (gap.unsqueeze(1) if passage.targets.several else gap))
    extra = {"contributions": torch.stack(parts).mean(0)} if parts else {}
    return Evidence(projection=torch.stack(maps).mean(0), delta=torch.stack(deltas).mean(0), extra=extra)


METHOD = Method(
    "deep_lift",
    "signed contributions of pixels (or a layer's features) to the difference from a reference image's score",
    "arXiv 1704.02685, sec. 3.5.1",
    deep_lift,
    needs="multipliers",
    options=DeepLiftOptions,
    pixels=True,
    signed=True,
)
