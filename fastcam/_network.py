"""A user's model at a layer: what every explainer stands on."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastcam.methods._method import MethodOptions
from fastcam.program.capture import CaptureError, Program, capture
from fastcam.program.forward import Backward, Needs, Session
from fastcam.program.hooks import check_batched, check_channels, hook_session
from fastcam.program.layers import LayerNotInProgram, check_spatial, find_layer, layer_names, layer_of
from fastcam.program.session import Bindings
from fastcam.program.state import exclusive, training, unwrap

__all__ = ["Network", "check_images", "nonfinite_message", "warn_if_training"]

log = logging.getLogger("fastcam")

_PRECISIONS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
#: What has been said about each model, so that it is said once.
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class Network:
    """A model at a layer, in a precision and memory layout, with the size and scale of the maps wanted.

    Arguments are those of `fastcam.Explainer`. Keeps what is bound to the model between calls.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | nn.Module | None,
        size: str | Sequence[int],
        normalize: bool,
        precision: str | None,
        channels_last: bool,
        compile: bool,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("a TorchScript model cannot be looked into; pass the torch.nn.Module it was made from")
        if precision is not None and precision not in _PRECISIONS:
            raise ValueError(f"precision must be None or one of {', '.join(_PRECISIONS)}; got {precision!r}")
        self.model = unwrap(model)
        self.normalize = normalize
        self.size = _check_size(size)
        if layer is not None:
            layer_names(self.model, layer)  # an unknown layer is an error now, not at the first call
        self.layer = layer
        self.precision = precision
        self.channels_last = channels_last
        self.compile = compile
        dtype = None if precision is None else _PRECISIONS[precision]
        self._bindings = Bindings(self.model, dtype, channels_last, compile)

    def _network_at(
        self,
        images: torch.Tensor,
        method: str,
        options: MethodOptions,
        needs: Needs,
        *,
        pixels: bool = False,
        start: Callable[[Any, Any, int], int | str | None] | None = None,
        rewrite: Callable[[Program], Program] | None = None,
        arranged: bool = False,
    ) -> Session:
        """The network at the layer: captured where possible, else through a hook.

        method   its name, for errors
        pixels   whether layer=None means the images
        start    chooses the layer that layer=None stands for
        rewrite  what to make of the captured program first
        arranged whether the caller rearranges the layer's output where it is no (B, K, *spatial)
        """
        # Another thread that traces this model swaps its parameters for stand-ins meanwhile.
        with exclusive:
            parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
            _check_match(images, parameter, self.precision)
            own = parameter.dtype if parameter is not None else images.dtype
            try:
                program = capture(self.model, images.to(own))
                if rewrite is not None:
                    program = rewrite(program)
                layer: Any = self.layer
                if layer is None and start is not None:
                    layer = start(program, self.model, images.ndim - 2)
                if layer is None and pixels:
                    feature, name = program.input, "input"
                elif isinstance(layer, int):
                    feature, name = layer, layer_of(program, layer)
                else:
                    reshaped = arranged or options.reshape_transform is not None
                    feature, name = find_layer(program, self.model, layer, images.ndim - 2, reshaped)
                shape = program.nodes[feature].shape
                if shape is not None and len(shape) == 2 and options.reshape_transform is None:
                    check_spatial(shape, name, images.ndim - 2, False)  # before anything takes it for a feature map
            except (CaptureError, LayerNotInProgram) as reason:
                return self._hooked(images, method, needs, pixels, start, str(reason))
            # Folding norms into convolutions would take away the biases a method asks for.
            walked = isinstance(needs, Backward)
            fold = isinstance(needs, Backward) and needs.folded
            foldable = fold or (needs != "biases" and not walked)
            return self._bindings.session(program, feature, name, own, foldable, fold, wide=walked)

    def _hooked(
        self,
        images: torch.Tensor,
        method: str,
        needs: Needs,
        pixels: bool,
        start: Callable[[Any, Any, int], int | str | None] | None,
        reason: str,
    ) -> Session:
        check_channels(self.model, images, reason)
        captured = isinstance(needs, Backward) or needs in ("multipliers", "parts") or pixels
        unmet = [
            text
            for text, asked in (
                (f"precision={self.precision!r}", self.precision is not None),
                ("channels_last=True", self.channels_last),
                ("compile=True", self.compile),
                (f"method '{method}'", captured),
            )
            if asked
        ]
        if unmet:
            check_batched(self.model, images)
            raise CaptureError(
                f"{' and '.join(unmet)} needs a captured network, but {reason}; "
                "methods by gradients at a layer, like 'grad_cam', do without"
            )
        if _first_time(self.model, reason):
            log.warning("%s is explained through a forward hook: %s", type(self.model).__name__, reason)
        layer: Any = self.layer
        if layer is None and start is not None:
            layer = start(None, self.model, images.ndim - 2)
        return hook_session(self.model, layer, images, reason)

    def _map_size(self, spatial: Sequence[int], features: torch.Tensor, layer: str) -> tuple[int, ...] | None:
        if math.prod(features.shape[2:]) == 1 and self.normalize:
            raise ValueError(
                f"layer '{layer}' has a single position, whose min-max scaled map says nothing; "
                "choose a layer with spatial extent, or pass normalize=False"
            )
        if self.size == "layer":
            return None
        if self.size == "input":
            return tuple(spatial)
        size = tuple(int(s) for s in self.size)
        if len(size) != len(spatial):
            raise ValueError(f"size={size} does not fit images with {len(spatial)} spatial dimensions")
        return size


def check_images(images: Any) -> None:
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a torch.Tensor (B, C, *spatial); got {type(images).__name__}")
    if images.layout != torch.strided or images.is_nested:
        kind = "nested" if images.is_nested else str(images.layout)
        cure = "pad or run them one by one" if images.is_nested else "pass images.to_dense()"
        raise TypeError(f"images must be a dense tensor; got a {kind} one: {cure}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, prepared as the model expects; got {images.dtype}")
    if images.ndim not in (3, 4, 5):
        raise ValueError(
            f"images must be (B, C, L), (B, C, H, W) or (B, C, D, H, W); got shape {tuple(images.shape)}"
            + (", is the batch dimension missing?" if images.ndim == 2 else "")
        )
    if 0 in images.shape[1:]:
        raise ValueError(f"images of shape {tuple(images.shape)} hold no pixels")


def _check_match(images: torch.Tensor, parameter: torch.Tensor | None, precision: str | None) -> None:
    if parameter is None:
        return
    if parameter.is_inference():
        raise RuntimeError(
            "the model's parameters were made under torch.inference_mode() and can take part in no gradient; "
            "explain a copy made outside it: copy.deepcopy(model)"
        )
    if parameter.device != images.device:
        raise ValueError(f"images are on {images.device} and the model is on {parameter.device}; move one to the other")
    mixed = precision is not None or torch.is_autocast_enabled(images.device.type)
    if parameter.dtype != images.dtype and not mixed:
        raise TypeError(
            f"images are {images.dtype} and the model's parameters are {parameter.dtype}; "
            "convert the images, or pass precision= to run the network in another precision"
        )


def warn_if_training(model: nn.Module) -> None:
    if training(model) and _first_time(model, "train mode"):
        warnings.warn(
            f"{type(model).__name__} is in train mode; it is explained as in evaluation mode and left as it is",
            stacklevel=3,
        )


def _first_time(model: nn.Module, topic: str) -> bool:
    told = _told.setdefault(model, set())
    first = topic not in told
    told.add(topic)
    return first


def _check_size(size: Any) -> Any:
    if size in ("input", "layer") if isinstance(size, str) else False:
        return size
    several = isinstance(size, (tuple, list)) or (isinstance(size, np.ndarray) and size.ndim == 1)
    numbers = several and all(isinstance(s, (int, np.integer)) and not isinstance(s, bool) for s in size)
    if not numbers or len(size) == 0 or min(size) < 1:
        raise ValueError(f"size must be 'input', 'layer' or positive integers (H, W); got {size!r}")
    return tuple(int(s) for s in size)


def nonfinite_message(
    valid: torch.Tensor,
    images: torch.Tensor,
    features: torch.Tensor,
    output: Any,
    layer: str,
    method: str,
    model: nn.Module,
) -> str:
    image = int((~valid).nonzero()[0])
    count = int((~valid).sum())
    if not bool(features[image].isfinite().all()):
        what = f"the features of layer '{layer}' are"
    elif isinstance(output, torch.Tensor) and not bool(output[image].isfinite().all()):
        what = "the model's output is"
    elif not bool(images[image].isfinite().all()):
        what = "the image is"
    else:
        what = f"the {method} map at layer '{layer}' is"
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    flawed = next((name for name, t in named if t.is_floating_point() and not bool(t.isfinite().all())), None)
    cure = "check the images and weights for NaN, infinity or overflow"
    if flawed is not None:
        cure = f"the model's '{flawed}' holds NaN or infinity: repair it"
    return (
        f"{what} not finite for image {image} ({count} of {len(valid)} images affected); "
        f"{cure}, or pass on_nonfinite='mask' to get zeros there"
    )
