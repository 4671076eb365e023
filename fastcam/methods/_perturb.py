"""Scores under perturbation, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype
from fastcam.program.targets import Targets, class_scores, scores_of

from ._method import Passage

__all__ = ["Distinct", "check_count", "check_seed", "distinct", "edited_scores", "perturbed_scores"]


@dataclass(frozen=True)
class Distinct:
    """Perturbations worth running, out of B n, an image's together.

    pairs  (m,) numbers b n + i of those to run, ascending
    place  (B n,) where in `pairs` each one's stand-in is
    """

    pairs: Tensor
    place: Tensor


def distinct(alike: Tensor) -> Distinct | None:
    """What is left to run of B x n perturbations where those marked in `alike` (B, n) are the same for their image.

    None where nothing is saved. Costs one synchronisation on accelerators.
    """
    count = alike.shape[1]
    first = alike & (alike.cumsum(1) == 1)
    kept = (~alike | first).flatten()
    pairs = kept.nonzero().squeeze(1)
    if len(pairs) == kept.numel():
        return None
    index = torch.arange(count, device=alike.device)
    own = torch.where(alike, first.to(torch.int64).argmax(1, keepdim=True), index)
    row = torch.arange(len(alike), device=alike.device).unsqueeze(1)
    return Distinct(pairs, (kept.cumsum(0) - 1)[(row * count + own).flatten()])


def edited_scores(passage: Passage, replacement: Tensor | float, chunk: int) -> Tensor:
    """(B, K) or (B, T, K) scores with channel k of the features replaced, through the head alone.

    replacement  a number, or features (1 or B, K, *spatial)
    chunk        edited feature maps in one pass

    A channel that equals its replacement keeps the score of this pass exactly, and all of an image cost one run.
    """
    features = passage.features
    batch, channels = features.shape[:2]
    other = replacement.expand_as(features) if isinstance(replacement, Tensor) else None
    same = (features == replacement).flatten(2).all(-1)
    only = distinct(same)

    def run(start: int, count: int) -> Any:
        at = torch.arange(start, start + count, device=features.device)
        pair = at if only is None else only.pairs[at]
        rows, edited = pair // channels, pair % channels
        changed = features[rows]
        changed[at - start, edited] = replacement if other is None else other[rows, edited]
        return passage.output_with(changed, rows)

    found = perturbed_scores(run, passage.targets, batch, channels, chunk, passage.layer, only)
    same = same.unsqueeze(1) if found.ndim == 3 else same
    return torch.where(same, passage.scores().unsqueeze(-1).to(found.dtype), found)


def perturbed_scores(
    run: Callable[[int, int], Any],
    targets: Targets,
    batch: int,
    count: int,
    chunk: int,
    layer: str,
    only: Distinct | None = None,
) -> Tensor:
    """(B, n) or (B, T, n) scores of n perturbations of each of B images.

    run   (start, size) -> the model's output for perturbations start to start + size of all B n, an image's together;
          with `only`, of those in `only.pairs`
    only  from `distinct`: perturbations to run, and who stands in for the others
    """
    total = batch * count if only is None else len(only.pairs)
    found: list[Any] = []
    for start in range(0, total, chunk):
        size = min(chunk, total - start)
        output = run(start, size)
        if targets.indices is not None:
            output = class_scores(output)
            pairs = (
                torch.arange(start, start + size, device=output.device) if only is None else only.pairs[start:][:size]
            )
            chosen = targets.indices[pairs // count]
            output = output.gather(1, chosen if chosen.ndim == 2 else chosen.unsqueeze(1))
        found.append(output)
    if targets.indices is not None:
        scores = _all(found, only).unflatten(0, (batch, count))  # (B, n, T or 1)
        scores = scores.movedim(2, 1) if targets.several else scores.squeeze(2)
        return scores.to(accumulation_dtype(scores.dtype))
    chunks, (spec, *_) = zip(*(torch.utils._pytree.tree_flatten(one) for one in found), strict=True)
    leaves = [_Leaf(parts, total, only, batch) for parts in zip(*chunks, strict=True)]
    scores = []
    for i in range(count):
        output = torch.utils._pytree.tree_unflatten([leaf.of(i) for leaf in leaves], spec)
        scores.append(scores_of(output, targets, None, batch, layer, differentiable=False))
    return torch.stack(scores, dim=1)


class _Leaf:
    """A part of the model's output, whole batches of it, as a callable target was written for: `of(i)` is that of each
    image's perturbation i. What has no row for each image is the first chunk's."""

    def __init__(self, parts: tuple[Any, ...], total: int, only: Distinct | None, batch: int):
        self._first = parts[0]
        by_row = all(isinstance(part, Tensor) and part.ndim > 0 for part in parts) and sum(map(len, parts)) == total
        self._rows = _all(parts, only).unflatten(0, (batch, -1)) if by_row else None

    def of(self, i: int) -> Any:
        return self._first if self._rows is None else self._rows[:, i]


def _all(chunks: Sequence[Tensor], only: Distinct | None) -> Tensor:
    """The rows of all B n perturbations."""
    rows = torch.cat(list(chunks))
    return rows if only is None else rows[only.place]


def check_seed(value: object) -> None:
    """TypeError unless `value` is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed must be an integer; got {value!r}")


def check_count(name: str, value: object) -> None:
    """TypeError or ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value!r}")
