"""Which scores to explain: everything a user may pass as `targets`, made into indices or a callable, and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from fastcam._tracing import tracing

__all__ = ["TargetSpec", "Targets", "check_count", "class_scores", "resolve_targets", "scores_of"]

TargetSpec: TypeAlias = (
    int
    | str
    | Sequence[int]
    | Sequence[Sequence[int]]
    | np.ndarray
    | np.integer
    | torch.Tensor
    | Callable[[Any], torch.Tensor]
    | None
)


@dataclass(frozen=True)
class Targets:
    """Resolved targets of a batch.

    indices  (B,) or (B, T) int64 class indices, or None when `score` is a callable
    score    callable on the model's output that returns one score an image, or None
    valid    (B,) bool, False where an index on an accelerator was out of range (there the check must not cost a sync)
    """

    indices: torch.Tensor | None
    score: Callable[[Any], torch.Tensor] | None
    valid: torch.Tensor | None = None

    @property
    def several(self) -> bool:
        return self.indices is not None and self.indices.ndim == 2


def class_scores(output: Any) -> Any:
    """What class indices refer to: the output, or its `logits` where it is a structure that names them."""
    logits = None if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else output


def resolve_targets(targets: TargetSpec, output: Any, batch: int) -> Targets:
    """Turn `targets` into class indices of `output` (B, C), or of its `logits`, or keep a callable.

    targets  None: arg-max of each image · int: that class for all · list of B ints · (B,) or (B, T) integers ·
             "top5": the five highest of each image · callable: output -> (B,) scores

    Raises TypeError for a target of another type, or one that needs (B, C) scores from a model that gives something
    else; ValueError for a wrong number of targets; IndexError for a class that does not exist.
    """
    if callable(targets) and not isinstance(targets, torch.Tensor):
        return Targets(None, targets)
    output = class_scores(output)
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        given = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise TypeError(
            f"targets={targets!r} needs a model whose output is a (batch, classes) tensor, this one's is {given}; "
            "pass targets=callable that takes the output and returns one score an image"
        )
    classes = output.shape[1]
    if targets is None:
        if classes == 0:
            raise IndexError("the model's output has 0 classes")
        return Targets(output.argmax(dim=1), None)
    if isinstance(targets, str):
        return Targets(_highest(targets, output), None)
    indices, valid = _as_indices(targets, batch, classes, output.device)
    return Targets(indices, None, valid)


def scores_of(
    output: Any, targets: Targets, column: int | None, batch: int, layer: str, differentiable: bool = True
) -> torch.Tensor:
    """(B,) scores: column `column` of two-dimensional indices, or the callable's result, maybe to be differentiated."""
    if targets.indices is not None:
        chosen = targets.indices if column is None else targets.indices[:, column]
        return class_scores(output).gather(1, chosen.unsqueeze(1)).squeeze(1)
    assert targets.score is not None
    score = targets.score(output)
    if not isinstance(score, torch.Tensor) or tuple(score.shape) != (batch,):
        given = f"shape {tuple(score.shape)}" if isinstance(score, torch.Tensor) else type(score).__name__
        raise ValueError(f"a callable target must return one score an image, shape ({batch},); it returned {given}")
    if differentiable and not score.requires_grad:
        raise RuntimeError(
            f"the score does not depend on layer '{layer}': the callable target cut the graph, e.g. by detach()"
        )
    return score


def check_count(indices: torch.Tensor, batch: int) -> None:
    """ValueError where class indices are not (batch,) or (batch, T)."""
    if indices.ndim not in (1, 2) or indices.shape[0] != batch:
        raise ValueError(
            f"targets of shape {tuple(indices.shape)} do not fit a batch of {batch}: "
            f"expected ({batch},), or ({batch}, T) for T targets an image"
        )


def _highest(text: str, output: torch.Tensor) -> torch.Tensor:
    match = re.fullmatch(r"top([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"targets={text!r} is not understood; a text target reads 'top1', 'top5', ...")
    count = int(match.group(1))
    if count > output.shape[1]:
        raise IndexError(f"targets={text!r} asks for more classes than the model's {output.shape[1]}")
    return output.topk(count, dim=1).indices


def _as_indices(
    targets: Any, batch: int, classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(targets, np.integer):
        targets = int(targets)
    if isinstance(targets, bool) or not isinstance(targets, (int, list, tuple, np.ndarray, torch.Tensor)):
        raise TypeError(
            f"targets must be None, an int, a list of ints, an integer tensor, a text like 'top5' or a callable; "
            f"got {type(targets).__name__}"
        )
    if isinstance(targets, int):
        if not 0 <= targets < classes:
            raise IndexError(f"target {targets} is out of range: the model's classes are 0 to {classes - 1}")
        return torch.full((batch,), targets, dtype=torch.int64, device=device), None
    if type(targets) is list and len(targets) == batch and all(type(t) is int and 0 <= t < classes for t in targets):
        return torch.tensor(targets, dtype=torch.int64, device=device), None
    try:
        # NumPy arrays may be read-only, which a tensor cannot be.
        indices = torch.as_tensor(targets.copy() if isinstance(targets, np.ndarray) else targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"targets must hold integers, the same number for each image: {error}") from None
    if indices.numel() == 0 and indices.ndim <= 1:
        indices = indices.reshape(0).to(torch.int64)
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise TypeError(f"targets must hold integers, got {indices.dtype}")
    if indices.ndim == 0:
        indices = indices.expand(batch)
    check_count(indices, batch)
    if indices.ndim == 2 and indices.shape[1] == 0:
        raise ValueError(f"targets of shape {tuple(indices.shape)} name no class for any image")
    indices = indices.to(torch.int64)
    if indices.is_inference():  # no gradient can be saved with it
        with torch.inference_mode(False):
            indices = indices.clone()
    if indices.device.type == "cpu" and not tracing():
        for end in indices.aminmax() if indices.numel() else ():
            if not 0 <= int(end) < classes:
                raise IndexError(f"target {int(end)} is out of range: the model's classes are 0 to {classes - 1}")
        return indices.to(device), None
    wrong = (indices < 0) | (indices >= classes)
    valid = ~(wrong if wrong.ndim == 1 else wrong.any(dim=1))
    return indices.clamp(0, max(classes - 1, 0)).to(device), valid.to(device)
