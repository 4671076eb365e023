"""A-FMI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam import ops
from fastcam._dtypes import accumulation_dtype
from fastcam.program.forward import Needs, Reference

from ._completeness import CheckCompleteness, check_choice, residual
from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage
from ._perturb import check_count, check_seed, edited_scores
from ._references import ReferenceSpec, check_reference, references

__all__ = ["METHOD", "AFmiOptions", "a_fmi"]

VARIANTS = ("mean_multiplier", "contribution_ratio", "contribution", "swap")


@dataclass(frozen=True)
class AFmiOptions(CamOptions):
    """As `CamOptions`, and

    variant       the importance of a map: "mean_multiplier", "contribution_ratio", "contribution", "swap" (see `a_fmi`)
    reference     "black", "white", "mean", "image_mean", "blur", "noise", a tensor of images normalised as the images
                  are (which cannot be checked), or a list of these, over which maps and importances are averaged
    seed          of "noise"
    ratio_eps     "contribution_ratio": a map with |sum dA| up to this fraction of sum |dA| is left out (importance 0)
    chunk         "swap": edited feature maps in one pass through the head
    return_probe  also `extra["probe"]`: |score lost when map k is replaced by the reference's|, (B, K) or (B, T, K)
    mask          None: multipliers m · "target": in their place gradients at the image, by the ReLU masks of the image
                  alone. A diagnosis, no variant: where the head saturates importances vanish, and `delta` is what
                  contributions then lack
    check_completeness  where contributions miss y(x) - y(x') by more than rounding: "warn" · "raise": RuntimeError ·
                  "off" · None: warn on the CPU, off on accelerators, where looking costs a synchronisation. Not looked
                  at where `mask` is "target"
    """

    variant: Literal["mean_multiplier", "contribution_ratio", "contribution", "swap"] = "mean_multiplier"
    reference: ReferenceSpec = "black"
    seed: int = 0
    ratio_eps: float = 1e-6
    chunk: int = 64
    return_probe: bool = False
    mask: Literal["target"] | None = None
    check_completeness: CheckCompleteness = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}; got {self.variant!r}")
        check_reference(self.reference)
        if not 0 <= self.ratio_eps < 1:
            raise ValueError(f"ratio_eps must be in [0, 1); got {self.ratio_eps!r}")
        check_count("chunk", self.chunk)
        check_seed(self.seed)
        if self.mask not in (None, "target"):
            raise ValueError(f"mask must be 'target' or None; got {self.mask!r}")
        check_choice(self.check_completeness)

    def needed(self, usual: Needs) -> Needs:
        return "gradients" if self.mask == "target" else usual


def a_fmi(passage: Passage, options: AFmiOptions) -> Evidence:
    """Feature-map importance: maps compared with those of a reference image, by secants instead of gradients.

    dA_k = A_k(x) - A_k(x');   C_k = sum_ij m_k dA_k;   sum_k C_k = y(x) - y(x');   M = relu(sum_k fmi_k dA_k)

    with m the Rescale multipliers of the score y, one importance a map by `variant`:

        mean_multiplier     fmi_k = mean_ij m_k
        contribution_ratio  fmi_k = C_k / sum_ij dA_k, 0 where that sum cancels
        contribution        fmi_k = C_k
        swap                fmi_k = y(A) - y(A with map k taken from the reference)

    On heads that average and then are linear the first two are one, and so are the last two, which are then the SHAP
    values with the reference as background. The class is that of the explained image, for the reference too.

    Certain from the paper's abstract: a target image is coupled with a reference image; importance is given per feature
    map, to the difference from the reference, which is what keeps it alive where the head saturates. Reconstructed:
    everything else, so no variant is "the" A-FMI. `options["certainty"]` of the result says so.

    `Attribution.weights` is fmi, `delta` is sum_k C_k - (y(x) - y(x')), `extra` holds `contributions` (C), `difference`
    (y(x) - y(x')), `skipped` (maps left out of "contribution_ratio") and, where asked for, `probe`. Several references:
    M, fmi and C are averaged before the ReLU.

    Shapes: A (B, K, *spatial), fmi and C (B, K), M (B, *spatial); T targets add an axis after B.
    Errors: ValueError for a reference of another shape, dtype or device, not finite, or an empty list;
    UnsupportedOpError naming the step of the head that has no Rescale rule; RuntimeError where `check_completeness` is
    "raise" and contributions are not complete.
    Cost: the forward pass, and the trunk once more for each reference: on one image for "black", "white", "mean" and
    "noise", which are kept for the explainer's next calls; then as `lift_cam`. "swap" and the probe: a pass through
    the head for each map, none on affine heads.
    Source: Zhang et al., A-FMI: Learning Attributions from Deep Networks via Feature Map Importance, arXiv 2104.05527,
    abstract.
    """
    slopes = passage.gradients() if options.mask == "target" else None
    found = [_against(passage, options, one, slopes) for one in references(passage, options.reference, options.seed)]
    first = found[0]
    if len(found) == 1:
        return first
    rank = passage.spatial_rank
    maps = []
    for one in found:
        assert one.weights is not None
        assert one.reference is not None
        features, base = planar(passage.features, rank), planar(one.reference, rank)
        raw = ops.cam_map_with_raw(features, one.weights, base, relu=False, normalize=False)[1]
        maps.append(raw.reshape(*raw.shape[:-2], *passage.features.shape[2:]))
    return Evidence(
        projection=_mean(maps),
        shown=_mean([one.weights for one in found]),
        delta=_mean([one.delta for one in found]),
        extra={name: _mean([one.extra[name] for one in found]) for name in first.extra},
    )


def _mean(tensors: list[Any]) -> Tensor:
    """The mean over references; of flags, whether any is set."""
    stacked = torch.stack(tensors)
    return stacked.any(0) if stacked.dtype == torch.bool else stacked.mean(0)


def _against(passage: Passage, options: AFmiOptions, reference: Reference, slopes: Tensor | None) -> Evidence:
    """Evidence from one reference; `slopes` are gradients that stand in for multipliers."""
    multipliers, base = passage.difference(reference) if slopes is None else (slopes, passage.features_of(reference))
    rank = passage.spatial_rank
    features, flat, m = (planar(x, rank) for x in (passage.features, base, multipliers))
    contributions = ops.channel_weights(features, m, flat, mode="sum")
    skipped = torch.zeros_like(contributions, dtype=torch.bool)
    lost = None
    if options.variant == "swap" or options.return_probe:
        lost = contributions if passage.linear else _lost(passage, base, options.chunk)
    if options.variant == "mean_multiplier":
        weights = ops.channel_weights(features, m, mode="mean")
    elif options.variant == "contribution_ratio":
        difference = features.to(accumulation_dtype(features.dtype)) - flat
        total, size = difference.sum((-2, -1)), difference.abs().sum((-2, -1))
        if passage.targets.several:
            total, size = total.unsqueeze(1), size.unsqueeze(1)
        skipped = (total.abs() <= options.ratio_eps * size).expand_as(contributions)
        weights = torch.where(skipped, 0, contributions / torch.where(skipped, 1, total))
    elif options.variant == "contribution":
        weights = contributions
    else:
        assert lost is not None
        weights = lost
    extra = {
        "contributions": contributions,
        "difference": passage.scores() - passage.scores(reference.output),
        "skipped": skipped,
    }
    if options.return_probe:
        assert lost is not None
        extra["probe"] = lost.abs()
    checked = options.check_completeness if slopes is None else "off"
    delta = residual(passage, contributions, reference, checked)
    return Evidence(weights=weights, reference=base, delta=delta, extra=extra)


def _lost(passage: Passage, base: Tensor, chunk: int) -> Tensor:
    """(B, K) or (B, T, K): y(A) - y(A with map k taken from the reference), exactly 0 where the two maps are equal."""
    lost = passage.scores().unsqueeze(-1) - edited_scores(passage, base, chunk)
    same = (passage.features == base).flatten(2).all(-1)
    return torch.where(same.unsqueeze(1) if passage.targets.several else same, 0, lost)


METHOD = Method(
    "a_fmi",
    "difference from a reference image, weighted by feature-map importance (reconstructed from the abstract)",
    "arXiv 2104.05527, abstract",
    a_fmi,
    needs="multipliers",
    options=AFmiOptions,
    certainty="A-FMI-style, reconstructed from the abstract: the formula of the importance is not known",
)
