"""The way around capture: one forward pass of the user's own module with a temporary hook at the layer.

Used where a network cannot be captured, or where only running the module tells what a layer returns. The results are
the same; there are no closed forms, and parameters that require gradients are part of the recorded graph (their
gradients are never computed).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastcam._watch import stage

from .arrangement import channels_first
from .forward import Forward, Graph, Needs, Reference, Session, detached
from .layers import layer_names, several_outputs
from .state import evaluating, exclusive, keeping_buffers, neutral_modes
from .targets import Targets

__all__ = ["HookSession", "check_batched", "check_channels", "hook_session"]

#: Modules whose output has its channels in the last dimension, and those that have them in the second.
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def hook_session(model: nn.Module, layer: str | nn.Module | None, images: Tensor, reason: str) -> HookSession:
    """The model at `layer`, through a hook; None finds the last spatial feature map by a forward pass on one image.

    reason  why the network is not captured, for errors

    Raises ValueError or TypeError as `layers.layer_names` does, and ValueError where no module has a feature map.
    """
    name = _last_spatial_module(model, images) if layer is None else layer_names(model, layer)[0]
    return HookSession(model, name, dict(model.named_modules(remove_duplicate=False))[name], reason)


class HookSession(Session):
    """A model at a module's output, by a forward hook that lives for one pass. What follows the layer cannot run alone:
    a pass on other features is a whole pass."""

    def __init__(self, model: nn.Module, layer: str, module: nn.Module, reason: str):
        self.model = model
        self.layer = layer
        self.reason = reason
        self._module = module
        self._last = False

    def arrangement(self) -> Callable[[Tensor], Tensor] | None:
        """Channels moved first, where those of the latest pass were last by the modules that ran inside the layer."""
        return channels_first if self._last else None

    def forward(self, images: Tensor, needs: Needs = "features", by_index: bool = True) -> HookForward:
        """Run the model in evaluation mode; from the layer's last run on with a graph when gradients are wanted.

        Raises TypeError where the layer's output is not one tensor, RuntimeError where the layer does not run, or where
        multipliers are wanted.
        """
        if needs in ("multipliers", "parts"):
            raise RuntimeError(f"DeepLIFT multipliers need a captured network, but {self.reason}")
        taps: list[Tensor] = []
        inside: list[tuple[torch.Size, bool]] = []

        def note(module: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                inside.append((result.shape, isinstance(module, _LAST)))

        def tap(features: Tensor) -> Tensor:
            taps.append(features.detach())
            if needs == "gradients":
                torch.set_grad_enabled(True)  # undone by the surrounding no_grad
                taps[-1] = features.detach().requires_grad_()
            # A copy goes on, so that code after the layer may write into it.
            return taps[-1].clone()

        output = self._run(images, tap, note)
        if not taps:
            raise RuntimeError(f"layer '{self.layer}' does not run in the forward pass of {type(self.model).__name__}")
        alike = [last for shape, last in inside if shape == taps[-1].shape]
        self._last = images.ndim == taps[-1].ndim and alike[-1:] == [True]
        graph = Graph(taps[-1], output, self.layer) if needs == "gradients" else None
        return HookForward(self, images, taps[-1].detach(), detached(output), graph, runs=len(taps))

    def features(self, images: Tensor) -> Tensor:
        return self.forward(images).features

    def output(self, images: Tensor, folded: bool = False) -> Any:
        return detached(self._run(images, None))

    def _run(
        self,
        images: Tensor,
        replace: Callable[[Tensor], Tensor] | None,
        note: Callable[[nn.Module, Any, Any], None] | None = None,
    ) -> Any:
        """One pass in evaluation mode, the layer's output replaced at each of its runs.

        note  a hook for the modules of the layer whose layout is known
        """
        part = contextlib.ExitStack()

        def hook(module: nn.Module, args: Any, result: Any) -> Tensor:
            if not isinstance(result, Tensor):
                raise several_outputs(self.layer, type(result).__name__)
            assert replace is not None
            part.close()
            part.enter_context(stage("head"))
            return replace(result)

        with (
            exclusive,
            neutral_modes(),
            evaluating(self.model),
            keeping_buffers(self.model),
            contextlib.ExitStack() as hooks,
            part,
        ):
            for module in self._module.modules() if note is not None else ():
                if isinstance(module, _LAST + _SECOND):
                    hooks.callback(module.register_forward_hook(note).remove)
            if replace is not None:
                hooks.callback(self._module.register_forward_hook(hook).remove)
            part.enter_context(stage("trunk"))
            return _call(self.model, images, images)


class HookForward(Forward):
    """`Forward` of a model that is run as it is."""

    session: HookSession

    def __init__(
        self, session: HookSession, images: Tensor, features: Tensor, output: Any, graph: Graph | None, runs: int
    ):
        super().__init__(session, features, output)
        self._images = images
        self._graph = graph
        self._runs = runs

    def gradients(self, targets: Targets) -> Tensor:
        if self._graph is None:
            raise RuntimeError(f"layer '{self.layer}' was passed without recording gradients")
        return self._graph.gradients(targets)

    def reference(self, features: Tensor) -> Reference:
        raise RuntimeError(f"DeepLIFT multipliers need a captured network, but {self.session.reason}")

    def multipliers(self, targets: Targets, reference: Reference) -> Tensor:
        raise RuntimeError(f"DeepLIFT multipliers need a captured network, but {self.session.reason}")

    def head(self, features: Tensor, rows: Tensor) -> Any:
        """By a whole pass on the images of `rows`; of a layer that runs several times the last output is replaced."""
        run = 0

        def replace(result: Tensor) -> Tensor:
            nonlocal run
            run += 1
            return features.to(result.dtype).clone() if run == self._runs else result

        return detached(self.session._run(self._images.index_select(0, rows), replace))


def check_batched(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError where the model does not take `images` for a batch but does take them for one of it."""
    if not _is_batch(model, images):
        _raise_if_one_image(model, images)


def check_channels(model: nn.Module, images: Tensor, reason: str) -> None:
    """Raise ValueError where `reason`, why the model does not run, is a convolution of other channels than `images`."""
    found = re.search(r"to have (\d+) channels, but got (\d+) channels", reason)
    if found is None or int(found[2]) != images.shape[1]:
        return
    _raise_if_one_image(model, images)
    expected = int(found[1])
    cure = f"pass images with {expected}"
    if images.shape[-1] == expected:
        cure = f"pass images.movedim(-1, 1) if the channels are last in {tuple(images.shape)}"
    raise ValueError(
        f"images have {images.shape[1]} channels and {type(model).__name__} takes images with {expected}: {cure}"
    )


def _call(model: nn.Module, images: Tensor, given: Tensor) -> Any:
    """The output for `images`, some of those that were `given`."""
    try:
        return model(images.clone())
    except Exception as error:
        _raise_if_one_image(model, given)
        check_channels(model, given, str(error))
        raise


def _raise_if_one_image(model: nn.Module, images: Tensor) -> None:
    if not _is_batch(model, images.unsqueeze(0)):
        return
    shape = tuple(images.shape)
    raise ValueError(
        f"images must be a batch: {type(model).__name__} runs on shape {(1, *shape)}, not on {shape}; "
        "pass images.unsqueeze(0)"
    )


def _is_batch(model: nn.Module, images: Tensor) -> bool:
    """Whether the model gives something for each of `images`: what their axes are is known to it alone, and
    convolutions also run on one image."""
    with exclusive, neutral_modes(), evaluating(model), keeping_buffers(model):
        try:
            leaves = torch.utils._pytree.tree_leaves(model(images.clone()))
        except Exception:
            return False
    return any(isinstance(leaf, Tensor) and leaf.shape[:1] == images.shape[:1] for leaf in leaves)


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
        _call(model, images[:1], images)
    if not seen:
        raise ValueError("the model has no spatial feature map; pass layer= (and reshape_transform= for tokens)")
    return seen[-1]
