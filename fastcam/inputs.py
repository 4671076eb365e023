"""Models that read more than the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["Bound", "bind"]


class Bound(nn.Module):
    """A model with everything but its images given; see `bind`. `model` is the user's, so that layers of it are named
    "model.<name>"."""

    def __init__(self, model: nn.Module, others: tuple[Any, ...], named: dict[str, Any]):
        super().__init__()
        self.model = model
        self.others = others
        self.named = named
        self.training = model.training

    def forward(self, images: torch.Tensor) -> Any:
        def fit(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.expand(images.shape[0], *tensor.shape[1:]) if tensor.ndim and len(tensor) == 1 else tensor

        others, named = torch.utils._pytree.tree_map_only(torch.Tensor, fit, (self.others, self.named))
        return self.model(images, *others, **named)


def bind(model: nn.Module, *others: Any, **named: Any) -> nn.Module:
    """A model of images alone, out of one that reads other things beside them.

        explainer = fastcam.Explainer(fastcam.bind(model, metadata), "lift_cam")     # runs model(images, metadata)

    others, named  what `model` is called with after the images: tensors (in lists, tuples or dicts, too) of one row,
                   (1, ...), serve all images; of B rows, batches of B images

    With one row for all the network is captured and every method works. With a row for each image it runs through a
    hook, and methods by gradients at a layer work. Make it once and keep it: each one is captured anew. The other
    inputs are constants: they get no attribution.

    Raises TypeError for a model that is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return Bound(model, others, named)
