"""The same methods in the packages people use otherwise, called the way their documentation does.

A peer gets its own copy of the model, since some leave hooks on it, and runs in float32. Its maps are brought to our
size and scale outside the clock, to be compared; what it does not do itself (a resize, scaling) it gets for free.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcam._testing.models import torchvision_models
from fastcam.methods._method import Pixels
from fastcam.methods._references import reference_images

__all__ = ["PACKAGES", "Job", "PeerCall", "comparable", "peer_calls"]


@dataclass(frozen=True)
class Job:
    """What a peer is asked for: maps of `images` (B, C, H, W) for classes `targets` (B,) at module `layer`."""

    model: nn.Module
    method: str
    layer: str | None
    images: Tensor
    targets: Tensor

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.layer or "")


@dataclass(frozen=True)
class PeerCall:
    """A peer that covers the method: `call` gives maps; or why it cannot run, with the cure."""

    peer: str
    call: Callable[[], Tensor] | None
    reason: str = ""


def _grad_cam(job: Job) -> Callable[[], Tensor]:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    extractor = getattr(pytorch_grad_cam, GRAD_CAM[job.method])(model=job.model, target_layers=[job.module])
    goals = [ClassifierOutputTarget(int(target)) for target in job.targets]
    return lambda: torch.from_numpy(extractor(input_tensor=job.images, targets=goals))


def _torchcam(job: Job) -> Callable[[], Tensor]:
    import torchcam.methods

    shape = tuple(job.images.shape[1:])
    make = getattr(torchcam.methods, TORCHCAM[job.method])
    extractor = make(job.model, job.layer, input_shape=shape, enable_hooks=False)
    targets = job.targets.tolist()

    def call() -> Tensor:
        extractor.enable_hooks()
        try:
            found: Tensor = extractor(targets, job.model(job.images))[0]
            return found
        finally:
            extractor.disable_hooks()

    return call


def _captum(job: Job) -> Callable[[], Tensor]:
    from captum import attr

    name = CAPTUM[job.method]
    if name == "LayerGradCam":
        layer = attr.LayerGradCam(job.model, job.module)
        return lambda: layer.attribute(job.images, target=job.targets, relu_attributions=True)[:, 0]
    if name == "LayerGradientXActivation":
        product = attr.LayerGradientXActivation(job.model, job.module)
        return lambda: product.attribute(job.images, target=job.targets).sum(1).relu()
    method = getattr(attr, name)(job.model)
    options = {}
    if name == "DeepLift":
        options["baselines"] = reference_images("black", job.images, Pixels(), 0).expand_as(job.images)
    return lambda: method.attribute(job.images, target=job.targets, **options).sum(1)


def _zennit(job: Job) -> Callable[[], Tensor]:
    from zennit.attribution import Gradient
    from zennit.composites import COMPOSITES
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    kind = type(job.model).__name__
    canonizers = {"ResNet": [ResNetCanonizer()], "VGG": [VGGCanonizer()]}.get(kind, []) if job.method == "lrp" else []
    attributor = Gradient(job.model, COMPOSITES[ZENNIT[job.method]](canonizers=canonizers))
    with torch.no_grad():
        classes = job.model(job.images[:1]).shape[1]
    seeds = torch.eye(classes, device=job.images.device)[job.targets]

    def call() -> Tensor:
        with attributor:
            found: Tensor = attributor(job.images.clone(), seeds)[1].sum(1)
        return found

    return call


GRAD_CAM = {
    "grad_cam": "GradCAM", "grad_cam_pp": "GradCAMPlusPlus", "xgrad_cam": "XGradCAM", "hires_cam": "HiResCAM",
    "layer_cam": "LayerCAM", "eigen_cam": "EigenCAM", "eigen_grad_cam": "EigenGradCAM", "score_cam": "ScoreCAM",
    "ablation_cam": "AblationCAM",
}  # fmt: skip
TORCHCAM = {
    "cam": "CAM", "grad_cam": "GradCAM", "grad_cam_pp": "GradCAMpp", "xgrad_cam": "XGradCAM", "layer_cam": "LayerCAM",
    "score_cam": "ScoreCAM",
}  # fmt: skip
CAPTUM = {
    "grad_cam": "LayerGradCam", "hires_cam": "LayerGradientXActivation", "deep_lift": "DeepLift",
    "guided_backprop": "GuidedBackprop", "deconvnet": "Deconvolution",
}  # fmt: skip
ZENNIT = {"lrp": "epsilon_plus_flat", "guided_backprop": "guided_backprop", "deconvnet": "deconvnet"}

#: Package as pip knows it -> (module, methods it covers, how it is called).
PACKAGES: dict[str, tuple[str, dict[str, str], Callable[[Job], Callable[[], Tensor]]]] = {
    "grad-cam": ("pytorch_grad_cam", GRAD_CAM, _grad_cam),
    "torchcam": ("torchcam", TORCHCAM, _torchcam),
    "captum": ("captum", CAPTUM, _captum),
    "zennit": ("zennit", ZENNIT, _zennit),
}


def peer_calls(job: Job) -> Iterator[PeerCall]:
    """Every peer that covers `job.method`, on a copy of the model of its own."""
    for package, (module, covered, build) in PACKAGES.items():
        if job.method not in covered:
            continue
        try:
            _importable(module)
        except ImportError as error:
            yield PeerCall(package, None, f"{package} is not installed ({error}); pip install --no-deps {package}")
            continue
        try:
            own = Job(copy.deepcopy(job.model), job.method, job.layer, job.images, job.targets)
            yield PeerCall(package, build(own))
        except Exception as error:  # whatever a peer cannot do with this model, ours are measured
            yield PeerCall(package, None, f"{package} cannot run {job.method} on this model: {_line(error)}")


def comparable(found: Tensor, expected: Tensor) -> Tensor:
    """A peer's maps at the size and scale of ours: resized bilinearly, then min-max, or by the largest magnitude where
    ours are signed."""
    maps = found.detach().to(expected).reshape(len(expected), *found.shape[-2:])
    if maps.shape != expected.shape:
        maps = functional.interpolate(maps[:, None], size=expected.shape[1:], mode="bilinear")[:, 0]
    if bool(expected.min() < 0):
        return maps / maps.abs().amax((1, 2), keepdim=True)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low)).nan_to_num(0.0)


def _importable(module: str) -> None:
    with contextlib.suppress(ImportError):
        torchvision_models()  # peers import torchvision, which may need help beside a CPU-only torch
    importlib.import_module(module)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
