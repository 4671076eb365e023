"""Single steps between an image and a linear read-out, and naive Rescale rules to hold the engine against."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcam.program.capture import capture
from fastcam.program.cut import cut
from fastcam.program.layers import find_layer
from fastcam.program.session import Bound
from fastcam.program.targets import TargetSpec, resolve_targets

__all__ = ["ReadOut", "complete", "draw", "max_pool_rule", "multipliers", "secant"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class ReadOut(nn.Module):
    """scores (B, 3) = W flatten(step(x)) + b, in float64 and evaluation mode.

    step   a module, or a function of the images
    shape  of one image
    """

    def __init__(self, step: nn.Module | Callable[[Any], Any], shape: Sequence[int], seed: int = 0):
        super().__init__()
        self.step = step.double().eval() if isinstance(step, nn.Module) else step
        with torch.no_grad():
            self.made = self.step(draw(2, *shape).abs() + 0.1).shape[1:]
        self.fc = nn.Linear(self.made.numel(), 3).double()
        with torch.no_grad():
            self.fc.weight.copy_(draw(*self.fc.weight.shape, seed=seed + 7))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.step(x).flatten(1))

    def cotangent(self, target: int) -> Tensor:
        """d score / d step(x) of one image."""
        return self.fc.weight[target].detach().reshape(self.made)


def multipliers(
    model: nn.Module, images: Tensor, reference: Tensor, targets: TargetSpec = 1, layer: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """m and m (A - R) at the images or a layer, and y(A) - y(R), by the walk back even where the head is affine."""
    program = capture(model, images)
    feature, name = (program.input, "input") if layer is None else find_layer(program, model, layer, images.ndim - 2)
    session = Bound(cut(program, feature, name), model, images.dtype).session()
    passed = session.forward(images, "multipliers", closed_form=False)
    resolved = resolve_targets(targets, passed.output, len(images))
    base = passed.reference(session.features(reference))
    found = passed.multipliers(resolved, base)
    chosen = resolved.indices
    assert chosen is not None
    outputs = (passed.output, base.output.expand(passed.output.shape))
    here, there = (output.gather(1, chosen.unsqueeze(1))[:, 0] for output in outputs)
    return found, found * (passed.features - base.features), here - there


def complete(net: nn.Module, shape: Sequence[int], tolerance: float = 1e-10, seed: int = 1) -> Tensor:
    """Multipliers of two drawn images against two others, asserted to be complete."""
    x, reference = draw(2, *shape, seed=seed), draw(2, *shape, seed=seed + 1)
    m, contributions, difference = multipliers(net, x, reference)
    assert difference.abs().min() > 1e-6
    error = contributions.flatten(1).sum(1) - difference
    assert (error.abs() <= tolerance * contributions.flatten(1).abs().sum(1)).all()
    return m


def secant(function: Callable[[Tensor], Tensor], x: Tensor, reference: Tensor) -> Tensor:
    """(f(x) - f(x')) / (x - x') element by element; no two may be equal."""
    return (function(x) - function(reference)) / (x - reference)


def max_pool_rule(
    x: Tensor,
    reference: Tensor,
    cotangent: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The max-pool rule of one channel, window by window: x, x' (*spatial), cotangent (*windows).

    A window gives g (p - p') / (x[s] - x'[s]) to s, where the larger maximum stands; g/2 to each of the two places that
    does not change where p = p'.
    """
    found = torch.zeros_like(x)
    for window in itertools.product(*(range(n) for n in cotangent.shape)):
        starts = [w * s - p for w, s, p in zip(window, stride, padding, strict=True)]
        lines = [[start + d * i for i in range(k)] for start, k, d in zip(starts, kernel, dilation, strict=True)]
        inside = [
            place
            for place in itertools.product(*lines)
            if all(0 <= at < size for at, size in zip(place, x.shape, strict=True))
        ]
        i, j = (inside[int(torch.stack([u[place] for place in inside]).argmax())] for u in (x, reference))
        top, top_reference, g = x[i], reference[j], cotangent[window]
        if top == top_reference:
            for place in (i, j):
                if x[place] == reference[place]:
                    found[place] += g / 2
        else:
            place = i if top > top_reference else j
            found[place] += g * (top - top_reference) / (x[place] - reference[place])
    return found
