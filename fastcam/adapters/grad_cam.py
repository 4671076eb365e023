"""pytorch-grad-cam's classes, computed by fastcam.

    from fastcam.adapters.grad_cam import GradCAM                 # was: from pytorch_grad_cam import GradCAM

Constructors, calls, targets and results are pytorch-grad-cam 1.5.7's: `cam(input_tensor, targets)` gives a float32
array (B, H, W) in [0, 1], scaled at layer size, resized and scaled again, the mean over several target layers. The
classes are subclasses of the peer's. `cam(..., return_tensor=True)` leaves the maps on the device. Names that are not
here are the peer's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastcam.explainer import Attribution, Explainer, at_layers
from fastcam.methods._maps import min_max, resized
from fastcam.program.layers import SeveralOutputs
from fastcam.program.targets import TargetSpec, class_scores

from ._peer import Handover, fallback, needing, replaced, untouched

with needing("grad-cam"):
    import pytorch_grad_cam as _peer
    import ttach
    from pytorch_grad_cam.base_cam import BaseCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

__all__ = [
    "AFMI",
    "ISCAM",
    "LRP",
    "SSCAM",
    "AblationCAM",
    "AttributionEquilibrium",
    "DeepLift",
    "EigenCAM",
    "EigenGradCAM",
    "FullGrad",
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "LiftCAM",
    "RelevanceCAM",
    "ScoreCAM",
    "ShapCAM",
    "SmoothGradCAMPlusPlus",
    "XGradCAM",
]  # fmt: skip

_EPSILON = 1e-7
_SMOOTHING = "forward_augmentation_smoothing"


class _Hooks:
    """Stands for `activations_and_grads`: hooks live only while the peer's own code asks for them."""

    def __init__(self, cam: Any, made: Any = None):
        self._cam = cam
        self._made = made

    def __call__(self, images: Tensor) -> Any:
        if self._made is None:
            cam = self._cam
            made = _peer.ActivationsAndGradients
            self._made = made(cam.model, cam.target_layers, cam.reshape_transform, cam.detach)
        return self._made(images)

    @property
    def activations(self) -> list[Tensor]:
        return [] if self._made is None else self._made.activations

    @property
    def gradients(self) -> list[Tensor]:
        return [] if self._made is None else self._made.gradients

    def release(self) -> None:
        if self._made is not None:
            self._made.release()
            self._made = None

    clear = release


class _Cam:
    """The peer's interface over `fastcam.Explainer`.

    model              any module; left as it is
    target_layers      modules; maps of several are scaled, resized and averaged
    reshape_transform  turns a layer's output into (B, K, *spatial)
    options            of the fastcam method, `mean=` and `std=` included, for classes pytorch-grad-cam does not have

    Overriding a method of the peer's works as there and runs the peer's code, with one log line.
    """

    method: ClassVar[str]
    fixed: ClassVar[dict[str, Any]] = {}
    gradients: ClassVar[bool] = True
    pixels: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        tta_transforms: Iterable[Any] | None = None,
        **options: Any,
    ):
        self.model = model
        self.target_layers = list(target_layers)
        self.reshape_transform = reshape_transform
        first = next(model.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.uses_gradients = self.gradients
        self.compute_input_gradient = False
        self.detach = True
        self.outputs: Any = None
        self.activations_and_grads = _Hooks(self)
        self.tta_transforms = _augmentations() if tta_transforms is None else tta_transforms
        self._options = options
        self._hand_over = Handover(type(self).__name__)
        self._made: tuple[Any, list[Explainer]] | None = None
        self._left = ""  # why the layers are the peer's
        self._explainers(False)  # an unknown layer or option is an error now

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Any], Tensor]] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
        *,
        return_tensor: bool = False,
    ) -> Any:
        """Maps (B, H, W), float32 in [0, 1]: an array, or a tensor on the model's device."""
        if not aug_smooth:
            maps = self._maps(input_tensor, targets, eigen_smooth)
        elif replaced(self, _Cam, (_SMOOTHING,)):
            maps = torch.as_tensor(self.forward_augmentation_smoothing(input_tensor, targets, eigen_smooth))
            maps = maps.to(self.device)
        else:
            maps = self._augmented(input_tensor, targets, eigen_smooth)
        return maps if return_tensor else maps.cpu().numpy()

    def forward(
        self, input_tensor: Tensor, targets: Sequence[Callable[[Any], Tensor]] | None, eigen_smooth: bool = False
    ) -> Any:
        """What an overriding `forward` finds as its super's."""
        return self._maps(input_tensor, targets, eigen_smooth, within_forward=True).cpu().numpy()

    def forward_augmentation_smoothing(self, input_tensor: Tensor, targets: Any, eigen_smooth: bool = False) -> Any:
        return self._augmented(input_tensor, targets, eigen_smooth).cpu().numpy()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.activations_and_grads.release()

    def __del__(self) -> None:
        if "activations_and_grads" in vars(self):
            self.activations_and_grads.release()

    def _augmented(self, images: Tensor, targets: Any, eigen_smooth: bool) -> Tensor:
        smooth = []
        for transform in self.tta_transforms:
            one = self._maps(transform.augment_image(images), targets, eigen_smooth)
            smooth.append(transform.deaugment_mask(one.unsqueeze(1)).squeeze(1))
        return torch.stack(smooth).mean(0)

    def _maps(self, images: Tensor, targets: Any, eigen_smooth: bool, within_forward: bool = False) -> Tensor:
        images = images.to(self.device)
        _check_count(targets, len(images))
        adapter = next(c for c in type(self).__mro__ if c.__module__ == __name__)
        own = [name for name in replaced(self, adapter, _methods(adapter)) if name != "forward" or not within_forward]
        if not isinstance(self.activations_and_grads, _Hooks):
            own.append("activations_and_grads")
        overridden = f"{', '.join(own)} {'is' if len(own) == 1 else 'are'} overridden" if own else ""
        reason = overridden or self._uncovered(eigen_smooth)
        if reason:
            self._hand_over(reason)
            return self._by_peer(images, targets, eigen_smooth, "forward" in own)
        try:
            found = at_layers(self._explainers(eigen_smooth), images, _spec(targets))
        except SeveralOutputs as error:
            if self.reshape_transform is None or adapter not in REPLACES.values():
                raise
            self._left = str(error)  # which the peer hands to the transform, as detectors' pyramids need it
            return self._maps(images, targets, eigen_smooth, within_forward)
        self.outputs = found[0].scores
        return self._scaled(found, images.shape[2:])

    def _uncovered(self, eigen_smooth: bool) -> str:
        """Why a call is the peer's to answer, or nothing."""
        return self._left

    def _scaled(self, found: list[Attribution], size: Sequence[int]) -> Tensor:
        layers = [resized(min_max(one.raw.clamp(min=0), _EPSILON), size) for one in found]
        return min_max(torch.stack(layers).mean(0), _EPSILON).float()

    def _explainers(self, eigen_smooth: bool) -> list[Explainer]:
        """One for each layer, kept until what they are made of changes."""
        options = self._method_options()
        if eigen_smooth and not self.pixels:
            options["eigen_smooth"] = True
        layers: list[Any] = self.target_layers
        if self.pixels and not layers:
            layers = [None]
        if not layers:
            raise ValueError(f"{type(self).__name__} needs at least one target layer; target_layers is empty")
        key = (tuple(map(id, layers)), self.reshape_transform, sorted(options.items(), key=str))
        if self._made is None or self._made[0] != key:
            shared = {"size": "layer", "normalize": False, "reshape_transform": self.reshape_transform, **options}
            self._made = key, [Explainer(self.model, self.method, layer=one, **shared) for one in layers]
        return self._made[1]

    def _method_options(self) -> dict[str, Any]:
        return self.fixed | self._options

    def _by_peer(self, images: Tensor, targets: Any, eigen_smooth: bool, overriding: bool) -> Tensor:
        """The peer's numpy path, or the user's forward, with the peer's hooks for the time of this call."""
        forward: Any = self.forward if overriding else super().forward  # type: ignore[misc]
        with untouched(self.model):
            try:
                maps = forward(images, targets, eigen_smooth)
            finally:
                if isinstance(self.activations_and_grads, _Hooks):  # others are the user's
                    self.activations_and_grads.release()
        self.outputs = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, self.outputs)
        return torch.as_tensor(maps, device=self.device)


@functools.cache
def _methods(adapter: type) -> tuple[str, ...]:
    """Names of what the peer's own code would call and a user may override."""
    theirs = [vars(c) for c in adapter.__mro__ if c.__module__.partition(".")[0] == _peer.__name__]
    names = {name for methods in theirs for name, found in methods.items() if callable(found)}
    return tuple(sorted(name for name in names if not name.startswith("__") and name != _SMOOTHING))


def _augmentations() -> Any:
    return ttach.Compose([ttach.HorizontalFlip(), ttach.Multiply(factors=[0.9, 1, 1.1])])


def _check_count(targets: Any, batch: int) -> None:
    if targets is not None and len(targets) != batch:
        raise ValueError(f"{len(targets)} targets were given for a batch of {batch} images; pass one for each image")


def _spec(targets: Any) -> TargetSpec:
    """The peer's list of callables as fastcam takes targets: classes where they are classes."""
    if targets is None:
        return None
    categories = [t.category for t in targets if type(t) is ClassifierOutputTarget]
    if len(categories) == len(targets) and all(isinstance(c, Integral) and int(c) >= 0 for c in categories):
        return torch.tensor([int(c) for c in categories])

    def score(output: Any) -> Tensor:
        rows = output if isinstance(output, (Tensor, list, tuple)) else class_scores(output)
        return torch.stack([_scalar(target(row)) for target, row in zip(targets, rows, strict=True)])

    return score


def _scalar(score: Tensor) -> Tensor:
    if score.numel() != 1:
        raise RuntimeError(
            f"a target must give one score for its image; one gave a tensor of shape {tuple(score.shape)}"
        )
    return score.reshape(())


class _Unweighted(_Cam):
    """`eigen_smooth` has no effect on these, as in the peer."""

    def _explainers(self, eigen_smooth: bool) -> list[Explainer]:
        return super()._explainers(False)


class _Perturbing(_Cam):
    gradients = False

    def _method_options(self) -> dict[str, Any]:
        chunk = getattr(self, "batch_size", None)
        return super()._method_options() | ({} if chunk is None else {"chunk": chunk})


class GradCAM(_Cam, _peer.GradCAM):
    method = "grad_cam"


class HiResCAM(_Cam, _peer.HiResCAM):
    method = "hires_cam"


class GradCAMPlusPlus(_Cam, _peer.GradCAMPlusPlus):
    """With the peer's 1e-6 in its denominators."""

    method = "grad_cam_pp"
    fixed: ClassVar[dict[str, Any]] = {"epsilon": 1e-6}


class XGradCAM(_Cam, _peer.XGradCAM):
    """With the peer's 1e-7 added to each channel's sum."""

    method = "xgrad_cam"
    fixed: ClassVar[dict[str, Any]] = {"epsilon": 1e-7}


class LayerCAM(_Cam, _peer.LayerCAM):
    method = "layer_cam"


class EigenCAM(_Unweighted, _peer.EigenCAM):
    method = "eigen_cam"
    gradients = False


class EigenGradCAM(_Unweighted, _peer.EigenGradCAM):
    method = "eigen_grad_cam"


class ScoreCAM(_Perturbing, _peer.ScoreCAM):
    """With the peer's resize of masks (align_corners=True); `batch_size` may be assigned after construction."""

    method = "score_cam"
    fixed: ClassVar[dict[str, Any]] = {"align_corners": True}


class AblationCAM(_Perturbing, _peer.AblationCAM):
    """Ablated channels are zero (P11), drops are divided by the score's magnitude (P12)."""

    method = "ablation_cam"
    fixed: ClassVar[dict[str, Any]] = {"divide": True}

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        ablation_layer: nn.Module | None = None,
        batch_size: int = 32,
        ratio_channels_to_ablate: float = 1.0,
    ):
        if ratio_channels_to_ablate != 1.0:
            raise ValueError(
                f"AblationCAM ablates all channels; ratio_channels_to_ablate={ratio_channels_to_ablate!r} needs "
                "pytorch_grad_cam.AblationCAM"
            )
        if ablation_layer is not None and type(ablation_layer) not in (_peer.AblationLayer, _peer.AblationLayerVit):
            raise ValueError(
                f"AblationCAM knows feature maps and tokens; ablation_layer={type(ablation_layer).__name__} needs "
                "pytorch_grad_cam.AblationCAM"
            )
        self.batch_size = batch_size
        super().__init__(model, target_layers, reshape_transform)
        self.ablation_layer = _peer.AblationLayer() if ablation_layer is None else ablation_layer
        self.ratio_channels_to_ablate = ratio_channels_to_ablate


class FullGrad(_Cam, _peer.FullGrad):
    """Target layers are ignored, as in the peer: every bias counts."""

    method = "full_grad"
    fixed: ClassVar[dict[str, Any]] = {"postprocess": "per_channel"}
    pixels = True

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] = (),
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(model, (), reshape_transform)

    def _uncovered(self, eigen_smooth: bool) -> str:
        within = "bias_data" in vars(self)  # of the peer's own run, whose hooks the network wears
        if eigen_smooth or within:
            return "eigen_smooth of FullGrad" if eigen_smooth else "FullGrad within an overriding forward"
        return super()._uncovered(eigen_smooth)

    def _by_peer(self, images: Tensor, targets: Any, eigen_smooth: bool, overriding: bool) -> Tensor:
        kept = dict(vars(self))
        try:
            with untouched(self.model):
                _peer.FullGrad.__init__(self, self.model, [], self.reshape_transform)  # its layers, biases and hooks
                self.activations_and_grads = _Hooks(self, self.activations_and_grads)
                return super()._by_peer(images, targets, eigen_smooth, overriding)
        finally:
            self.__dict__ = kept | {"outputs": self.outputs}

    def _scaled(self, found: list[Attribution], size: Sequence[int]) -> Tensor:
        return min_max(found[0].raw, _EPSILON).float()


# --- methods the peer does not have, behind its interface ---


class LiftCAM(_Cam, BaseCAM):
    method = "lift_cam"


class AFMI(_Cam, BaseCAM):
    method = "a_fmi"


class ShapCAM(_Cam, BaseCAM):
    method = "shap_cam"


class SmoothGradCAMPlusPlus(_Cam, BaseCAM):
    method = "smooth_grad_cam_pp"


class SSCAM(_Perturbing, BaseCAM):
    method = "ss_cam"


class ISCAM(_Perturbing, BaseCAM):
    method = "is_cam"


class RelevanceCAM(_Cam, BaseCAM):
    method = "relevance_cam"


class AttributionEquilibrium(_Cam, BaseCAM):
    """Positive part of the pixel map; a target layer says where it starts, none: the last feature map."""

    method = "attribution_equilibrium"
    pixels = True


class LRP(_Cam, BaseCAM):
    """Positive part of the relevance map, at the pixels or at the target layers."""

    method = "lrp"
    pixels = True


class DeepLift(_Cam, BaseCAM):
    """Positive part of the contributions, at the pixels or at the target layers."""

    method = "deep_lift"
    pixels = True


#: What `fastcam.adapters.accelerate("pytorch_grad_cam")` replaces.
REPLACES: dict[Any, Any] = {
    getattr(_peer, ours.__name__): ours
    for ours in (
        *(GradCAM, HiResCAM, GradCAMPlusPlus, XGradCAM, LayerCAM, EigenCAM, EigenGradCAM, ScoreCAM),
        *(AblationCAM, FullGrad),
    )
}


def __getattr__(name: str) -> Any:
    return fallback(name, _peer, __name__)
