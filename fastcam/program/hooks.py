"""The way around capture: one forward pass of the user's own module with a temporary hook at the layer.

Used where a network cannot be captured, or where only running the module tells what a layer returns. The results are
the same; there are no closed forms, and parameters that require gradients are part of the recorded graph (their
gradients are never computed).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import nn

from .forward import Forward, detached
from .layers import layer_names, several_outputs
from .state import evaluating, exclusive, keeping_buffers, neutral_modes

__all__ = ["HookCut", "hook_cut"]


def hook_cut(model: nn.Module, layer: str | nn.Module | None, images: torch.Tensor) -> HookCut:
    """The module to hook for `layer`; None finds the last spatial feature map by one forward pass on one image.

    Raises ValueError or TypeError as `layers.layer_names` does, and ValueError where no module has a feature map.
    """
    name = _last_spatial_module(model, images) if layer is None else layer_names(model, layer)[0]
    return HookCut(model, name, dict(model.named_modules(remove_duplicate=False))[name])


class HookCut:
    """A model cut at a module's output by a forward hook that lives for one call."""

    affine = None

    def __init__(self, model: nn.Module, layer: str, module: nn.Module):
        self.model = model
        self.layer = layer
        self.module = module

    def forward(self, images: torch.Tensor, *, gradients: bool) -> Forward:
        """Run the model in evaluation mode; from the layer's last run on with a graph when `gradients` is set.

        Raises TypeError where the layer's output is not one tensor, RuntimeError where the layer does not run.
        """
        taps: list[torch.Tensor] = []

        def tap(module: nn.Module, args: Any, result: Any) -> torch.Tensor:
            if not isinstance(result, torch.Tensor):
                raise several_outputs(self.layer, type(result).__name__)
            taps.append(result.detach())
            if gradients:
                torch.set_grad_enabled(True)  # undone by the surrounding no_grad
                taps[-1] = result.detach().requires_grad_()
            # A copy goes on, so that code after the layer may write into it.
            return taps[-1].clone()

        with exclusive, neutral_modes(), evaluating(self.model), keeping_buffers(self.model):
            handle = self.module.register_forward_hook(tap)
            try:
                output = self.model(images.clone())
            finally:
                handle.remove()
        if not taps:
            raise RuntimeError(f"layer '{self.layer}' does not run in the forward pass of {type(self.model).__name__}")
        features = taps[-1]
        if not gradients:
            return Forward(self.layer, features, detached(output))
        return Forward(self.layer, features.detach(), detached(output), leaf=features, graph_output=output)


def _last_spatial_module(model: nn.Module, images: torch.Tensor) -> str:
    """Name of the last module, in order of execution, whose output is a feature map and that is no pooling layer."""
    names = {id(module): name for name, module in model.named_modules() if name}
    seen: list[str] = []

    def note(module: nn.Module, args: Any, result: Any) -> None:
        is_map = isinstance(result, torch.Tensor) and result.is_floating_point() and result.ndim == images.ndim
        if is_map and math.prod(result.shape[2:]) > 1 and "pool" not in type(module).__name__.lower():
            seen.append(names[id(module)])

    with exclusive, neutral_modes(), evaluating(model), keeping_buffers(model), contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(note).remove)
        model(images[:1].clone())
    if not seen:
        raise ValueError("the model has no spatial feature map; pass layer= (and reshape_transform= for tokens)")
    return seen[-1]
