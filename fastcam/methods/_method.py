"""What a method is: a formula from a passage through a cut network to evidence, with its name, options and source."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastcam.program.forward import Forward
from fastcam.program.targets import Targets

__all__ = ["CamOptions", "Evidence", "Method", "Passage"]


@dataclass(frozen=True)
class CamOptions:
    """Options every CAM-type method takes.

    relu               keep only positive evidence: M -> max(M, 0)
    reshape_transform  callable that turns the layer's output (tokens, channels-last blocks) into (B, K, *spatial); it
                       must only move elements around, since gradients go through it too
    on_nonfinite       "raise": ValueError naming the tensor and the image · "mask": that image's maps are zeros and
                       `Attribution.valid` is False · None: raise on the CPU, mask on accelerators, where raising
                       would cost a synchronisation
    """

    relu: bool = True
    reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    on_nonfinite: Literal["raise", "mask"] | None = None

    def __post_init__(self) -> None:
        if self.on_nonfinite not in (None, "raise", "mask"):
            raise ValueError(f"on_nonfinite must be 'raise', 'mask' or None; got {self.on_nonfinite!r}")
        if self.reshape_transform is not None and not callable(self.reshape_transform):
            raise TypeError(f"reshape_transform must be a callable; got {type(self.reshape_transform).__name__}")


class Passage:
    """A batch after its pass through the network, as a method sees it.

    features  (B, K, *spatial), reshaped by `reshape_transform` where given
    targets   the resolved targets
    layer     the layer's name
    closed    whether the head is affine with gradients that are the same at every position
    """

    def __init__(self, forward: Forward, features: torch.Tensor, targets: Targets, options: CamOptions, closed: bool):
        self.features = features
        self.targets = targets
        self.layer = forward.layer
        self.closed = closed
        self._forward = forward
        self._reshape = options.reshape_transform

    @property
    def spatial_rank(self) -> int:
        return self.features.ndim - 2

    def gradients(self) -> torch.Tensor:
        """d score / d features, (B, K, *spatial) or (B, T, K, *spatial); stride 0 over positions on closed heads."""
        found = self._forward.gradients(self.targets)
        if self._reshape is None:
            return found
        if not self.targets.several:
            return self._reshape(found)
        return torch.stack([self._reshape(one) for one in found.unbind(1)], dim=1)


@dataclass(frozen=True)
class Evidence:
    """What a method hands to the shared end of the pipeline (ReLU, resize, normalisation); exactly one is given.

    weights      (B, K) or (B, T, K) channel coefficients: the map is sum_k weights_k A_k
    multipliers  (B, K, *spatial) or (B, T, K, *spatial): the map is sum_k multipliers_k * A_k
    projection   (B, *spatial) or (B, T, *spatial): the map itself
    """

    weights: torch.Tensor | None = None
    multipliers: torch.Tensor | None = None
    projection: torch.Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A row of the registry.

    name       what users pass as `method=`
    summary    one line
    source     paper and equation
    evidence   the formula
    gradients  whether the formula reads gradients
    options    the dataclass of its options, defaults included
    """

    name: str
    summary: str
    source: str
    evidence: Callable[[Passage, Any], Evidence]
    gradients: bool
    options: type[CamOptions] = CamOptions

    def make_options(self, given: dict[str, Any]) -> CamOptions:
        """The options dataclass with `given` filled in; TypeError for a name the method does not know."""
        known = [f.name for f in dataclasses.fields(self.options)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise TypeError(
                    f"method '{self.name}' has no option {name!r}; {hint}its options are: {', '.join(known)}"
                )
        return self.options(**given)
