"""The one way in: `attribute` for a call, `Explainer` for many."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastcam._network import Network, check_images, nonfinite_message, warn_if_training
from fastcam._tracing import tracing
from fastcam._watch import stage
from fastcam.methods import single
from fastcam.methods._maps import finish
from fastcam.methods._method import CamOptions, Passage, Pixels
from fastcam.methods.eigen_cam import smoothed
from fastcam.program.forward import Backward, Forward, Session
from fastcam.program.layers import check_spatial
from fastcam.program.session import CapturedSession
from fastcam.program.state import fingerprint, neutral_modes, without_autocast
from fastcam.program.targets import Targets, TargetSpec, check_count, resolve_targets

#: Straight lines kept by one explainer: one for each image size and kind of targets.
_LINES = 8

__all__ = ["Attribution", "Explainer", "at_layers", "attribute"]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attribution maps of a batch of B images, T targets each where several were asked for; h x w is the layer's size.

    maps     (B, H, W) or (B, T, H, W); in [0, 1] where normalised
    raw      (B, h, w) or (B, T, h, w): the map at layer size, after the method's ReLU, before normalisation
    scores   the model's output
    targets  (B,) or (B, T) class indices, or the callable
    weights  (B, K) or (B, T, K) channel coefficients, or None where the method has none
    delta    (B,) or (B, T) completeness residual, sum of contributions minus difference of scores, or None where the
             method has none
    valid    (B,) bool; False where the map was masked because something was not finite or a target did not exist
    layer    name of the layer
    method   name of the method
    options  the method's options as used; "certainty" says what of a method is reconstructed rather than known
    extra    further results of the method by name, described at the method

    All tensors are on the images' device and carry no gradient. Maps are float32, or float64 where the network runs in
    float64.
    """

    maps: torch.Tensor
    raw: torch.Tensor
    scores: Any
    targets: Any
    weights: torch.Tensor | None
    delta: torch.Tensor | None
    valid: torch.Tensor
    layer: str
    method: str
    options: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        shape = ", ".join(str(size) for size in self.maps.shape)
        return f"Attribution(method={self.method!r}, layer={self.layer!r}, maps=({shape}) {self.maps.dtype})"


class Explainer(Network):
    """A method bound to a model; keeps the capture, the head's analysis and converted weights between calls.

        explainer = fastcam.Explainer(model, "lift_cam")
        result = explainer(images)                        # result.maps: (B, H, W)

    model          any module that maps an image batch (B, C, *spatial) to scores; never modified. In train mode it is
                   explained as in evaluation mode, with one warning.
    method         a name from `fastcam.methods()`
    layer          None: the last spatial feature map (the input, for pixel methods) · a dotted module name · a module
    size           "input": the images' size · "layer": the layer's · (H, W)
    normalize      after resizing, min-max scale each map to [0, 1]; signed maps of pixel methods are divided by their
                   largest magnitude, to [-1, 1]. A constant map becomes zeros
    precision      None: the model's own · "bf16", "fp16", "fp32", "fp64": run the network with converted weights;
                   `torch.autocast` around a call has no say
    channels_last  run the network in channels_last layout, with converted weights. Either conversion also folds batch
                   norms into convolutions; scores then equal the model's to rounding, not to the bit
    mean, std      how the images were normalised, one number a channel, for references named in pixels ("black"); None:
                   ImageNet's, where images have three channels
    compile        run trunk and head through `torch.compile`
    differentiable maps, raw, scores, weights and delta keep their graph to the model's parameters, and to images that
                   require gradients, for use inside training (docs/training-with-maps.md). What a method takes for
                   granted - the class explained, the winner of a max pool - is constant
    options        the method's options; an unknown one is an error that lists the known ones

    Raises ValueError or TypeError for an unknown method, option, layer, precision or size.
    Cost: one trace of the network at the first call for an image size (about a second for a ResNet-50), shared by all
    explainers of the model; from then on the forward pass, a pass back through the head where the method needs one and
    the head is not affine, and one fused op. Weights are read from the model at every call.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "lift_cam",
        *,
        layer: str | nn.Module | None = None,
        size: str | Sequence[int] = "input",
        normalize: bool = True,
        precision: str | None = None,
        channels_last: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        compile: bool = False,
        differentiable: bool = False,
        **options: Any,
    ):
        super().__init__(
            model,
            layer=layer,
            size=size,
            normalize=normalize,
            precision=precision,
            channels_last=channels_last,
            compile=compile,
        )
        self.method = single(method)
        self.options = self.method.make_options(options)
        self.pixels = _check_pixels(mean, std)
        self.differentiable = differentiable
        self._lines: dict[Any, tuple[Any, Attribution]] = {}
        self._compiled_lines: dict[str, tuple[Any, dict[str, Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lines": {}, "_compiled_lines": {}}  # made again where it is unpickled

    def __repr__(self) -> str:
        return f"Explainer({type(self.model).__name__}, {self.method.name!r}, layer={self.layer!r})"

    def __call__(self, images: torch.Tensor, targets: TargetSpec = None) -> Attribution:
        """Attribution maps of `images` (B, C, *spatial) for `targets`, documented at `fastcam.attribute`."""
        check_images(images)
        if torch.compiler.is_dynamo_compiling():
            return self._compiled(images, targets)
        warn_if_training(self.model)
        if images.shape[0] == 0:
            return self._empty(images, targets)
        if self.differentiable:
            return self._with_graph(images, targets)
        with neutral_modes():
            # Tensors made under inference_mode cannot take part in a graph; their copies can.
            return self._explain(images.clone() if images.is_inference() else images, targets)

    def _explain(self, images: torch.Tensor, targets: TargetSpec) -> Attribution:
        return self._through(self._session(images), images, targets)

    def _with_graph(self, images: torch.Tensor, targets: TargetSpec) -> Attribution:
        """The attribution by the straight line of operators it comes down to, with the model's own parameters."""
        given = _given(images, targets)
        with without_autocast():
            line, first = self._line(images, targets, given)
            found = dataclasses.replace(first, **self._with_weights(line, images, given))
        behaviour = self.options.on_nonfinite or ("raise" if images.device.type == "cpu" else "mask")
        if behaviour == "raise" and not bool(found.valid.all()):
            wrong = int((~found.valid).nonzero()[0])
            raise ValueError(
                f"the {self.method.name} map or the scores of image {wrong} are not finite, or its target does not "
                "exist; pass on_nonfinite='mask' to get zeros there"
            )
        return found

    def _compiled(self, images: torch.Tensor, targets: TargetSpec) -> Attribution:
        """What `torch.compile` sees of `__call__`: the straight line, made while it traces."""
        from fastcam._straight_line import prepared  # whose imports are heavy

        given = _given(images, targets)
        name = prepared(self, images, None if given else targets, given[0] if given else None)
        line, blank = self._compiled_lines[name]
        with torch.autocast(images.device.type, enabled=False):
            if self.differentiable:
                return Attribution(**(blank | self._with_weights(line, images, given)))
            with torch.no_grad():
                return Attribution(**(blank | line(images, *given)))

    def _with_weights(self, line: nn.Module, images: torch.Tensor, given: tuple[torch.Tensor, ...]) -> dict[str, Any]:
        """What a differentiable line makes of the model's own parameters."""
        weights = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        read = {name: weights[name] for name in line.state_dict() if name in weights}
        found: dict[str, Any] = torch.func.functional_call(line, read, (images, *given))
        return found

    def _inlined(self, images: torch.Tensor, targets: TargetSpec, given: torch.Tensor | None) -> str:
        """Name among `_compiled_lines` of the line for images and targets of this kind. None is ever forgotten, for
        compiled code runs them."""
        if self.options.on_nonfinite == "raise" and not self.differentiable:
            raise ValueError("compiled code cannot raise on numbers; leave on_nonfinite out: it masks")
        if images.shape[0] == 0:  # no number of images is known by a trace without any
            images = images.new_zeros((1, *images.shape[1:]))
            given = None if given is None else given.new_zeros((1, *given.shape[1:]))
        with without_autocast():
            line, first = self._line(images, targets if given is None else given, () if given is None else (given,))
        name = f"line {id(line)}"
        self._compiled_lines[name] = line, {f.name: getattr(first, f.name) for f in dataclasses.fields(first)}
        return name

    def _line(
        self, images: torch.Tensor, targets: TargetSpec, given: tuple[torch.Tensor, ...]
    ) -> tuple[Any, Attribution]:
        """The straight line for images and targets of this kind, and an attribution without its tensors."""
        chosen = given[0].shape[1:] if given else targets
        key = (fingerprint(self.model), images.shape[1:], images.dtype, images.device, chosen)
        if key not in self._lines:
            from fastcam._straight_line import inlined, straight_line  # whose imports are heavy

            with neutral_modes():
                first = self._explain(images.detach().clone(), targets)
            asked = self, images.detach(), targets, first.targets if given else None, _tensors
            made = straight_line(*asked).module() if self.differentiable else inlined(*asked)
            while len(self._lines) >= _LINES:
                del self._lines[next(iter(self._lines))]
            blank: Any = dict.fromkeys(_tensors(first))
            self._lines[key] = made, dataclasses.replace(first, **blank)
        return self._lines[key]

    def _through(self, session: Session, images: torch.Tensor, targets: TargetSpec) -> Attribution:
        """The attribution of `images` by their pass through the network of `session`."""
        by_index = not callable(targets) or isinstance(targets, torch.Tensor)
        needs = self.options.needed(self.method.needs)
        with stage("head"):  # less the trunk, which is a stage inside
            passed = session.forward(images, needs, by_index)
        return self._explained(images, passed, resolve_targets(targets, passed.output, images.shape[0]))

    def _explained(self, images: torch.Tensor, passed: Forward, resolved: Targets) -> Attribution:
        options = self.options
        needs = options.needed(self.method.needs)
        features = passed.features
        at_image = isinstance(needs, Backward) and needs.below
        reshape = options.reshape_transform or (None if at_image else passed.session.arrangement())
        if reshape is not None:
            features = reshape(features)
        check_spatial((None, *features.shape[1:]), passed.layer, images.ndim - 2, options.reshape_transform is not None)
        size = self._map_size(images.shape[2:], images if at_image else features, passed.layer)
        passage = Passage(passed, images, features, resolved, options, self.pixels, reshape)
        with stage("rules"):
            evidence = self.method.evidence(passage, options)
            if isinstance(options, CamOptions) and options.eigen_smooth and evidence.projection is None:
                evidence = smoothed(passage, evidence)
        relu = isinstance(options, CamOptions) and options.relu
        with stage("post"):
            maps, raw, finite = finish(features, evidence, relu, self.normalize, size, self.method.signed)
            maps, raw, valid = self._check_finite(maps, raw, finite, passed, images, features, resolved)
        certainty = {"certainty": self.method.certainty} if self.method.certainty else {}
        return Attribution(
            maps=maps,
            raw=raw,
            scores=passed.output,
            targets=resolved.indices if resolved.indices is not None else resolved.score,
            weights=evidence.shown if evidence.shown is not None else evidence.weights,
            delta=evidence.delta,
            valid=valid,
            layer=passed.layer,
            method=self.method.name,
            # Not `asdict`: it copies, and what a callable is bound to may not be copyable.
            options={f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.init} | certainty,
            extra=evidence.extra,
        )

    def _session(self, images: torch.Tensor) -> Session:
        method, needs = self.method, self.options.needed(self.method.needs)
        at_image = isinstance(needs, Backward) and needs.below
        return self._network_at(
            images,
            method.name,
            self.options,
            needs,
            pixels=method.pixels,
            start=method.start,
            arranged=not at_image,
        )

    def _check_finite(
        self,
        maps: torch.Tensor,
        raw: torch.Tensor,
        finite: torch.Tensor,
        passed: Forward,
        images: torch.Tensor,
        features: torch.Tensor,
        targets: Targets,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raise, or mask and flag, where a map is not finite."""
        output = passed.output
        on_cpu = maps.device.type == "cpu" and not tracing()
        behaviour = self.options.on_nonfinite or ("raise" if on_cpu else "mask")
        if on_cpu and targets.valid is None and all(map(_surely_finite, (output, images))) and bool(finite.all()):
            low, high = raw.aminmax()
            if math.isfinite(high - low):
                return maps, raw, finite if finite.ndim == 1 else finite.all(dim=1)
        # A range beyond the largest float would make NaN of finite maps.
        finite = finite & (raw.flatten(finite.ndim).amax(-1) - raw.flatten(finite.ndim).amin(-1)).isfinite()
        valid = finite if finite.ndim == 1 else finite.all(dim=1)
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.shape[:1] == valid.shape:
            valid = valid & output.isfinite().unsqueeze(-1).flatten(1).all(dim=1)
        # A convolution that ends in ReLU makes zeros of NaN, so what comes out does not tell.
        valid = valid & images.isfinite().flatten(1).all(dim=1)
        if targets.valid is not None:
            valid = valid & targets.valid
        if behaviour == "raise":
            if targets.valid is not None and not bool(targets.valid.all()):
                raise IndexError(f"a target of image {int((~targets.valid).nonzero()[0])} is out of range")
            if not bool(valid.all()):
                told = (output, passed.layer, self.method.name, self.model)
                raise ValueError(nonfinite_message(valid, images, features, *told))
            return maps, raw, valid
        keep = valid.reshape(-1, *(1,) * (maps.ndim - 1))
        zero = maps.new_zeros(())
        return torch.where(keep, maps, zero), torch.where(keep, raw, zero), valid

    def _empty(self, images: torch.Tensor, targets: TargetSpec) -> Attribution:
        """The result for no images: one made-up image goes through, and nothing of it is kept."""
        with neutral_modes():
            one = self._explain(images.new_zeros((1, *images.shape[1:])), targets if callable(targets) else None)
            nothing = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t[:0] if t.ndim else t, one.scores)
            resolved = resolve_targets(targets, nothing, 0)
        several = (resolved.indices.shape[1],) if resolved.several and resolved.indices is not None else ()

        def shaped(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.new_zeros((0, *several, *tensor.shape[1:]))

        return dataclasses.replace(
            one,
            maps=shaped(one.maps),
            raw=shaped(one.raw),
            scores=nothing,
            targets=resolved.indices if resolved.indices is not None else resolved.score,
            weights=None if one.weights is None else shaped(one.weights),
            delta=None if one.delta is None else one.delta.new_zeros((0, *several)),
            valid=one.valid[:0],
            extra=torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t[:0] if t.ndim else t, one.extra),
        )


def _surely_finite(value: Any) -> bool:
    """Whether all numbers of a tensor are finite; maybe False where they are but large."""
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or math.isfinite(value.sum())


def _given(images: torch.Tensor, targets: TargetSpec) -> tuple[torch.Tensor, ...]:
    """Targets that are class indices, as a straight line reads them: (B,) or (B, T); nothing for others."""
    if isinstance(targets, (np.integer, np.ndarray)):
        targets = targets.tolist()
    if isinstance(targets, bool) or not isinstance(targets, (int, list, tuple, torch.Tensor)):
        return ()
    one = torch.as_tensor(targets, device=images.device)
    if one.dtype.is_floating_point or one.dtype == torch.bool:
        return ()  # an error, but not here
    one = one.to(torch.int64)
    one = one.expand(images.shape[0]) if one.ndim == 0 else one
    check_count(one, images.shape[0])
    return (one,)


def _tensors(found: Attribution) -> dict[str, Any]:
    """The parts of an attribution that are tensors, or made of them."""
    names = ("maps", "raw", "scores", "targets", "weights", "delta", "valid", "extra")
    parts = {name: getattr(found, name) for name in names}
    return {name: part for name, part in parts.items() if torch.utils._pytree.tree_any(_is_tensor, part)}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def attribute(
    model: nn.Module,
    images: torch.Tensor,
    method: str = "lift_cam",
    *,
    targets: TargetSpec = None,
    layer: str | nn.Module | None = None,
    size: str | Sequence[int] = "input",
    normalize: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> Attribution:
    """Attribution maps of a batch of images.

        result = fastcam.attribute(model, images, "lift_cam", targets="top3")     # result.maps: (B, 3, H, W)

    images   (B, C, *spatial) floating point, prepared as the model expects; B may be 0
    targets  None: arg-max of each image · int: that class for all · list of B ints · integer tensor or NumPy array
             (B,) or (B, T) · "top5": the five highest of each image · callable: model output -> one score an image

    The other arguments are those of `Explainer`, whose docstring gives errors and cost; this is
    `Explainer(model, method, ...)(images, targets)`. Capture is shared between calls.
    """
    settings: dict[str, Any] = {"layer": layer, "size": size, "normalize": normalize, "mean": mean, "std": std}
    return Explainer(model, method, **settings, **options)(images, targets)


def at_layers(explainers: Sequence[Explainer], images: torch.Tensor, targets: TargetSpec = None) -> list[Attribution]:
    """The attributions of explainers of one model and method that differ by their layer alone.

    One pass forward and at most one back serve all layers where the method reads features, or features and gradients,
    of a captured network, and every layer follows from the first of them; otherwise each explainer is called.
    """
    first = explainers[0]
    if len(explainers) == 1 or len(images) == 0 or first.options.needed(first.method.needs) not in _SHARED:
        return [explainer(images, targets) for explainer in explainers]
    check_images(images)
    warn_if_training(first.model)
    with neutral_modes():
        images = images.clone() if images.is_inference() else images
        sessions = [explainer._session(images) for explainer in explainers]
        captured = [session for session in sessions if isinstance(session, CapturedSession)]
        passed = None
        if len(captured) == len(sessions):
            lowest = min(captured, key=lambda session: session.cut.feature)
            gradients = first.options.needed(first.method.needs) == "gradients"
            passed = lowest.forwards(images, captured, gradients)
        if passed is not None:
            resolved = resolve_targets(targets, passed[0].output, len(images))
            return [e._explained(images, one, resolved) for e, one in zip(explainers, passed, strict=True)]
    return [explainer(images, targets) for explainer in explainers]


#: What a method may need for `at_layers` to share a pass.
_SHARED = ("features", "gradients")


def _check_pixels(mean: Any, std: Any) -> Pixels:
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together; pass both, or neither for ImageNet's")
    if mean is None:
        return Pixels()
    mean, std = (tuple(float(x) for x in numbers) for numbers in (mean, std))
    if len(mean) != len(std) or not all(math.isfinite(x) for x in mean + std) or not all(x > 0 for x in std):
        raise ValueError(f"mean and std must hold as many finite numbers each, std positive; got {mean} and {std}")
    return Pixels(mean, std)
