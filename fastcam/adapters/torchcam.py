"""TorchCAM's extractors, with fastcam's formulas and a one-call fast path.

    from fastcam.adapters.torchcam import LayerCAM                # was: from torchcam.methods import LayerCAM

    with LayerCAM(model, "layer4") as extractor:
        scores = model(images)                                    # the protocol: your own forward, then the extractor
        cams = extractor(class_idx, scores)
        cams = extractor.run(images, class_idx)                   # the same maps without a graph, in one call

Names, arguments, errors, hooks and `fuse_cams` are TorchCAM 0.5.0's; the classes are subclasses of its own. Where the
user runs the forward there is little left to save but for the Score-CAM family, which runs in fastcam; `run` takes
fastcam's whole way. Grad-CAM++ follows its paper (T1), a flat map is zeros in every dtype (T2), Smooth Grad-CAM++
averages over its samples (T3), and an in-place operator behind the layer changes nothing (T4). Names that are not here
are TorchCAM's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastcam import ops
from fastcam.explainer import Attribution, Explainer, at_layers
from fastcam.methods._maps import min_max, planar
from fastcam.program.state import exclusive
from fastcam.program.targets import TargetSpec

from ._peer import fallback, needing

with needing("torchcam"):
    from torchcam import methods as _peer
    from torchcam.methods.core import _target_scores

__all__ = ["CAM", "ISCAM", "SSCAM", "GradCAM", "GradCAMpp", "LayerCAM", "ScoreCAM", "SmoothGradCAMpp", "XGradCAM"]

_EPSILON = 1e-8


class _Extractor:
    """What the adapters add to a TorchCAM extractor: `run`, and the repairs T2 and T4."""

    method: ClassVar[str]
    model: nn.Module
    target_names: list[str]
    hook_handles: list[Any]
    _hooks_enabled: bool
    _relu: bool

    def run(
        self, images: Tensor, class_idx: int | list[int] | None = None, normalized: bool = True, *, targets: Any = None
    ) -> list[Tensor]:
        """Maps (N, h, w) of each target layer, as the extractor gives after a forward pass on `images`.

        One pass of fastcam: no graph below the first target layer, none at all on heads with a closed form. Hooks and
        what they have stored stay as they are. The scores are in `last.scores`.
        """
        _check_targets(class_idx, targets, len(images))
        found = self._attributions(images, class_idx, targets)
        return [self._normalize(one.raw, one.raw.ndim - 1) if normalized else one.raw for one in found]

    def _method_options(self) -> dict[str, Any]:
        return {}

    def _attributions(self, images: Tensor, class_idx: Any, targets: Any) -> list[Attribution]:
        options = {"relu": self._relu, "reshape_transform": self._reshape_transform, **self._method_options()}  # type: ignore[attr-defined]
        key = (tuple(self.target_names), tuple(options.items()))
        kept = vars(self).get("_fastcam")
        if kept is None or kept[0] != key:
            shared = {"size": "layer", "normalize": False, **options}
            made = [Explainer(self.model, self.method, layer=name, **shared) for name in self.target_names]
            kept = vars(self)["_fastcam"] = key, made
        with self._unhooked():
            found = at_layers(kept[1], images, _spec(class_idx, targets))
        self.last = found[0]
        return found

    @contextlib.contextmanager
    def _unhooked(self) -> Iterator[None]:
        """This extractor's own hooks are off the modules: a network with hooks cannot be captured."""
        with exclusive:
            holders = [handle.hooks_dict_ref() for handle in self.hook_handles]
            kept = [(holder, list(holder.items())) for holder in holders if holder is not None]
            try:
                for handle in self.hook_handles:
                    holder = handle.hooks_dict_ref()
                    if holder is not None:
                        holder.pop(handle.id, None)
                yield
            finally:
                for holder, items in kept:
                    holder.clear()
                    holder.update(items)

    @staticmethod
    @torch.no_grad()
    def _normalize(cams: Tensor, spatial_dims: int | None = None, eps: float = _EPSILON) -> Tensor:
        rank = cams.ndim - 1 if spatial_dims is None else spatial_dims
        return min_max(cams.flatten(0, -rank - 1), eps).reshape(cams.shape)


class _Activations(_Extractor):
    def _hook_a(self, module: nn.Module, inputs: tuple[Any, ...], output: Any, idx: int = 0) -> Any:
        super()._hook_a(module, inputs, output, idx)  # type: ignore[misc]
        return output.clone() if self._hooks_enabled and isinstance(output, Tensor) else None


class _Gradients(_Extractor):
    def _hook_g(self, module: nn.Module, inputs: tuple[Any, ...], output: Any, idx: int = 0) -> Any:
        super()._hook_g(module, inputs, output, idx)  # type: ignore[misc]
        return output.clone() if self._hooks_enabled and isinstance(output, Tensor) else None


class _Perturbing(_Activations):
    """The Score-CAM family: weights by fastcam, whoever ran the forward."""

    bs: int
    _input: Tensor

    def _method_options(self) -> dict[str, Any]:
        return {"chunk": self.bs, "order": "minmax_then_resize"}

    def _get_weights(self, class_idx: Any, *_: Any, targets: Any = None) -> list[Tensor]:
        return [one.weights for one in self._attributions(self._input, class_idx, targets)]


class CAM(_Activations, _peer.CAM):
    method = "cam"


class GradCAM(_Gradients, _peer.GradCAM):
    method = "grad_cam"


class GradCAMpp(_Gradients, _peer.GradCAMpp):
    """Equation 19 of the paper, without an eps (T1)."""

    method = "grad_cam_pp"

    def _get_weights(self, class_idx: Any, scores: Any, **kwargs: Any) -> list[Tensor]:
        self._backprop(scores, class_idx, **kwargs)
        pairs = zip(self.hook_a, self.hook_g, strict=True)
        planes = [(planar(a, a.ndim - 2), planar(g, a.ndim - 2)) for a, g in pairs]
        return [ops.channel_weights(a, g.to(a.dtype), mode="grad_cam_pp").to(a.dtype) for a, g in planes]


class SmoothGradCAMpp(_Gradients, _peer.SmoothGradCAMpp):
    """All samples count (T3), and all images see the same noise, drawn from a seed rather than from torch's state."""

    method = "smooth_grad_cam_pp"

    def _method_options(self) -> dict[str, Any]:
        return {"n": self.num_samples, "noise_std": self.std}

    def _get_weights(self, class_idx: Any, *_: Any, targets: Any = None, **kwargs: Any) -> list[Tensor]:
        return [one.weights for one in self._attributions(self._input, class_idx, targets)]


class XGradCAM(_Gradients, _peer.XGradCAM):
    method = "xgrad_cam"

    def _method_options(self) -> dict[str, Any]:
        return {"epsilon": _EPSILON}


class LayerCAM(_Gradients, _peer.LayerCAM):
    method = "layer_cam"


class ScoreCAM(_Perturbing, _peer.ScoreCAM):
    method = "score_cam"


class SSCAM(_Perturbing, _peer.SSCAM):
    """All images and maps see the same noise, drawn from a seed rather than from torch's state."""

    method = "ss_cam"

    def _method_options(self) -> dict[str, Any]:
        return super()._method_options() | {"n": self.num_samples, "noise_std": self.std}


class ISCAM(_Perturbing, _peer.ISCAM):
    method = "is_cam"

    def _method_options(self) -> dict[str, Any]:
        return super()._method_options() | {"n": self.num_samples}


def _check_targets(class_idx: Any, targets: Any, batch: int) -> None:
    if (class_idx is None) == (targets is None):
        raise ValueError("provide exactly one of class_idx or targets")
    if isinstance(class_idx, list) and len(class_idx) != batch:
        raise ValueError("expected batch size and length of `class_idx` to be the same.")
    several = class_idx if isinstance(class_idx, list) else [class_idx]
    if targets is None and any(not isinstance(one, int) or one < 0 for one in several):
        raise ValueError("Incorrect `class_idx` argument value")


def _spec(class_idx: Any, targets: Any) -> TargetSpec:
    if targets is None:
        return class_idx
    score: Callable[[Any], Tensor] = lambda output: _target_scores(output, targets)  # noqa: E731
    return score


#: What `fastcam.adapters.accelerate("torchcam")` replaces.
REPLACES: dict[Any, Any] = {
    getattr(_peer, ours.__name__): ours
    for ours in (CAM, GradCAM, GradCAMpp, SmoothGradCAMpp, XGradCAM, LayerCAM, ScoreCAM, SSCAM, ISCAM)
}


def __getattr__(name: str) -> Any:
    return fallback(name, _peer, __name__)
