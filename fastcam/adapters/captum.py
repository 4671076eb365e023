"""Captum's attribution methods, computed by fastcam.

    from fastcam.adapters.captum import DeepLift, LayerGradCam    # was: from captum.attr import DeepLift, LayerGradCam

Constructors, `attribute` and results are Captum 0.9.0's. The classes are subclasses of Captum's, so they work inside
`NoiseTunnel`, `captum.metrics` and whatever else takes an `Attribution`. A call that fastcam does not cover (several
inputs, `additional_forward_args`, a layer without feature maps, a network that cannot be captured, ...) runs Captum's
own code, with one log line. fastcam's results carry no gradient. Names that are not here are Captum's own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastcam.explainer import Attribution as Found
from fastcam.explainer import Explainer
from fastcam.program.capture import CaptureError
from fastcam.program.layers import UnfitLayer
from fastcam.program.relevance import Composite, Epsilon, MaxPool, Norm, Pass, Raised
from fastcam.program.rescale import UnsupportedOpError
from fastcam.program.state import forward_hooked
from fastcam.program.targets import TargetSpec

from ._peer import Handover, fallback, needing, untouched

with needing("captum"):
    import captum.attr as _peer
    from captum._utils.common import _format_baseline, _format_tensor_into_tuples, _select_targets, _validate_input
    from captum.attr._core import lrp as _lrp
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, IdentityRule

__all__ = [
    "LRP",
    "Deconvolution",
    "DeepLift",
    "GuidedBackprop",
    "GuidedGradCam",
    "LayerDeepLift",
    "LayerGradCam",
    "LayerLRP",
]  # fmt: skip


#: Stabiliser of Captum's rules.
_EPSILON = 1e-9


class _NotCovered(Exception):
    """Why a call is left to Captum."""


def _covered(native: Callable[..., Any]) -> Callable[..., Any]:
    """`attribute` that runs `native`, or Captum's own where fastcam does not cover the call.

    What it wraps is itself without Captum's usage log, which `NoiseTunnel` and others call as `attribute.__wrapped__`.
    """

    @functools.wraps(native)
    def attempt(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return native(self, inputs, *args, **kwargs)
        except (_NotCovered, UnsupportedOpError, CaptureError, UnfitLayer) as reason:
            _state(self)["hand_over"](str(reason))
        captums: list[Any] = [c for c in type(self).__mro__ if c.__module__.startswith("captum.")]
        theirs = next(c for c in captums if "attribute" in vars(c)).attribute
        theirs = getattr(theirs, "__wrapped__", theirs)
        model = getattr(self, "model", self.forward_func)
        with untouched(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
            return theirs(self, inputs, *args, **kwargs)

    @functools.wraps(attempt)
    def attribute(self: Any, *args: Any, **kwargs: Any) -> Any:
        return attempt(self, *args, **kwargs)

    attribute.__wrapped__ = attempt
    return attribute


def _state(self: Any) -> dict[str, Any]:
    """What an adapter keeps on itself, beside Captum's attributes."""
    kept: dict[str, Any] = vars(self).setdefault("_fastcam", {})
    kept.setdefault("hand_over", Handover(type(self).__name__))
    return kept


def _explain(
    self: Any, method: str, inputs: Any, target: Any, additional: Any, layer: Any = None, **options: Any
) -> Found:
    """fastcam's attribution of the one input, at layer size and not normalised; the explainer is kept.

    Raises `_NotCovered` for what only Captum does.
    """
    model = getattr(self, "model", self.forward_func)
    if not isinstance(model, nn.Module):
        raise _NotCovered("forward_func is not a module")
    if additional is not None and additional != ():
        raise _NotCovered("additional_forward_args is given")
    if isinstance(layer, (list, tuple)):
        raise _NotCovered("several layers are given")
    (images, *others) = _format_tensor_into_tuples(inputs)
    if others:
        raise _NotCovered("there are several inputs")
    if not (isinstance(images, Tensor) and images.is_floating_point() and 3 <= images.ndim <= 5):
        raise _NotCovered("the input is not a batch of images (B, C, *spatial)")
    hooked = None if method == "grad_cam" else forward_hooked(model)
    if hooked is not None:  # the user's hooks run once, in Captum's pass
        raise _NotCovered(f"module '{hooked}' has forward hooks")
    key = (id(model), method, id(layer), {k: v for k, v in options.items() if k != "reference"})
    kept = _state(self)
    if kept.get("key") != key or "reference" in options:
        explainer = Explainer(model, method, layer=layer, size="layer", normalize=False, **options)
        kept |= {"key": key, "explainer": explainer}
    found: Found = kept["explainer"](images.detach(), _spec(target, len(images)))
    return found


def _spec(target: Any, batch: int) -> TargetSpec:
    """Captum's target as fastcam takes it: class indices where it is that, else Captum's own selection."""
    if isinstance(target, Tensor) and (target.numel() == 1 or target.ndim < 2):
        target = int(target.item()) if target.numel() == 1 else target.tolist()
    if isinstance(target, tuple) and len(target) == 1:
        target = target[0]
    if isinstance(target, int) and not isinstance(target, bool) and target >= 0:
        return target
    if isinstance(target, list) and all(type(t) is int and t >= 0 for t in target):
        assert len(target) == batch, f"Sample output length does not match label length: {batch} and {len(target)}."
        return target

    def score(output: Tensor) -> Tensor:
        chosen = _select_targets(output, target)
        assert chosen.numel() == len(output), (
            "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
        )
        return chosen.reshape(len(output))

    return score


def _like(inputs: Any, result: Tensor) -> Any:
    """As Captum gives it: in a tuple where a tuple was given, and contiguous, for its metrics take views."""
    result = result.contiguous()
    return (result,) if isinstance(inputs, tuple) else result


class LayerGradCam(_peer.LayerGradCam):
    @_covered
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """(N, 1, h, w) at the layer's size."""
        if attribute_to_layer_input or not attr_dim_summation or grad_kwargs:
            raise _NotCovered("attribute_to_layer_input, channels apart or grad_kwargs are asked for")
        found = _explain(
            self, "grad_cam", inputs, target, additional_forward_args, self.layer, relu=bool(relu_attributions)
        )
        return found.raw.unsqueeze(1).contiguous()


class GuidedBackprop(_peer.GuidedBackprop):
    @_covered
    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        options = {"return_relevance": True}
        found = _explain(self, "guided_backprop", inputs, target, additional_forward_args, **options)
        return _like(inputs, found.extra["relevance"])


class Deconvolution(_peer.Deconvolution):
    @_covered
    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        options = {"return_relevance": True}
        found = _explain(self, "deconvnet", inputs, target, additional_forward_args, **options)
        return _like(inputs, found.extra["relevance"])


class GuidedGradCam(_peer.GuidedGradCam):
    """Captum's product of the two adapters above."""

    def __init__(self, model: nn.Module, layer: nn.Module, device_ids: list[int] | None = None):
        super().__init__(model, layer, device_ids)
        self.grad_cam = LayerGradCam(model, layer, device_ids)
        self.guided_backprop = GuidedBackprop(model)


class DeepLift(_peer.DeepLift):
    """`eps` has no use: divisions by small differences take the derivative at the mean instead."""

    @_covered
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Callable[..., Any] | None = None,
    ) -> Any:
        found = _differences(
            self,
            None,
            inputs,
            baselines,
            target,
            additional_forward_args,
            return_convergence_delta,
            custom_attribution_func,
        )
        result = _like(inputs, found.extra["contributions" if self.multiplies_by_inputs else "multipliers"])
        return (result, found.delta) if return_convergence_delta else result


class LayerDeepLift(_peer.LayerDeepLift):
    @_covered
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        custom_attribution_func: Callable[..., Any] | None = None,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if attribute_to_layer_input or grad_kwargs:
            raise _NotCovered("attribute_to_layer_input or grad_kwargs are asked for")
        found = _differences(
            self,
            self.layer,
            inputs,
            baselines,
            target,
            additional_forward_args,
            return_convergence_delta,
            custom_attribution_func,
        )
        result = found.extra["contributions" if self.multiplies_by_inputs else "multipliers"].contiguous()
        return (result, found.delta) if return_convergence_delta else result


def _differences(
    self: Any, layer: Any, inputs: Any, baselines: Any, target: Any, additional: Any, delta: bool, custom: Any
) -> Found:
    if custom is not None:
        raise _NotCovered("custom_attribution_func is given")
    if delta and not self.multiplies_by_inputs:
        raise _NotCovered("the delta of what is not multiplied by inputs is asked for")
    images = _format_tensor_into_tuples(inputs)
    baselines = _format_baseline(baselines, images)
    _validate_input(images, baselines)
    reference = baselines[0]
    if not isinstance(reference, Tensor):  # one image for all
        reference = torch.full_like(images[0][:1], reference)
    kind = {"return_contributions": True} if self.multiplies_by_inputs else {"return_multipliers": True}
    return _explain(self, "deep_lift", inputs, target, additional, layer, reference=reference.detach(), **kind)


class _Strict:
    """`strict=True` refuses what Captum's LRP refuses: layers without a rule, and modules used twice."""

    _strict = False


class LRP(_Strict, _peer.LRP):
    """Rules are Captum's: epsilon 1e-9 for weighted layers, pools and batch norms, the value of the output as seed.

    A module's `rule` counts and stays; Captum's own run here, the user's in Captum. Residual sums share relevance in
    proportion (C8). With `strict` a layer without a rule in Captum is a TypeError, as there.
    """

    def __init__(self, model: nn.Module, *, strict: bool = False):
        super().__init__(model)
        self._strict = strict

    @_covered
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        found = _relevance(self, None, inputs, target, additional_forward_args)
        result = _like(inputs, found.extra["relevance"])
        return (result, _lost(self, result, found, target)) if return_convergence_delta else result


class LayerLRP(_Strict, _peer.LayerLRP):
    """As `LRP`, down to a layer's output."""

    def __init__(self, model: nn.Module, layer: Any, *, strict: bool = False):
        super().__init__(model, layer)
        self._strict = strict

    @_covered
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
    ) -> Any:
        if attribute_to_layer_input:
            raise _NotCovered("attribute_to_layer_input is asked for")
        found = _relevance(self, self.layer, inputs, target, additional_forward_args)
        result = found.extra["relevance"].contiguous()
        return (result, _lost(self, result, found, target)) if return_convergence_delta else result


class _Rules(Composite):
    """Rules of modules, some of which, like dropout, take no step."""

    def check(self, walk: Any) -> None:
        """Nothing: the names are those of the model's own modules."""


def _relevance(self: Any, layer: Any, inputs: Any, target: Any, additional: Any) -> Found:
    rules: dict[str, Any] = {}
    for name, module in self.model.named_modules(remove_duplicate=False):
        if list(module.children()):  # Captum asks its leaves alone
            continue
        rule = getattr(module, "rule", None)
        if rule is not None:
            translated = _translated(name, module, rule)
            if translated is not None:
                rules[name] = translated
        elif self._strict:
            _check_known(module)
    key = tuple(rules.items())
    kept = _state(self)
    if kept.get("rules") != key:
        small = Epsilon(epsilon=_EPSILON)
        norm = Norm(_EPSILON)
        largest = MaxPool(epsilon=_EPSILON)
        composite = _Rules(conv=small, linear=small, pool=norm, max_pool=largest, add=norm, norm=small, names=rules)
        kept |= {"rules": key, "composite": composite}
    options = {"composite": kept["composite"], "seed": "logit", "norms": "pass", "return_relevance": True}
    return _explain(self, "lrp", inputs, target, additional, layer, **options)


def _translated(name: str, module: nn.Module, rule: Any) -> Any:
    """fastcam's rule of a module with Captum's `rule`; None where Captum gives it none."""
    if type(module) in _lrp.SUPPORTED_NON_LINEAR_LAYERS:
        return None
    kind, bias = type(rule), not getattr(rule, "set_bias_to_zero", False)
    epsilon = float(rule.STABILITY_FACTOR)
    if isinstance(module, _WEIGHTED):
        if kind is EpsilonRule:
            return Epsilon(epsilon=epsilon)
        if kind is GammaRule:
            return Raised(1.0, float(rule.gamma), bias=bias, epsilon=epsilon)
        if kind is Alpha1_Beta0_Rule:
            return Raised(0.0, 1.0, bias=bias, epsilon=epsilon)
    elif kind is IdentityRule and isinstance(module, (*_NORMS, nn.Flatten, nn.Identity)):
        return Pass()
    elif kind is EpsilonRule or (kind in (GammaRule, Alpha1_Beta0_Rule) and not isinstance(module, _NORMS)):
        if isinstance(module, _LARGEST):
            return MaxPool(epsilon=epsilon)
        if isinstance(module, (*_AVERAGES, _lrp.Addition_Module)):
            return Norm(epsilon)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return Epsilon(epsilon=epsilon)
    raise _NotCovered(f"module '{name}', a {type(module).__name__}, has the rule {kind.__name__}")


_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_AVERAGES = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd)
_LARGEST = (nn.modules.pooling._MaxPoolNd,)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def _check_known(module: nn.Module) -> None:
    if not isinstance(module, (*_lrp.SUPPORTED_LAYERS_WITH_RULES, *_lrp.SUPPORTED_NON_LINEAR_LAYERS)):
        raise TypeError(
            f"Module of type {type(module)} has no rule defined and no default rule exists for this module type. "
            "Please, set a rule explicitly, or pass strict=False"
        )


def _lost(self: Any, result: Any, found: Found, target: Any) -> Tensor:
    delta: Tensor = self.compute_convergence_delta(result, _select_targets(found.scores, target))
    return delta


#: What `fastcam.adapters.accelerate("captum")` replaces.
REPLACES: dict[Any, Any] = {
    getattr(_peer, ours.__name__): ours
    for ours in (LayerGradCam, GuidedBackprop, Deconvolution, GuidedGradCam, DeepLift, LayerDeepLift, LRP, LayerLRP)
}


def __getattr__(name: str) -> Any:
    return fallback(name, _peer, __name__)
