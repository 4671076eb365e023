"""What the model's confidence does when only what a map shows is left, or exactly that is taken away."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastcam.program.targets import TargetSpec

from ._trial import Output, Trial, trial

__all__ = ["Confidence", "average_drop", "average_drop_in_deletion", "confidence", "increase_in_confidence"]


@dataclass(frozen=True, eq=False)
class Confidence:
    """(B,) or (B, T) float64 each; NaN where map, image, score or target was unusable.

    drop           max(0, Y - O) / Y, in [0, 1] for probabilities; lower is better
    increase       1 where O > Y, else 0; higher is better
    deletion_drop  (Y - D) / Y, at most 1; higher is better
    score          Y, of the image x
    kept           O, of x s, s the map
    deleted        D, of x (1 - s)
    """

    drop: Tensor
    increase: Tensor
    deletion_drop: Tensor
    score: Tensor
    kept: Tensor
    deleted: Tensor


def confidence(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    output: Output = "probability",
    chunk: int = 32,
) -> Confidence:
    """Average drop, increase in confidence and average drop in deletion of each image, from the same three passes.

        Y = score of x,  O = score of x s,  D = score of x (1 - s);  s = map, its negative values taken as 0

    images   (B, C, *spatial) as the model expects them; multiplying normalised images fills with the mean colour
    maps     (B, *spatial) or (B, T, *spatial) at most 1, as `fastcam.attribute` gives them; other sizes are resized
    targets  as of `fastcam.attribute`; (B, T) for maps of T targets
    output   "probability": softmax · "sigmoid": each class's own · "logit": the output as it is, and for targets that
             are callables
    chunk    inputs in a forward pass

    Returns `Confidence`. Probabilities are compared by their float64 logarithms, so none underflows. A logit Y that is
    not positive has no relative drop: NaN.
    Raises TypeError or ValueError for arguments that do not fit, or on the CPU for maps above 1 (NaN elsewhere, where
    the check would cost a synchronisation), IndexError for a class that does not exist.
    Cost: three forward passes an image and target (one of them shared by an image's targets). No host synchronisation
    on accelerators but those that buffers of the model cost.
    Source: Chattopadhay et al. 2018 (drop, increase); Jung & Oh 2021 (drop in deletion).
    """
    with trial(model, images, maps, targets, output, chunk) as case:
        shown = _shown(case)
        kept = case.one(case.images * shown)
        deleted = case.one(case.images * (1 - shown))
        return Confidence(
            drop=case.shaped(case.relative(kept).clamp(min=0)),
            increase=case.shaped((kept > case.levels).double()),
            deletion_drop=case.shaped(case.relative(deleted)),
            score=case.shaped(case.scores(case.levels)),
            kept=case.shaped(case.scores(kept)),
            deleted=case.shaped(case.scores(deleted)),
        )


def average_drop(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    output: Output = "probability",
    chunk: int = 32,
) -> Tensor:
    """(B,) or (B, T): max(0, Y - O) / Y, the share of the score that is lost when the image is multiplied by its map.

    Lower is better. Arguments, errors and source: `confidence`. Cost: two forward passes.
    """
    with trial(model, images, maps, targets, output, chunk) as case:
        return case.shaped(case.relative(case.one(case.images * _shown(case))).clamp(min=0))


def increase_in_confidence(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    output: Output = "probability",
    chunk: int = 32,
) -> Tensor:
    """(B,) or (B, T): 1 where the image multiplied by its map has a higher score than the image, else 0.

    Higher is better. Arguments, errors and source: `confidence`. Cost: two forward passes.
    """
    with trial(model, images, maps, targets, output, chunk) as case:
        return case.shaped((case.one(case.images * _shown(case)) > case.levels).double())


def average_drop_in_deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    output: Output = "probability",
    chunk: int = 32,
) -> Tensor:
    """(B,) or (B, T): (Y - D) / Y, the share of the score that is lost when what the map shows is taken away.

    Higher is better; negative where the score rises. Arguments, errors and source: `confidence`. Cost: two forward
    passes.
    """
    with trial(model, images, maps, targets, output, chunk) as case:
        return case.shaped(case.relative(case.one(case.images * (1 - _shown(case)))))


def _shown(case: Trial) -> Tensor:
    """(N, 1, *spatial) in [0, 1], in the images' dtype."""
    highest = case.maps.flatten(1).amax(1)
    fits = ~(highest > 1 + 1e-4)  # NaN is another matter
    if highest.device.type == "cpu":
        if not bool(fits.all()):
            raise ValueError(
                f"maps to be multiplied with images must be at most 1; got {float(highest[~fits][0]):.4g}: "
                "pass maps of normalize=True, or divide them by their maximum"
            )
    else:
        case.valid = case.valid & fits
    return case.maps.clamp(0, 1).unsqueeze(1).to(case.images.dtype)
