"""A user's model on perturbed images: scores in chunks of bounded memory, and nothing left behind."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcam._network import check_images, warn_if_training
from fastcam.explainer import _check_pixels as pixels_of
from fastcam.methods._perturb import check_count, check_seed
from fastcam.methods._references import check_reference, reference_images
from fastcam.program.session import fastest
from fastcam.program.state import evaluating, exclusive, keeping_buffers, neutral_modes
from fastcam.program.targets import TargetSpec, class_scores, resolve_targets, scores_of

__all__ = ["Output", "Trial", "baseline_images", "check_fractions", "pixels_of", "ranks_of", "running", "trial"]

#: What a score is: softmax of the class scores, each class's own sigmoid, or the class scores as the model gives them.
Output = Literal["probability", "sigmoid", "logit"]
_OUTPUTS = ("probability", "sigmoid", "logit")
_RESIZE = {1: "linear", 2: "bilinear", 3: "trilinear"}


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """The model runs as in evaluation mode, without a graph; flags and buffers are put back on every exit path."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    warn_if_training(model)
    with exclusive, neutral_modes(), keeping_buffers(model), evaluating(model):
        yield


#: Passes of single images from which on it pays to fold the network, which takes as long as a few.
_MANY = 8


class Trial:
    """Images with a map and a target each, N of them: B, or B T where maps are (B, T, *spatial).

    images  (N, C, *spatial)
    maps    (N, *spatial), resized to the images
    levels  (N,) float64: logarithms of the probabilities, or the logits
    valid   (N,) whether map, image, score and target are usable
    """

    def __init__(self, model: nn.Module, images: Tensor, maps: Tensor, targets: TargetSpec, output: Output, chunk: int):
        self._model = model
        self._output = output
        self._chunk = chunk
        self.shape = maps.shape[: maps.ndim - images.ndim + 2]
        several = self.shape[1] if len(self.shape) == 2 else 0
        found = self._first_pass(images, callable(targets) and not isinstance(targets, Tensor))
        self._targets = resolve_targets(targets, found, len(images))
        if self._targets.indices is not None:
            _check_columns(self._targets.indices, self.shape)
            _check_rivals(class_scores(found), output)
            self._chosen = self._targets.indices.flatten()
        if several:
            images = images.repeat_interleave(several, 0)
            found = class_scores(found).repeat_interleave(several, 0)  # several targets are always indices
        self.images = images
        maps = maps.flatten(0, len(self.shape) - 1)
        self.maps = _resized(maps, images)
        rows = torch.arange(len(images), device=images.device)
        self.levels = self.level(found, rows)
        self.valid = _finite(maps) & _finite(self.maps) & _finite(images) & self.levels.isfinite()
        if self._targets.valid is not None:
            self.valid = self.valid & self._targets.valid.repeat_interleave(several or 1)

    def _first_pass(self, images: Tensor, whole: bool) -> Any:
        """The model's output: class scores from batches of at most `chunk`, or what it is for the whole batch."""
        if whole or len(images) <= self._chunk:
            return self._model(images)
        return torch.cat([class_scores(self._model(part)) for part in images.split(self._chunk)])

    def level(self, output: Any, rows: Tensor) -> Tensor:
        """(n,) float64 levels of the model's output for perturbed images of rows `rows` (n,)."""
        if self._targets.indices is None:
            return scores_of(output, self._targets, None, len(rows), "output", differentiable=False).double()
        logits = class_scores(output).double()
        if self._output == "probability":
            logits = logits.log_softmax(1)
        found = logits.gather(1, self._chosen[rows].unsqueeze(1)).squeeze(1)
        return functional.logsigmoid(found) if self._output == "sigmoid" else found

    def recognised(self, output: Any, rows: Tensor) -> Tensor:
        """(n,) 1 where the target is what the model says: its highest class, or one above one half for "sigmoid"."""
        if self._targets.indices is None:
            raise TypeError("recognition needs class indices as targets; a callable's score has no rival")
        logits, chosen = class_scores(output), self._chosen[rows]
        if self._output == "sigmoid":
            return (logits.gather(1, chosen.unsqueeze(1)).squeeze(1) > 0).double()
        return (logits.argmax(1) == chosen).double()

    def scores(self, levels: Tensor) -> Tensor:
        """Probabilities or logits from levels."""
        return levels if self._output == "logit" else levels.exp()

    def relative(self, levels: Tensor) -> Tensor:
        """(Y - Y') / Y of the original's score Y and that of `levels` (N,); NaN for a logit that is not positive."""
        if self._output == "logit":
            return torch.where(self.levels > 0, (self.levels - levels) / self.levels, math.nan)
        return 1 - (levels - self.levels).clamp(max=700).exp()

    def sweep(
        self, count: int, perturb: Callable[[slice, slice], Tensor], read: Callable[[Any, Tensor], Tensor]
    ) -> Tensor:
        """(N, count) readings of `count` perturbations of every image, `chunk` inputs in a forward pass.

        perturb  (rows, steps) -> (n, s, C, *spatial)
        read     `level` or `recognised`
        """
        total = len(self.images)
        found = self.levels.new_empty((total, count))
        by_index = self._targets.indices is not None
        model = self._fastest if total * count >= _MANY else self._model
        # A callable was written for whole batches of the user's, in their order.
        block = min(total, self._chunk) if by_index else total
        for first in range(0, total, max(1, block)):
            rows = slice(first, min(first + block, total))
            size = rows.stop - rows.start
            span = max(1, self._chunk // size) if by_index else 1
            number = torch.arange(rows.start, rows.stop, device=found.device)
            for step in range(0, count, span):
                steps = slice(step, min(step + span, count))
                inputs = perturb(rows, steps).flatten(0, 1)
                each = number.repeat_interleave(steps.stop - steps.start)
                found[rows, steps] = read(model(inputs), each).unflatten(0, (size, -1)).to(found.dtype)
        return found

    @cached_property
    def _fastest(self) -> Callable[[Tensor], Any]:
        return fastest(self._model, self.images)

    def one(self, images: Tensor) -> Tensor:
        """(N,) levels of one other image for each, (N, C, *spatial)."""
        return self.sweep(1, lambda rows, _: images[rows].unsqueeze(1), self.level).squeeze(1)

    def shaped(self, values: Tensor) -> Tensor:
        """(N, ...) as (B, ...) or (B, T, ...), NaN for rows that are not valid."""
        keep = self.valid.reshape(-1, *(1,) * (values.ndim - 1))
        return torch.where(keep, values, math.nan).unflatten(0, self.shape)


@contextlib.contextmanager
def trial(
    model: nn.Module, images: Tensor, maps: Tensor, targets: TargetSpec, output: Output, chunk: int
) -> Iterator[Trial]:
    """Checks the arguments and runs the model on the images; the model is in evaluation mode inside."""
    check_images(images)
    check_count("chunk", chunk)
    if output not in _OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(_OUTPUTS)}; got {output!r}")
    if callable(targets) and not isinstance(targets, Tensor) and output != "logit":
        raise ValueError(f"a callable target returns the score itself: pass output='logit', not {output!r}")
    _check_maps(maps, images)
    if callable(targets) and not isinstance(targets, Tensor) and maps.ndim == images.ndim:
        raise ValueError(f"a callable target is one score an image; maps {tuple(maps.shape)} hold several")
    if len(images) == 0:
        raise ValueError("images hold no image; a metric needs at least one")
    with running(model):
        yield Trial(model, images.detach(), maps.detach(), targets, output, chunk)


def baseline_images(baseline: str | Tensor, images: Tensor, mean: Any, std: Any, seed: int) -> Tensor:
    """(1 or B, C, *spatial) what pixels are replaced by; names and errors are those of references, for one of them."""
    if isinstance(baseline, (list, tuple)):
        raise TypeError("baseline must be one name or tensor; got several")
    check_reference(baseline)
    check_seed(seed)
    return reference_images(baseline, images, pixels_of(mean, std), seed)


def ranks_of(maps: Tensor) -> Tensor:
    """(N, P) int64 rank of every place of maps (N, *spatial), 0 the highest; of equal values the first comes first."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def check_fractions(fractions: Any) -> tuple[float, ...]:
    """Fractions in [0, 1] as floats, ascending and different."""
    found = tuple(float(fraction) for fraction in fractions)
    if not found or list(found) != sorted(set(found)) or not 0 <= found[0] <= found[-1] <= 1:
        raise ValueError(f"fractions must ascend within [0, 1]; got {tuple(fractions)}")
    return found


def _check_maps(maps: Any, images: Tensor) -> None:
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        what = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise TypeError(f"maps must be a floating point tensor (B, *spatial) or (B, T, *spatial); got {what}")
    if maps.ndim not in (images.ndim - 1, images.ndim) or len(maps) != len(images) or 0 in maps.shape[1:]:
        raise ValueError(
            f"maps of shape {tuple(maps.shape)} do not fit images of shape {tuple(images.shape)}: expected one map an "
            "image, (B, *spatial), or one for each of T targets, (B, T, *spatial)"
        )
    if maps.device != images.device:
        raise ValueError(f"maps are on {maps.device} and images on {images.device}; move one to the other")


def _check_columns(indices: Tensor, shape: torch.Size) -> None:
    if tuple(indices.shape) != tuple(shape):
        raise ValueError(
            f"targets of shape {tuple(indices.shape)} do not fit maps for {tuple(shape)} (images, targets): "
            "give each map its target"
        )


def _check_rivals(scores: Tensor, output: Output) -> None:
    if output == "probability" and scores.shape[1] == 1:
        raise ValueError(
            "the model gives one score an image, whose softmax is 1 whatever the image shows: pass output='sigmoid', "
            "or 'logit'"
        )


def _resized(maps: Tensor, images: Tensor) -> Tensor:
    """At the images' size, bilinear between pixel centres, as `attribute` resizes."""
    spatial = images.shape[2:]
    maps = maps.double() if maps.dtype == torch.float64 else maps.float()
    if maps.shape[1:] == spatial:
        return maps
    return functional.interpolate(
        maps.unsqueeze(1), size=spatial, mode=_RESIZE[len(spatial)], align_corners=False
    ).squeeze(1)


def _finite(values: Tensor) -> Tensor:
    return values.flatten(1).isfinite().all(1)
