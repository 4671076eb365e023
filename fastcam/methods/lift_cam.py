"""LIFT-CAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastcam import ops
from fastcam.program.forward import Needs

from ._completeness import CheckCompleteness, check_choice, residual
from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage

__all__ = ["METHOD", "LiftCamOptions", "lift_cam"]


@dataclass(frozen=True)
class LiftCamOptions(CamOptions):
    """As `CamOptions`, and

    rule                "rescale", as published, or "reveal_cancel" (see `lift_cam`)
    check_completeness  where coefficients miss y(A) - y(0) by more than rounding: "warn" · "raise": RuntimeError ·
                        "off" · None: warn on the CPU, off on accelerators, where looking costs a synchronisation
    """

    rule: Literal["rescale", "reveal_cancel"] = "rescale"
    check_completeness: CheckCompleteness = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("rescale", "reveal_cancel"):
            raise ValueError(f"rule must be 'rescale' or 'reveal_cancel'; got {self.rule!r}")
        check_choice(self.check_completeness)

    def needed(self, usual: Needs) -> Needs:
        return "parts" if self.rule == "reveal_cancel" else usual


def lift_cam(passage: Passage, options: LiftCamOptions) -> Evidence:
    """Channels weighted by their DeepLIFT contribution to the score: from "this map is zero" to "as observed".

    alpha_k = sum_ij m_k[i,j] A_k[i,j];    M = relu(sum_k alpha_k A_k)

    with m the DeepLIFT multipliers of the score y between features 0 and A: by the Rescale rule, or by RevealCancel
    (`rule`, described at `deep_lift`), which sees maps that cancel at a unit. Which of the two is nearer to SHAP values
    depends on the head: docs/faithfulness.md has figures. The coefficients are signed, plain sums that add up to the
    score, sum_k alpha_k = y(A) - y(0), and estimate the SHAP values of the game "which maps are present"; on heads that
    are linear in the features they are the SHAP values. `Attribution.delta` is what the sum lacks by rounding. The
    score explained is the model's output: let it be a logit, not a probability.

    Shapes: A and m (B, K, *spatial), alpha (B, K), M (B, *spatial); T targets add an axis after B.
    Errors: UnsupportedOpError naming the step of the head that has no rule, and how to give it one;
    RuntimeError where `check_completeness` is "raise" and the sum is not complete.
    Cost: the forward pass; closed form where the head is affine. Else one zero feature map goes through the head, and
    one walk back through it follows for each target. "reveal_cancel": about six passes of the head more, and four times
    the walk back.
    Source: Jung and Oh, Towards Better Explanations of Class Activation Mapping, ICCV 2021, arXiv 2102.05228, sec. 3.3;
    multipliers: Shrikumar et al., arXiv 1704.02685, sec. 3.5; RevealCancel in the place of Rescale is ours.
    """
    reference = passage.reference()
    multipliers, _ = passage.difference(reference)
    features = planar(passage.features, passage.spatial_rank)
    weights = ops.channel_weights(features, planar(multipliers, passage.spatial_rank), mode="sum")
    return Evidence(weights=weights, delta=residual(passage, weights, reference, options.check_completeness))


METHOD = Method(
    "lift_cam",
    "channels weighted by their DeepLIFT contribution, an estimate of their SHAP value",
    "arXiv 2102.05228, sec. 3.3",
    lift_cam,
    needs="multipliers",
    options=LiftCamOptions,
)
