"""Scores while pixels are inserted or deleted in the order of a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcam import ops
from fastcam.methods._perturb import check_count
from fastcam.program.targets import TargetSpec

from ._trial import Output, Trial, baseline_images, check_fractions, pixels_of, ranks_of, trial

__all__ = [
    "Curve",
    "deletion_auc",
    "insertion_auc",
    "insertion_deletion",
    "most_relevant_first",
    "radial_canvas",
]


_TWENTIETHS = tuple(n / 20 for n in range(1, 21))


@dataclass(frozen=True, eq=False)
class Curve:
    """Scores against the share of pixels inserted or deleted.

    fractions  (S,) float64, ascending
    scores     (B, S) or (B, T, S) float64; NaN where map, image, score or target was unusable
    """

    fractions: Tensor
    scores: Tensor

    @property
    def auc(self) -> Tensor:
        """(B,) or (B, T): the area under each curve, by trapezoids over the fractions."""
        return torch.trapezoid(self.scores, self.fractions, dim=-1)


def insertion_deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    steps: int = 50,
    baseline: str | Tensor = "mean",
    output: Output = "probability",
    chunk: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> tuple[Curve, Curve]:
    """Insertion and deletion curves of each image; the two ends, which they share, are run once.

        score(n) = score of the image whose n highest pixels are the image's and all others the baseline's (insertion),
        or the other way round (deletion);  n = 0, q, 2 q, ... and P, where q = ceil(P / steps), P pixels

    images    (B, C, *spatial) as the model expects them
    maps      (B, *spatial) or (B, T, *spatial); only the order of their values counts, of equal ones the first in row
              order comes first. Other sizes are resized bilinearly
    targets   as of `fastcam.attribute`; (B, T) for maps of T targets
    steps     intervals of the curve, at most
    baseline  what deleted pixels become: "black", "white", "mean" (0 after normalisation), "image_mean", "blur",
              "noise", or a tensor (1 or B, C, *spatial)
    output    "probability": softmax · "sigmoid": each class's own · "logit": the output as it is, and for targets that
              are callables
    chunk     perturbed inputs in a forward pass
    mean, std  how the images were normalised, for baselines named in pixels; None: ImageNet's, for three channels
    seed      of "noise"

    Returns two `Curve`s, insertion first. Higher insertion and lower deletion areas are better.
    Raises TypeError or ValueError for arguments that do not fit, IndexError for a class that does not exist.
    Cost: 2 steps forward passes an image and target, the perturbed images by `ops.perturb_by_rank`. No host
    synchronisation on accelerators but those that buffers of the model cost.
    Source: Petsiuk et al. 2018 (RISE), whose insertion starts from "blur" and whose deletion ends at "mean".
    """
    check_count("steps", steps)
    with trial(model, images, maps, targets, output, chunk) as case:
        base = _rows(baseline_images(baseline, images, mean, std, seed), case)
        counts = _counts(case, steps)
        inner, nothing = counts[1:-1], case.one(base.expand_as(case.images))
        kept = _levels(case, base, inner, True, case.level)
        gone = _levels(case, base, inner, False, case.level)
        fractions = counts.double() / counts[-1]
        first, last = nothing.unsqueeze(1), case.levels.unsqueeze(1)
        insertion = torch.cat([first, kept, last], 1)
        deletion = torch.cat([last, gone, first], 1)
        return tuple(Curve(fractions, case.shaped(case.scores(found))) for found in (insertion, deletion))  # type: ignore[return-value]


def insertion_auc(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    steps: int = 50,
    baseline: str | Tensor = "mean",
    output: Output = "probability",
    chunk: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Tensor:
    """(B,) or (B, T): area under the insertion curve, in [0, 1] for probabilities. Higher is better.

    Arguments and errors are those of `insertion_deletion`, which gives the curves too. Cost: steps + 1 forward passes.
    """
    settings = {"output": output, "chunk": chunk, "mean": mean, "std": std, "seed": seed}
    return _curve(model, images, maps, targets, steps, baseline, True, settings).auc


def deletion_auc(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    steps: int = 50,
    baseline: str | Tensor = "mean",
    output: Output = "probability",
    chunk: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Tensor:
    """(B,) or (B, T): area under the deletion curve, in [0, 1] for probabilities. Lower is better.

    Arguments and errors are those of `insertion_deletion`, which gives the curves too. Cost: steps + 1 forward passes.
    """
    settings = {"output": output, "chunk": chunk, "mean": mean, "std": std, "seed": seed}
    return _curve(model, images, maps, targets, steps, baseline, False, settings).auc


def most_relevant_first(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec = None,
    *,
    fractions: Sequence[float] = _TWENTIETHS,
    baseline: str | Tensor = "radial",
    output: Output = "probability",
    chunk: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Curve:
    """Whether the model says the target once the highest pixels lie on a canvas: accuracy against inserted share.

        score(f) = 1 where the target is the model's highest class ("sigmoid": its probability above one half) on a
        canvas that holds the floor(f P) highest of the image's P pixels, else 0

    fractions  of the pixels, ascending within [0, 1]
    baseline   the canvas: "radial", the grey of `radial_canvas` (two dimensions only), or as of `insertion_deletion`

    Returns a `Curve` whose mean over images is an accuracy; higher is better. Other arguments and errors are those of
    `insertion_deletion`, but targets must be class indices. Cost: one forward pass for each fraction, and one.
    Source: Attribution Equilibrium's released example; what its paper scores is reconstructed.
    """
    shares = check_fractions(fractions)
    with trial(model, images, maps, targets, output, chunk) as case:
        canvas = (
            radial_canvas(images, mean=mean, std=std)
            if isinstance(baseline, str) and baseline == "radial"
            else baseline_images(baseline, images, mean, std, seed)
        )
        pixels = math.prod(images.shape[2:])
        # A rounding error must not cost the pixel of a whole number, as in 0.15 * 100.
        counts = torch.tensor([math.floor(share * pixels + 1e-9) for share in shares], device=images.device)
        hits = _levels(case, _rows(canvas, case), counts, True, case.recognised)
        return Curve(torch.tensor(shares, dtype=torch.float64, device=images.device), case.shaped(hits))


def radial_canvas(images: Tensor, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """(1, C, H, W): grey that falls linearly with the distance from the centre, 224/255 there to 15/255 in the corners,
    normalised as the images (B, C, H, W) are. Raises ValueError for images of another rank."""
    if images.ndim != 4:
        raise ValueError(f"the radial canvas is for images (B, C, H, W); got shape {tuple(images.shape)}")
    y, x = (torch.linspace(-1, 1, size, dtype=torch.float64, device=images.device) for size in images.shape[2:])
    far = ((y.unsqueeze(1) ** 2 + x**2) / 2).sqrt()
    grey = (224 - 209 * far) / 255
    grey = grey.to(images.dtype).expand(1, images.shape[1], -1, -1)
    return pixels_of(mean, std).normalize(grey, images).contiguous()


def _curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetSpec,
    steps: int,
    baseline: str | Tensor,
    keep: bool,
    settings: dict[str, Any],
) -> Curve:
    check_count("steps", steps)
    with trial(model, images, maps, targets, settings["output"], settings["chunk"]) as case:
        base = _rows(baseline_images(baseline, images, settings["mean"], settings["std"], settings["seed"]), case)
        counts = _counts(case, steps)
        own = case.levels.unsqueeze(1)  # of the image itself: deletion's first and insertion's last
        if keep:
            found = torch.cat([_levels(case, base, counts[:-1], True, case.level), own], 1)
        else:
            found = torch.cat([own, _levels(case, base, counts[1:], False, case.level)], 1)
        return Curve(counts.double() / counts[-1], case.shaped(case.scores(found)))


def _counts(case: Trial, steps: int) -> Tensor:
    pixels = math.prod(case.images.shape[2:])
    step = math.ceil(pixels / steps)
    return torch.tensor([*range(0, pixels, step), pixels], device=case.images.device)


def _rows(baseline: Tensor, case: Trial) -> Tensor:
    """One for each row where there is one for each image."""
    return baseline if len(baseline) == 1 else baseline.repeat_interleave(len(case.images) // len(baseline), 0)


def _levels(case: Trial, baseline: Tensor, counts: Tensor, keep: bool, read: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """(N, S) readings at each of `counts` (S,). The op takes two dimensions; ranks do not care how pixels lie."""
    shape = case.images.shape
    plane = shape[2], math.prod(shape[3:])
    images, base = (each.reshape(*each.shape[:2], *plane) for each in (case.images, baseline))
    ranks = ranks_of(case.maps).reshape(-1, *plane)

    def perturb(rows: slice, steps: slice) -> Tensor:
        own = base if len(base) == 1 else base[rows]
        found = ops.perturb_by_rank(images[rows], own, ranks[rows], counts[steps], keep=keep)
        return found.reshape(*found.shape[:2], *shape[1:])

    return case.sweep(len(counts), perturb, read)
