"""DeepLIFT at the input pixels or at a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fastcam import ops
from fastcam.program.forward import Needs

from ._completeness import CheckCompleteness, check_choice, residual
from ._maps import planar
from ._method import Evidence, Method, MethodOptions, Passage
from ._references import ReferenceSpec, check_reference, references

__all__ = ["METHOD", "DeepLiftOptions", "deep_lift"]


@dataclass(frozen=True)
class DeepLiftOptions(MethodOptions):
    """As `MethodOptions`, and

    rule                  "rescale" or "reveal_cancel" (see `deep_lift`)
    reference             "black", "white", "mean", "image_mean", "blur", "noise", a tensor of images normalised as the
                          explained ones are (which cannot be checked), or a list of these, to be averaged over
    seed                  of "noise"
    return_contributions  also `extra["contributions"]`: the map before its sum over channels, (B, C, *spatial)
    return_multipliers    also `extra["multipliers"]`: m, of the same shape
    check_completeness    where contributions miss y(x) - y(x') by more than rounding: "warn" · "raise": RuntimeError ·
                          "off" · None: warn on the CPU, off on accelerators, where looking costs a synchronisation
    """

    rule: Literal["rescale", "reveal_cancel"] = "rescale"
    reference: ReferenceSpec = "black"
    seed: int = 0
    return_contributions: bool = False
    return_multipliers: bool = False
    check_completeness: CheckCompleteness = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("rescale", "reveal_cancel"):
            raise ValueError(f"rule must be 'rescale' or 'reveal_cancel'; got {self.rule!r}")
        check_reference(self.reference)
        check_choice(self.check_completeness)

    def needed(self, usual: Needs) -> Needs:
        return "parts" if self.rule == "reveal_cancel" else usual


def deep_lift(passage: Passage, options: DeepLiftOptions) -> Evidence:
    """Contributions of pixels, or of a layer's features, to the difference of the score from a reference image's.

    R = sum_c m_c (x_c - x'_c);    sum over positions of R = y(x) - y(x')

    with m the multipliers of the score y by one of two rules:

    "rescale"        v = f(u) has m = (v - v') / (u - u'). ReLU as a function, in place or re-used, overlapping max
                     pools, skip connections, concatenation, products of activations, softmax and norms all keep the sum
                     exact
    "reveal_cancel"  differences d = p + n are two parts with a multiplier each, so that inputs that cancel are seen:
                         v+ = [f(u'+p) - f(u') + f(u'+p+n) - f(u'+n)] / 2 = m+ p,   v- likewise with p, n exchanged
                     Convolutions, linear layers and matrix products take each input's whole difference d, and send
                     w d > 0 to the positive part of their result, w d < 0 to the negative one; what follows gives d the
                     multiplier of the part it went to, and where d = 0 the mean of both. Batch norms and other
                     scalings, sums, average pools and whatever moves values keep the parts. A max pool takes the whole
                     difference by the window rule of Rescale. Products of activations, softmax and norms have no rule.
                     The sum is exact here too; where the network is affine the rules are one

    `Attribution.delta` is what the sum lacks by rounding. The map is signed; normalised, it is divided by its largest
    magnitude. Swapping image and reference turns every contribution's sign, by either rule.

    Shapes: x (B, C, *spatial) the images, or the features of `layer`; R (B, *spatial); T targets add an axis after B.
    Several references: their maps are averaged.
    Errors: ValueError for a reference of another shape, dtype or device, not finite, or an empty list;
    UnsupportedOpError naming the step that has no rule, and how to give it one; RuntimeError where `check_completeness`
    is "raise" and the sum is not complete.
    Cost: the forward pass and a pass back of about the same cost for each target; for each reference a forward pass, on
    one image for "black", "white", "mean" and "noise", which are kept for the explainer's next calls. "reveal_cancel":
    for each reference about six forward passes' work more, and four instead of one for each pass back.
    Source: Shrikumar et al., Learning Important Features Through Propagating Activation Differences, ICML 2017, arXiv
    1704.02685, sec. 3.5.1 (linear steps), 3.5.2 (Rescale) and 3.5.3 (RevealCancel); that batch norms keep the parts:
    kundajelab/deeplift, deeplift/layers/normalization.py.
    """
    found = references(passage, options.reference, options.seed)
    maps, deltas, parts, factors = [], [], [], []
    for reference in found:
        multipliers, base = passage.difference(reference)
        rank = passage.spatial_rank
        features, flat, m = (planar(x, rank) for x in (passage.features, base, multipliers))
        raw = ops.cam_map_with_raw(features, m, flat, relu=False, normalize=False)[1]
        maps.append(raw.reshape(*raw.shape[:-2], *passage.features.shape[2:]))
        deltas.append(residual(passage, raw.flatten(-2), reference, options.check_completeness))
        if options.return_contributions:
            gap = passage.features - base
            parts.append(multipliers * (gap.unsqueeze(1) if passage.targets.several else gap))
        if options.return_multipliers:
            factors.append(multipliers)
    named = {"contributions": parts, "multipliers": factors}
    extra = {name: torch.stack(many).mean(0) for name, many in named.items() if many}
    return Evidence(projection=torch.stack(maps).mean(0), delta=torch.stack(deltas).mean(0), extra=extra)


METHOD = Method(
    "deep_lift",
    "signed contributions of pixels (or a layer's features) to the difference from a reference image's score",
    "arXiv 1704.02685, sec. 3.5",
    deep_lift,
    needs="multipliers",
    options=DeepLiftOptions,
    pixels=True,
    signed=True,
)
