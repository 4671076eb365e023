"""Scores under perturbation, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype
from fastcam.program.targets import Targets, scores_of

from ._method import Passage

__all__ = ["edited_scores", "perturbed_scores"]


def edited_scores(passage: Passage, replacement: Tensor | float, chunk: int) -> Tensor:
    """(B, K) or (B, T, K) scores with channel k of the features replaced, through the head alone.

    replacement  a number, or features (1 or B, K, *spatial)
    chunk        edited feature maps in one pass
    """
    features = passage.features
    batch, channels = features.shape[:2]
    other = replacement.expand_as(features) if isinstance(replacement, Tensor) else None

    def run(start: int, count: int) -> Any:
        pair = torch.arange(start, start + count, device=features.device)
        rows, edited = pair // channels, pair % channels
        changed = features[rows]
        at = torch.arange(count, device=features.device)
        changed[at, edited] = replacement if other is None else other[rows, edited]
        return passage.output_with(changed, rows)

    return perturbed_scores(run, passage.targets, batch, channels, chunk, passage.layer)


def perturbed_scores(
    run: Callable[[int, int], Any], targets: Targets, batch: int, count: int, chunk: int, layer: str
) -> Tensor:
    """(B, n) or (B, T, n) scores of n perturbations of each of B images.

    run  (start, size) -> the model's output for perturbations start to start + size of all B n, an image's together
    """
    total = batch * count
    found: list[Any] = []
    for start in range(0, total, chunk):
        size = min(chunk, total - start)
        output = run(start, size)
        if targets.indices is not None:
            rows = torch.arange(start, start + size, device=output.device) // count
            chosen = targets.indices[rows]
            output = output.gather(1, chosen if chosen.ndim == 2 else chosen.unsqueeze(1))
        found.append(output)
    if targets.indices is not None:
        scores = torch.cat(found).unflatten(0, (batch, count))  # (B, n, T or 1)
        scores = scores.movedim(2, 1) if targets.several else scores.squeeze(2)
        return scores.to(accumulation_dtype(scores.dtype))
    leaves = [torch.utils._pytree.tree_flatten(one) for one in found]
    spec = leaves[0][1]
    # A callable sees whole batches, as it was written for them: perturbation by perturbation.
    whole = [torch.cat(parts).unflatten(0, (batch, count)) for parts in zip(*(one[0] for one in leaves), strict=True)]
    scores = []
    for i in range(count):
        output = torch.utils._pytree.tree_unflatten([leaf[:, i] for leaf in whole], spec)
        scores.append(scores_of(output, targets, None, batch, layer, differentiable=False))
    return torch.stack(scores, dim=1)
