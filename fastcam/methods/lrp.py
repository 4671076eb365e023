"""Layer-wise relevance propagation by rules and composites, guided backpropagation and DeconvNet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastcam.program.relevance import Composite, Epsilon, MaxPool, as_captum, named

from ._method import Evidence, Method, Passage
from ._relevance import RelevanceOptions, Seed, evidence_of, onehot_columns, totals

__all__ = ["DECONVNET", "GUIDED_BACKPROP", "LRP", "LrpOptions", "lrp"]


@dataclass(frozen=True)
class LrpOptions(RelevanceOptions):
    """As `RelevanceOptions`, and

    composite    name of a composite (see `lrp`), or a `fastcam.relevance.Composite`; None: "epsilon_plus_flat", or
                 the epsilon rule everywhere under Captum's convention
    convention   "zennit" · "captum": as Captum computes rules (`lrp`), and its defaults of epsilon, seed and norms
    epsilon      stabiliser of divisions; None: 1e-6, or 1e-9 under Captum's convention
    gamma        of the gamma rule; None: 0.25
    alpha, beta  of the alpha-beta rule, alpha - beta = 1; None: 2 and 1
    low, high    bounds of prepared images for "epsilon_gamma_box": numbers, tensors or "minmax" (of each image)
    seed         relevance at the logits: "onehot" (1 at the target), "logit" (the logit there), "contrast" (1 at the
                 target, -1/C at the other C - 1 classes), a tensor (B, C), or a callable that makes one of the logits;
                 None: "onehot", or "logit" under Captum's convention
    bias         "include": biases take part in the rules and absorb relevance · "zero": they are left out
    max_pool     "winner", "proportional" or "ties"
    norms        batch norms after convolutions and linear layers: "fold" into them · "pass" relevance on unchanged ·
                 "epsilon"; other norms pass it on under "fold"; None: "fold", or "epsilon" under Captum's convention
    """

    composite: str | Composite | None = None
    convention: Literal["zennit", "captum"] = "zennit"
    epsilon: float | None = None
    gamma: float | None = None
    alpha: float | None = None
    beta: float | None = None
    low: float | Tensor | Literal["minmax"] | None = None
    high: float | Tensor | Literal["minmax"] | None = None
    seed: Seed | Tensor | Callable[[Tensor], Tensor] | None = None
    bias: Literal["include", "zero"] = "include"
    max_pool: Literal["winner", "proportional", "ties"] = "winner"
    norms: Literal["fold", "pass", "epsilon"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("bias", self.bias, "include", "zero")
        _one_of("convention", self.convention, "zennit", "captum")
        captum = self.convention == "captum"
        self._default("seed", "logit" if captum else "onehot")
        self._default("norms", "epsilon" if captum else "fold")
        self._default("composite", Composite(conv=Epsilon()) if captum else "epsilon_plus_flat")
        _one_of("norms", self.norms, "fold", "pass", "epsilon")
        if not isinstance(self.seed, Tensor) and not callable(self.seed):
            _one_of("seed", self.seed, "onehot", "logit", "contrast")
        for name in ("epsilon", "gamma", "alpha", "beta"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number, not negative; got {value!r}")
        composite = self._chosen(captum)
        if self.max_pool != "winner":
            composite = replace(composite, max_pool=MaxPool(self.max_pool))
        epsilon = self.epsilon if self.epsilon is not None else 1e-9 if captum else 1e-6
        if captum:
            composite = as_captum(composite, epsilon)
        elif self.norms == "epsilon":
            composite = replace(composite, norm=Epsilon(epsilon))
        self._walked_by(composite, folded=self.norms == "fold")

    def _default(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _chosen(self, captum: bool) -> Composite:
        numbers = {name: getattr(self, name) for name in ("gamma", "alpha", "beta", "low", "high")}
        if not captum:
            numbers["epsilon"] = self.epsilon
        if not isinstance(self.composite, Composite):
            assert self.composite is not None
            return named(self.composite, **numbers, bias=self.bias == "include")
        given = [name for name, value in numbers.items() if value is not None]
        if given or self.bias != "include":
            raise ValueError(f"{(given or ['bias'])[0]} belongs to the rules of a composite given by the user")
        return self.composite


def _one_of(name: str, value: Any, *known: str) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")


def lrp(passage: Passage, options: LrpOptions) -> Evidence:
    """Relevance of the logits, walked back to the image or to a layer by a rule for each step.

        R_logits = seed;   R_j -> R_i by the rule of the step between;   map = sum_c R_c

    Rules (`fastcam.relevance`; formulas there): epsilon, gamma, z+, alpha-beta, zB (box), w^2, flat, norm, pass,
    gradient. Composites by name, for first layer / convolutions / linear layers:
        "epsilon_plus"          - / z+ / epsilon              "epsilon_plus_flat"          flat / z+ / epsilon
        "epsilon_alpha2_beta1"  - / alpha-beta / epsilon      "epsilon_alpha2_beta1_flat"  flat / alpha-beta / epsilon
        "epsilon_gamma_box"     zB / gamma / epsilon; needs low= and high=
        "excitation_backprop"   z+ everywhere, gradients of activations
        "guided_backprop", "deconvnet"   gradients, with max(R, 0) at ReLUs, with and without the ReLU's own mask
    Elsewhere: residual sums and average pools in proportion (norm), max pools to the winner, activations pass, products
    by a gate go to the gated features, batch norms are folded into the convolution or linear layer before them, and
    pass where there is none. ReLU as a function, in place or re-used, and modules used twice are steps like any other.

    convention="captum" computes epsilon, gamma and z+ (alpha1-beta0) as Captum 0.9 does: weights V = W + gamma W+ or
    W+, R' = x t(R / st(c(x, V) + b), V) whatever the signs of x and b; the epsilon rule at pools, sums and norms, which
    are not folded; maxima z pass z / st(z) of their relevance.

    `Attribution.delta` is what the map's total lacks of the seed's: the relevance that biases, stabilisers and
    normalisations took. The map is signed; normalised, it is divided by its largest magnitude.

    Shapes: (B, *spatial); T targets add an axis after B. Relevance in float32, float64 where the network is; a bfloat16
    network's in bfloat16 (its maps differ by a few per cent), a float16 network is walked in float32.
    Errors: UnsupportedOpError naming the step without a rule and how to give it one; ValueError for numbers out of
    range, an unknown composite or seed, missing low/high.
    Cost: a forward pass, and for each weighted step: epsilon one transposed convolution; z+ one modified forward
    (shared by all targets) and one transposed; alpha-beta and gamma one and two; twice that where inputs may be
    negative.
    Source: Bach et al. 2015; Montavon et al. 2017, 2019; Andeol et al. 2021; composites and conventions as Zennit's.
    """
    seeds = onehot_columns(passage, options.seed)
    if not isinstance(options.seed, str) and passage.targets.several:
        raise ValueError("a seed tensor says what to explain; pass one target an image, or none")
    given = totals(seeds)
    found, layers = passage.relevance(seeds, options.layers)
    return evidence_of(passage, options, found, layers, given)


LRP = Method(
    "lrp",
    "layer-wise relevance propagation by a composite of rules, to the pixels or a layer",
    "Bach et al. 2015; Montavon et al. 2019",
    lrp,
    needs="features",
    options=LrpOptions,
    pixels=True,
    signed=True,
)


@dataclass(frozen=True)
class GuidedOptions(RelevanceOptions):
    """As `RelevanceOptions`."""

    composite: ClassVar[str] = "guided_backprop"

    def __post_init__(self) -> None:
        super().__post_init__()
        # Folding changes no derivative but those at the convolutions folded into, which `layers` may name.
        self._walked_by(named(self.composite), folded=not self.layers)


@dataclass(frozen=True)
class DeconvOptions(GuidedOptions):
    """As `RelevanceOptions`."""

    composite: ClassVar[str] = "deconvnet"


def backpropagation(passage: Passage, options: GuidedOptions) -> Evidence:
    """Gradients of the score with another rule at ReLUs, summed over the image's channels.

    guided_backprop  R' = max(R, 0) 1[x > 0]: only positive gradients pass, and only where the ReLU was active
    deconvnet        R' = max(R, 0): the ReLU is applied to the gradient instead

    Everything else, smooth activations included, has its gradient. `extra["relevance"]` (with return_relevance=True)
    holds the channels apart, (B, C, *spatial). Shapes, errors: as `lrp`.
    Cost: a forward and a backward pass.
    Source: Springenberg et al., arXiv 1412.6806; Zeiler & Fergus, arXiv 1311.2901.
    """
    found, layers = passage.relevance(onehot_columns(passage, "onehot"), options.layers)
    return evidence_of(passage, options, found, layers, None)


GUIDED_BACKPROP = Method(
    "guided_backprop",
    "gradient at the pixels with negative gradients dropped at every ReLU",
    "arXiv 1412.6806",
    backpropagation,
    needs="features",
    options=GuidedOptions,
    pixels=True,
    signed=True,
)
DECONVNET = Method(
    "deconvnet",
    "gradient at the pixels with every ReLU applied to the gradient instead of its own mask",
    "arXiv 1311.2901",
    backpropagation,
    needs="features",
    options=DeconvOptions,
    pixels=True,
    signed=True,
)
