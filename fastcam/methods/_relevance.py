"""What the relevance methods share: options, seeds at the logits, and evidence from relevance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam._tracing import tracing
from fastcam.program.forward import Backward

from ._method import Evidence, MethodOptions, Passage

__all__ = ["RelevanceOptions", "columns", "evidence_of", "onehot", "onehot_columns", "stacked", "totals"]


@dataclass(frozen=True)
class RelevanceOptions(MethodOptions):
    """As `MethodOptions`, and

    layers            names of layers whose relevance is wanted too, from the same walk: `extra["layers"][name]`,
                      (B, K, *spatial) or (B, T, K, *spatial)
    return_relevance  also `extra["relevance"]`: the map before its sum over channels, (B, C, *spatial)
    """

    layers: Sequence[str] = ()
    return_relevance: bool = False
    _backward: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str) or not all(isinstance(name, str) for name in self.layers):
            raise TypeError(f"layers must be a sequence of module names; got {self.layers!r}")

    def _walked_by(self, composer: Any, below: bool = False, folded: bool = True) -> None:
        object.__setattr__(self, "_backward", Backward(composer, below, folded))

    def needed(self, usual: Any) -> Any:
        return self._backward


def columns(passage: Passage) -> list[Tensor]:
    """Class indices (B,) of each target."""
    indices = passage.targets.indices
    if indices is None:
        raise TypeError("this seed needs classes as targets, not a callable")
    if not isinstance(passage.logits, Tensor):
        raise TypeError("relevance of classes needs a model whose output is one tensor; pass a callable target")
    return list(indices.unbind(1)) if indices.ndim == 2 else [indices]


def onehot(logits: Tensor, chosen: Tensor, value: Tensor | float = 1.0) -> Tensor:
    """`value` at the chosen class of each image, 0 elsewhere: (B, C)."""
    # A number expanded to one an image is more than AOTInductor can compile; a filled tensor is not.
    count = logits.shape[0]
    values = value.to(logits).expand(count) if isinstance(value, Tensor) else logits.new_full((count,), value)
    return torch.zeros_like(logits).scatter_(1, chosen.unsqueeze(1), values.unsqueeze(1))


Seed = Literal["onehot", "logit", "contrast"]


def onehot_columns(passage: Passage, seed: Seed | Tensor | Callable[[Tensor], Tensor]) -> list[Any]:
    """Relevance at the logits for each target; see `lrp` for what the names mean."""
    logits = passage.logits
    if callable(seed) and not isinstance(seed, Tensor):
        seed = seed(logits)
    if isinstance(seed, Tensor):
        finite = tracing() or bool(seed.isfinite().all())
        if not isinstance(logits, Tensor) or seed.shape != logits.shape or not finite:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"seed must hold finite numbers in the logits' shape {shape}; got {tuple(seed.shape)}")
        return [seed.to(logits)]
    if passage.targets.indices is None:
        if seed == "contrast":
            raise TypeError("seed 'contrast' needs classes as targets, not a callable")
        slopes = passage.score_slopes()
        values = logits if isinstance(logits, list) else [logits]
        return [[s if s is None or seed == "onehot" else s * v for s, v in zip(slopes, values, strict=True)]]
    found = []
    for chosen in columns(passage):
        if seed == "contrast":
            if logits.shape[1] < 2:
                raise ValueError("seed 'contrast' needs at least two classes")
            found.append(onehot(logits, chosen, 1 + 1 / logits.shape[1]) - 1 / logits.shape[1])
        else:
            value = logits.gather(1, chosen.unsqueeze(1)).squeeze(1) if seed == "logit" else 1.0
            found.append(onehot(logits, chosen, value))
    return found


def stacked(passage: Passage, many: list[Tensor]) -> Tensor:
    """(B, ...) for one target, (B, T, ...) for several."""
    return torch.stack(many, dim=1) if passage.targets.several else many[0]


def totals(seeds: list[Any]) -> list[Tensor]:
    """What each seed adds up to, image by image: (B,)."""
    found = []
    for seed in seeds:
        parts = seed if isinstance(seed, list) else [seed]
        found.append(sum(part.unsqueeze(-1).flatten(1).sum(1) for part in parts if part is not None))
    return found


def evidence_of(
    passage: Passage,
    options: RelevanceOptions,
    found: list[Tensor],
    layers: dict[str, list[Tensor]],
    given: list[Tensor] | None,
) -> Evidence:
    """Maps from relevance (B, C, *spatial) of each target; `given`: what it should add up to."""
    maps = [one.sum(1) for one in found]
    delta = None
    if given is not None:
        parts = [one.flatten(1).sum(1) - total for one, total in zip(maps, given, strict=True)]
        delta = stacked(passage, parts)
    extra: dict[str, Any] = {}
    if options.layers:
        extra["layers"] = {name: stacked(passage, many) for name, many in layers.items()}
    if options.return_relevance:
        extra["relevance"] = stacked(passage, found)
    return Evidence(projection=stacked(passage, maps), delta=delta, extra=extra)
