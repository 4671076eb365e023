"""One pass through a cut network: features, output, and gradients of scores with respect to the features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .targets import Targets, scores_of

__all__ = ["Forward", "detached"]


class Forward:
    """What a cut leaves behind after a forward pass.

    features   (B, K, *spatial), or what the layer gives, detached
    output     the model's output, detached
    layer      the layer's name
    uniform    whether the head is affine and its gradients are the same at every position
    """

    def __init__(
        self,
        layer: str,
        features: torch.Tensor,
        output: Any,
        leaf: torch.Tensor | None = None,
        graph_output: Any = None,
        closed_form: Callable[[Targets], torch.Tensor] | None = None,
        uniform: bool = False,
    ):
        self.layer = layer
        self.features = features
        self.output = output
        self.uniform = uniform
        self._leaf = leaf
        self._graph_output = graph_output
        self._closed_form = closed_form

    def gradients(self, targets: Targets) -> torch.Tensor:
        """d score / d features: (B, K, *spatial), or (B, T, K, *spatial) for T targets an image.

        Closed form where the head is affine, else one backward pass through the head for each target column.

        Raises RuntimeError where the score does not depend on the layer.
        """
        if self._closed_form is not None:
            return self._closed_form(targets)
        if self._leaf is None:
            raise RuntimeError(f"layer '{self.layer}' was passed without recording gradients")
        batch = self.features.shape[0]
        columns: list[int | None] = [None]
        if targets.indices is not None and targets.indices.ndim == 2:
            columns = list(range(targets.indices.shape[1]))
        found = []
        for number, column in enumerate(columns):
            with torch.enable_grad():
                score = scores_of(self._graph_output, targets, column, batch, self.layer).sum()
            if not score.requires_grad:
                raise RuntimeError(f"the score does not depend on layer '{self.layer}'")
            keep = number + 1 < len(columns)
            (gradient,) = torch.autograd.grad(score, self._leaf, retain_graph=keep, allow_unused=True)
            if gradient is None:
                raise RuntimeError(f"the score does not depend on layer '{self.layer}'")
            found.append(gradient)
        self._graph_output = self._leaf = None
        return torch.stack(found, dim=1) if targets.several else found[0]


def detached(value: Any) -> Any:
    """`value` with every tensor in it detached."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)
