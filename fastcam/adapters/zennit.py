"""Zennit's attributors and composites, computed by fastcam.

    from fastcam.adapters.zennit import Gradient                  # was: from zennit.attribution import Gradient

    with Gradient(model, EpsilonPlusFlat(canonizers=[ResNetCanonizer()])) as attributor:
        output, relevance = attributor(images, torch.eye(1000)[targets])

The composite is Zennit's own, with its layer maps, name maps and canonizers; it is translated rule by rule and never
registered to the model. What has no translation (a hook of the user's, a rule on a container, parameters held at zero
other than biases) and networks fastcam cannot capture are left to Zennit, with one log line. Results carry no gradient;
with `create_graph` or `retain_graph` everything is Zennit's own, and they do.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcam import relevance as ours
from fastcam.explainer import Attribution, Explainer
from fastcam.program.capture import CaptureError
from fastcam.program.nodes import Node, op_name
from fastcam.program.relevance.walk import RelevanceWalk, Way, general_way
from fastcam.program.rescale import UnsupportedOpError
from fastcam.program.state import fingerprint, forward_hooked

from ._peer import Handover, fallback, needing, untouched

with needing("zennit"):
    from zennit import attribution as _peer
    from zennit import rules as _rules
    from zennit.core import Composite as _Composite
    from zennit.core import Stabilizer
    from zennit.layer import Sum
    from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear

__all__ = ["Gradient", "IntegratedGradients", "SmoothGrad", "translate"]


class Untranslatable(ValueError):
    """A hook that no fastcam rule stands for."""


@dataclass(frozen=True, eq=False)
class Translation(ours.Composite):
    """Zennit's reading of a network: a module has the rule of its hook, and everything else its gradient.

    names  module -> rule, by exact name
    sums   module in whose forward a residual sum stands -> rule
    """

    conv: Any = field(default_factory=ours.Gradient)
    linear: Any = field(default_factory=ours.Gradient)
    activation: ours.Rule = field(default_factory=ours.Gradient)
    add: ours.Rule = field(default_factory=ours.Gradient)
    pool: ours.Rule = field(default_factory=ours.Gradient)
    norm: ours.Rule = field(default_factory=ours.Gradient)
    sums: Mapping[str, ours.Rule] = field(default_factory=dict)

    def check(self, walk: RelevanceWalk) -> None:
        """Nothing: names are those of the model's own modules, some of which, like merged batch norms, take no step."""

    def exception(self, module: str) -> ours.Rule | None:
        return self.names.get(module)

    def way(self, walk: RelevanceWalk, node: Node, active: frozenset[int]) -> Way:
        if op_name(node.target) == "add" and node.module in self.sums:
            gradient = ours.Gradient()
            rules = dict.fromkeys(("activation", "pool", "max_pool", "norm", "product"), gradient)
            return general_way(node, active, rules | {"add": self.sums[node.module]})
        return super().way(walk, node, active)


def translate(composite: Any, model: nn.Module) -> tuple[Translation, str]:
    """Zennit's composite for this model as one of `method="lrp"`, and the `norms` option that goes with it.

        rules, norms = translate(EpsilonPlus(canonizers=[ResNetCanonizer()]), model)
        fastcam.attribute(model, images, "lrp", composite=rules, norms=norms)

    Canonizers run on a copy of the model without data. Raises ValueError naming the module and the hook that cannot be
    translated.
    """
    merged, twin = False, model
    if composite is not None and composite.canonizers:
        twin = _without_data(model)
        for canonizer in composite.canonizers:
            merged |= any(hasattr(instance, "batch_norm") for instance in canonizer.apply(twin))
    names: dict[str, ours.Rule] = {}
    sums: dict[str, ours.Rule] = {}
    context: dict[Any, Any] = {}
    spellings: dict[int, list[str]] = {}  # a module in two places is hooked once, and runs under either name
    for name, module in twin.named_modules(remove_duplicate=False):
        spellings.setdefault(id(module), []).append(name)
    for name, module in twin.named_modules() if composite is not None else ():
        hook = composite.module_map(context, name, module)
        if hook is None:
            continue
        rule = _translated(name, module, hook)
        if isinstance(module, Sum):
            sums[name.rpartition(".")[0]] = rule
        else:
            names |= dict.fromkeys(spellings[id(module)], rule)
    return Translation(names=names, sums=sums), "fold" if merged else "pass"


def _without_data(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)


def _translated(name: str, module: nn.Module, hook: Any) -> ours.Rule:
    make = _RULES.get(type(hook))
    if make is None:
        raise Untranslatable(f"module '{name}' has the hook {type(hook).__name__}")
    if list(module.children()):
        raise Untranslatable(f"module '{name}' is a container with the hook {type(hook).__name__}")
    rule = make(_numbers(name, hook))
    kinds: dict[type, tuple[type, ...]] = {
        Convolution: (ours.Epsilon, ours.Gamma, ours.ZPlus, ours.AlphaBeta, ours.ZBox, ours.WSquare, ours.Flat),
        Activation: (ours.Pass, ours.Rectified),
        BatchNorm: (ours.Pass, ours.Epsilon),
        AvgPool: (ours.Norm,),
        Sum: (ours.Norm,),
        nn.Dropout: (ours.Pass,),
        nn.Flatten: (ours.Pass,),
        nn.Identity: (ours.Pass,),
    }
    kinds[Linear] = kinds[Convolution]
    if not any(isinstance(module, kind) and isinstance(rule, fit) for kind, fit in kinds.items()):
        raise Untranslatable(f"module '{name}' is a {type(module).__name__} with the hook {type(hook).__name__}")
    return rule


def _numbers(name: str, hook: Any) -> dict[str, Any]:
    """The arguments a rule of Zennit was made with; it keeps them in the cells of its functions."""
    found: dict[str, Any] = {}
    modifiers = getattr(hook, "param_modifiers", [])
    functions = [getattr(hook, "gradient_mapper", None), getattr(hook, "reducer", None)]
    functions += [*getattr(hook, "input_modifiers", []), *(getattr(one, "modifier", None) for one in modifiers)]
    for function in functions:
        cells = getattr(function, "__closure__", None) or ()
        found |= {key: cell.cell_contents for key, cell in zip(_free(function), cells, strict=True)}
    stabilizer = found.get("stabilizer_fn")
    if stabilizer is not None:
        plain = type(stabilizer) is Stabilizer and not (stabilizer.clip or stabilizer.norm_scale)
        if not plain:
            raise Untranslatable(f"module '{name}' has a {type(hook).__name__} with a stabilizer of its own")
        found["epsilon"] = stabilizer.epsilon
    zeros = modifiers[0].zero_params if modifiers else None
    zeros = [] if zeros is None else [zeros] if isinstance(zeros, str) else list(zeros)
    if set(zeros) - {"bias"}:
        raise Untranslatable(f"module '{name}' has a {type(hook).__name__} with zero_params={zeros}")
    if zeros and type(hook) is _rules.Gamma:  # it chooses its branch with the bias and divides without
        raise Untranslatable(f"module '{name}' has a Gamma with zero_params={zeros}")
    return found | {"bias": not zeros}


def _free(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_freevars


def _with(rule: type[Any], *names: str) -> Callable[[dict[str, Any]], ours.Rule]:
    return lambda numbers: rule(**{name: numbers[name] for name in names})


_RULES: dict[type, Callable[[dict[str, Any]], ours.Rule]] = {
    _rules.Epsilon: _with(ours.Epsilon, "epsilon", "bias"),
    _rules.Gamma: _with(ours.Gamma, "gamma", "epsilon", "bias"),
    _rules.ZPlus: _with(ours.ZPlus, "epsilon", "bias"),
    _rules.AlphaBeta: _with(ours.AlphaBeta, "alpha", "beta", "epsilon", "bias"),
    _rules.ZBox: _with(ours.ZBox, "low", "high", "epsilon"),
    _rules.WSquare: _with(ours.WSquare, "epsilon", "bias"),
    _rules.Flat: _with(ours.Flat, "epsilon"),
    _rules.Norm: _with(ours.Norm, "epsilon"),
    _rules.Pass: _with(ours.Pass),
    _rules.ReLUDeconvNet: lambda _: ours.Rectified(mask=False),
    _rules.ReLUGuidedBackprop: lambda _: ours.Rectified(mask=True),
}


class _Seed:
    """Relevance at the output, asked of the function of the call that is running."""

    def __init__(self) -> None:
        self.function: Callable[[Any], Any] = lambda output: output
        self.seen: Any = None

    def __call__(self, logits: Any) -> Any:
        self.seen = logits
        found = self.function(logits)
        if isinstance(logits, Tensor) and not isinstance(found, Tensor):
            raise TypeError(
                f"attr_output must be a tensor in the output's shape {tuple(logits.shape)}, such as rows of torch.eye, "
                f"or a function that makes one of the output; got {type(found).__name__}"
            )
        return found


def _unused(output: Any) -> Tensor:
    raise AssertionError("the seed says what is explained")


class _Native:
    """`grad` of Zennit's attributors by fastcam; the composite stays unregistered, unless a graph is asked for."""

    model: nn.Module
    composite: Any
    create_graph: bool
    retain_graph: bool | None
    _plain = False

    def __enter__(self) -> Any:
        return super().__enter__() if self._graph else self  # type: ignore[misc]

    def __exit__(self, *error: Any) -> Any:
        return super().__exit__(*error) if self._graph else False  # type: ignore[misc]

    def __call__(self, input: Tensor, attr_output: Any = None) -> tuple[Any, Tensor]:
        if self._graph:
            return super().__call__(input, attr_output)  # type: ignore[misc]
        given = self.attr_output_fn if attr_output is None else attr_output  # type: ignore[attr-defined]
        function = given if callable(given) else lambda output: given
        return self.forward(input, function)  # type: ignore[attr-defined]

    @property
    def _graph(self) -> bool:
        """Whether results are to keep their graph, as only Zennit's do."""
        return bool(self.create_graph or self.retain_graph)

    @property
    def inactive(self) -> Any:
        return super().inactive if self._graph else self._inactive  # type: ignore[misc]

    @contextlib.contextmanager
    def _inactive(self) -> Iterator[Any]:
        before, self._plain = self._plain, True
        try:
            with self.composite.inactive() as composite:
                yield composite
        finally:
            self._plain = before

    def grad(self, input: Tensor, attr_output_fn: Callable[[Any], Any]) -> tuple[Any, Tensor]:
        """Output and relevance of `input`, which stays as it is."""
        if self._graph:
            return super().grad(input, attr_output_fn)  # type: ignore[misc]
        images, composite = input.detach(), self.composite
        if composite is None or self._plain:  # a plain gradient, which nothing gives sooner than autograd
            composite = _Composite()
        else:
            try:
                return self._by_fastcam(images, attr_output_fn)
            except (Untranslatable, UnsupportedOpError, CaptureError) as reason:
                self._hand_over(str(reason))
        registered = contextlib.nullcontext() if composite.handles else composite.context(self.model)
        with untouched(self.model), registered:
            output, found = super().grad(images.clone().requires_grad_(), attr_output_fn)  # type: ignore[misc]
        return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, output), found.detach()

    def _by_fastcam(self, images: Tensor, attr_output_fn: Callable[[Any], Any]) -> tuple[Any, Tensor]:
        if not 3 <= images.ndim <= 5 or len(images) == 0:
            raise Untranslatable(f"the input of shape {tuple(images.shape)} is no batch of images")
        hooked = forward_hooked(self.model)
        if hooked is not None:  # the user's hooks run once, in Zennit's pass
            raise Untranslatable(f"module '{hooked}' has forward hooks")
        explainer, seed = self._explainer()
        seed.function = attr_output_fn
        try:
            found: Attribution = explainer(images, _unused)
            if not _same(seed.seen, found.scores):
                raise Untranslatable("the network ends in a softmax, which is part of Zennit's gradient")
        finally:
            seed.function, seed.seen = _Seed().function, None
        return found.scores, found.extra["relevance"]

    def _explainer(self) -> tuple[Explainer, _Seed]:
        """Made anew when the model's structure changes; a reason not to make one is kept too."""
        key = fingerprint(self.model)
        kept = vars(self).get("_fastcam")
        if kept is None or kept[0] != key:
            seed = _Seed()
            try:
                composite, norms = translate(self.composite, self.model)
                options: dict[str, Any] = {"composite": composite, "norms": norms, "seed": seed}
                made: Any = (
                    Explainer(self.model, "lrp", size="layer", normalize=False, return_relevance=True, **options),
                    seed,
                )
            except Untranslatable as reason:
                made = reason
            kept = vars(self)["_fastcam"] = key, made
        if isinstance(kept[1], Untranslatable):
            raise kept[1]
        return kept[1]

    def _hand_over(self, reason: str) -> None:
        vars(self).setdefault("_handover", Handover(type(self).__name__))(reason)


def _same(logits: Any, output: Any) -> bool:
    if not isinstance(logits, Tensor) or not isinstance(output, Tensor):
        return isinstance(logits, list)
    return logits is output or logits.data_ptr() == output.data_ptr() or torch.equal(logits, output)


class Gradient(_Native, _peer.Gradient):
    """Relevance of the output by the composite's rules; without a composite the gradient, by Zennit's own code."""


class SmoothGrad(_Native, _peer.SmoothGrad):
    """Zennit's average over noisy inputs of the above."""


class IntegratedGradients(_Native, _peer.IntegratedGradients):
    """Zennit's average over a path of the above."""


#: What `fastcam.adapters.accelerate("zennit")` replaces.
REPLACES: dict[Any, Any] = {
    _peer.Gradient: Gradient,
    _peer.SmoothGrad: SmoothGrad,
    _peer.IntegratedGradients: IntegratedGradients,
}


def __getattr__(name: str) -> Any:
    return fallback(name, _peer, __name__)
