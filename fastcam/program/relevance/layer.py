"""A weighted step of a network - convolution, transposed convolution, linear - as relevance rules see it.

A rule asks for two things: the step applied to non-negative inputs with modified weights, and the transpose of that.
Inputs that may be negative are laid out as positive parts beside negated negative parts, with weights to match, so that
every rule is written for non-negative inputs only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from ..nodes import Node, Ref, map_refs, op_name
from ..packed import PackedConvolution

__all__ = ["Geometry", "Layer", "ModifiedWeights", "Variant", "is_weighted"]

#: Weights made from a layer's own W: max(W, 0), min(W, 0), |W|, W^2, ones.
Variant = Literal["own", "positive", "negative", "magnitude", "square", "ones"]

_WEIGHTED = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
        "addmm",
        "mm",
        "matmul",
    ]
)
_MAKE: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda w: w.clamp(min=0),
    "negative": lambda w: w.clamp(max=0),
    "magnitude": torch.abs,
    "square": torch.square,
    "ones": torch.ones_like,
}
_CONVOLVE = PackedConvolution(relu=False)


def is_weighted(node: Node) -> bool:
    """Whether the step multiplies an activation by a weight, as far as its operator says."""
    return op_name(node.target) in _WEIGHTED


class ModifiedWeights:
    """What was made of weights, for as long as the weights live; a changed weight is another tensor."""

    def __init__(self) -> None:
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(self, weight: Tensor, key: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
        kept = self._made.setdefault(weight, {})
        if key not in kept:
            kept[key] = make(weight)
        return kept[key]


@dataclass(frozen=True)
class Geometry:
    """How a step reads its input, and the two linear maps it stands for.

    rank      spatial dimensions; 0 for a linear layer, whose weight is (outputs, inputs)
    transposed  whether it is a transposed convolution, whose weight is (inputs, outputs / groups, ...)
    """

    rank: int
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] = ()
    trailing: tuple[int, ...] = ()

    @classmethod
    def of(cls, node: Node, kernel: tuple[int, ...] = ()) -> Geometry | None:
        """None for a step that is no weighted layer in the usual form. `kernel` is its size, for padding "same"."""
        name = op_name(node.target)
        if name in ("linear", "addmm", "mm", "matmul"):
            return cls(0)
        rank = int(name[-2])
        args = dict(enumerate(node.args))

        def each(position: int, word: str, default: int) -> tuple[int, ...] | None:
            value = args.get(position, node.kwargs.get(word, default))
            values = list(value) if isinstance(value, (tuple, list)) else [value]
            if not all(isinstance(v, int) for v in values):
                return None
            return tuple(values * rank if len(values) == 1 else values)

        if name.startswith("conv_transpose"):
            found = each(3, "stride", 1), each(4, "padding", 0), each(7, "dilation", 1), each(5, "output_padding", 0)
            groups = args.get(6, node.kwargs.get("groups", 1))
            if None in found:
                return None
            stride, padding, dilation, extra = found
            return cls(rank, True, stride, padding, dilation, groups, extra)  # type: ignore[arg-type]
        padding = args.get(4, node.kwargs.get("padding", 0))
        stride, dilation = each(3, "stride", 1), each(5, "dilation", 1)
        groups = args.get(6, node.kwargs.get("groups", 1))
        if stride is None or dilation is None:
            return None
        if isinstance(padding, str):
            pads = [d * (k - 1) for d, k in zip(dilation, kernel, strict=False)] if padding == "same" else [0] * rank
            if len(pads) != rank:
                return None
            trailing = tuple(each % 2 for each in pads)
            even = tuple(each // 2 for each in pads)
            return cls(rank, False, stride, even, dilation, groups, trailing=trailing if any(trailing) else ())
        return cls(rank, False, stride, each(4, "padding", 0) or (), dilation, groups)

    @property
    def pads(self) -> tuple[int, ...]:
        return self.padding or (0,) * self.rank

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The step itself."""
        if self.trailing:
            x = functional.pad(x, [n for extra in reversed(self.trailing) for n in (0, extra)])
        if self.rank == 0:
            return functional.linear(x, weight, bias)
        if self.transposed:
            run = _TRANSPOSED[self.rank - 1]
            return run(x, weight, bias, self.stride, self.pads, self.output_padding, self.groups, self.dilation)
        if self.rank == 2:
            return _CONVOLVE(x, weight, bias, self.stride, self.pads, self.dilation, self.groups)
        run = _FORWARD[self.rank - 1]
        return run(x, weight, bias, self.stride, self.pads, self.dilation, self.groups)

    def back(self, s: Tensor, weight: Tensor, shape: torch.Size, cache: ModifiedWeights) -> Tensor:
        """The transpose of the step without bias, for an input of this shape."""
        if self.trailing:
            spatial = [n + extra for n, extra in zip(shape[2:], self.trailing, strict=True)]
            found = replace(self, trailing=()).back(s, weight, torch.Size([*shape[:2], *spatial]), cache)
            return found[tuple(slice(0, n) for n in shape)]
        if self.rank == 0:
            return s @ weight
        if self.transposed:
            found = _FORWARD[self.rank - 1](s, weight, None, self.stride, self.pads, self.dilation, self.groups)
            return found[tuple(slice(0, n) for n in shape)] if found.shape != shape else found
        kernel = weight.shape[2:]
        reach = [d * (k - 1) - p for d, k, p in zip(self.dilation, kernel, self.pads, strict=True)]
        if self.rank == 2 and all(step == 1 for step in self.stride) and min(reach) >= 0:
            flipped = cache.get(weight, ("flipped", self.groups), lambda w: _flipped(w, self.groups))
            return _CONVOLVE(s, flipped, None, 1, reach, self.dilation, self.groups)
        if self.rank == 2 and max(kernel) == 1 and not any(self.pads) and self.groups == 1:
            flipped = cache.get(weight, ("flipped", 1), lambda w: _flipped(w, 1))
            small = _CONVOLVE(s, flipped, None, 1, 0, 1, 1)
            found = _zeros_like(small, shape)
            found[:, :, :: self.stride[0], :: self.stride[1]] = small
            return found
        if self.rank == 2 and self.groups == 1 and set(self.dilation) == {1} and weight.shape[1] <= _FEW:
            return self._back_by_phase(s, weight, shape, cache)
        left = [
            shape[2 + d]
            - ((s.shape[2 + d] - 1) * self.stride[d] - 2 * self.pads[d] + self.dilation[d] * (kernel[d] - 1) + 1)
            for d in range(self.rank)
        ]
        run = _TRANSPOSED[self.rank - 1]
        limits = [max(a, b) for a, b in zip(self.stride, self.dilation, strict=True)]
        out = [min(extra, limit - 1) for extra, limit in zip(left, limits, strict=True)]
        found = run(s, weight, None, self.stride, self.pads, out, self.groups, self.dilation)
        if out != left:  # rows and columns no window reaches
            rest = [n for extra, had in zip(reversed(left), reversed(out), strict=True) for n in (0, extra - had)]
            found = functional.pad(found, rest)
        return found

    def _back_by_phase(self, s: Tensor, weight: Tensor, shape: torch.Size, cache: ModifiedWeights) -> Tensor:
        """The same as a convolution: rows r, r + stride, ... of its result meet every stride-th row of the kernel only.

        One channel of the convolution for each channel and phase keeps its inner loops busy where images, with their
        three or six channels, would not.
        """
        phases = cache.get(weight, ("phases", self.stride), lambda w: _phases(w, self.stride))
        reach = [n - 1 for n in phases.shape[2:]]
        small = _CONVOLVE(s, phases, None, 1, reach, 1, 1)
        batch, channels = shape[:2]
        rows, columns = small.shape[2:]
        apart = small.reshape(batch, channels, *self.stride, rows, columns)
        found = apart.permute(0, 1, 4, 2, 5, 3).reshape(
            batch, channels, rows * self.stride[0], columns * self.stride[1]
        )
        found = found[:, :, self.pads[0] :, self.pads[1] :][:, :, : shape[2], : shape[3]]
        missing = [shape[2 + d] - found.shape[2 + d] for d in (1, 0)]  # what no window reaches
        return functional.pad(found, [0, missing[0], 0, missing[1]]) if any(missing) else found


#: Up to so many input channels, a strided convolution's transpose is taken phase by phase.
_FEW = 8
_FORWARD = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """The weight of the convolution that is the transpose of one with stride 1."""
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    grouped = weight.reshape(groups, outputs // groups, *weight.shape[1:]).transpose(1, 2)
    found = grouped.reshape(inputs, outputs // groups, *weight.shape[2:])
    return found.flip(tuple(range(2, weight.ndim))).contiguous()


def _phases(weight: Tensor, stride: tuple[int, ...]) -> Tensor:
    """(O, C, ...) -> (C x phases, O, ...): weights of the convolution whose channels are the phases of a transpose."""
    reach = [-(-n // step) for n, step in zip(weight.shape[2:], stride, strict=True)]
    short = [n * step - had for n, step, had in zip(reach, stride, weight.shape[2:], strict=True)]
    whole = functional.pad(weight, [0, short[1], 0, short[0]])
    apart = whole.reshape(*weight.shape[:2], reach[0], stride[0], reach[1], stride[1])
    return apart.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).flip(2, 3).contiguous()


def _zeros_like(like: Tensor, shape: torch.Size) -> Tensor:
    last = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout).zero_()


class Layer:
    """One weighted step with the values of this pass.

    inputs   x as the step read it
    output   z, where a rule asked to keep it, else None
    signed   whether x may be negative
    first    whether it reads the image
    """

    def __init__(
        self,
        geometry: Geometry,
        inputs: Tensor,
        output: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        signed: bool,
        cache: ModifiedWeights,
    ):
        self.geometry = geometry
        self.inputs = inputs
        self.weight = weight
        self.bias = bias
        self.signed = signed
        self._output = output
        self._cache = cache

    @property
    def output(self) -> Tensor:
        """z = W x + b."""
        if self._output is None:
            self._output = self.geometry.apply(self.inputs, self.weight, self.bias)
        return self._output

    @cached_property
    def parts(self) -> Tensor:
        """The inputs as the sign-split rules read them: x where x >= 0, else max(x, 0) beside max(-x, 0)."""
        if not self.signed:
            return self.inputs
        return self._beside(self.inputs.clamp(min=0), self.inputs.neg().clamp_(min=0))

    def modified(self, variant: Variant) -> Tensor:
        """The weight modified element by element, for the inputs as they are."""
        if variant == "own":
            return self.weight
        return self._cache.get(self.weight, variant, _MAKE[variant])

    def split(self, sign: Literal["positive", "negative"]) -> Tensor:
        """The weight that makes the positive (or negative) contributions out of `parts`."""
        if not self.signed:
            return self.modified(sign)
        other: Variant = "negative" if sign == "positive" else "positive"
        return self._cache.get(
            self.weight, ("split", sign), lambda w: self._beside_weights(_MAKE[sign](w), -_MAKE[other](w))
        )

    def mixed(self, positive: float, negative: float) -> Tensor:
        """That many times the weights of the positive contributions, plus those of the negative ones."""
        if (positive, negative) == (1, 0):
            return self.split("positive")
        key = ("mixed", self.signed, positive, negative)
        return self._cache.get(
            self.weight, key, lambda w: positive * self.split("positive") + negative * self.split("negative")
        )

    def raised(self, own: float, positive: float) -> Tensor:
        """own W + positive max(W, 0), for the inputs as they are."""
        return self._cache.get(self.weight, ("raised", own, positive), lambda w: own * w + positive * w.clamp(min=0))

    def both(self, u: tuple[float, float], v: tuple[float, float]) -> Tensor:
        """One weight above the other: one transpose takes a message for each. For one group only."""
        dim = 1 if self.geometry.transposed else 0
        key = ("both", self.signed, u, v)
        return self._cache.get(self.weight, key, lambda w: torch.cat([self.mixed(*u), self.mixed(*v)], dim))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.geometry.apply(x, weight, bias)

    def back(self, s: Tensor, weight: Tensor, shape: torch.Size | None = None) -> Tensor:
        """The transpose, for an input of the given shape (None: that of `inputs`)."""
        return self.geometry.back(s, weight, shape or self.inputs.shape, self._cache)

    def back_by_sign(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The transposes through max(W, 0) and through min(W, 0), for the inputs as they are, as one."""
        both = self._cache.get(self.weight, "signs", lambda w: self._beside_weights(w.clamp(min=0), w.clamp(max=0)))
        shape = list(self.inputs.shape)
        shape[self._channel] *= 2
        return self._apart(self.back(s, both, torch.Size(shape)))

    def positive_bias(self) -> Tensor | None:
        return None if self.bias is None else self._cache.get(self.bias, "positive", _MAKE["positive"])

    def positive_contributions(self, bias: bool) -> Tensor:
        """W+ x+ + W- x-, and the positive bias: (B, O, ...)."""
        return self.forward(self.parts, self.split("positive"), self.positive_bias() if bias else None)

    def merged(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """(U, x) with x U the relevance, from what came back for `parts`."""
        if not self.signed:
            return found, self.inputs
        first, second = self._apart(found)
        return torch.where(self.inputs >= 0, first, second.neg()), self.inputs

    def send_both(self, messages: Tensor, u: tuple[float, float], v: tuple[float, float]) -> Tensor:
        """Messages (B, 2O, ...), one after the other, each transposed through its own weights, and added."""
        shape = self.parts.shape
        if self.geometry.groups == 1:
            return self.back(messages, self.both(u, v), shape)
        one, other = messages.chunk(2, dim=1)
        return self.back(one, self.mixed(*u), shape) + self.back(other, self.mixed(*v), shape)

    # Parts lie beside one another within their group: channels of group g stay in group g.

    def _beside(self, one: Tensor, other: Tensor) -> Tensor:
        groups = self.geometry.groups
        if groups == 1:
            return torch.cat([one, other], self._channel)
        pairs = [x.reshape(x.shape[0], groups, -1, *x.shape[2:]) for x in (one, other)]
        return torch.cat(pairs, 2).flatten(1, 2)

    def _apart(self, both: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.geometry.groups
        if groups == 1:
            one, other = both.chunk(2, self._channel)
            return one, other
        pairs = both.reshape(both.shape[0], groups, 2, -1, *both.shape[2:])
        return pairs[:, :, 0].flatten(1, 2), pairs[:, :, 1].flatten(1, 2)

    def _beside_weights(self, one: Tensor, other: Tensor) -> Tensor:
        if not self.geometry.transposed:
            return torch.cat([one, other], 1)
        groups = self.geometry.groups
        pairs = [w.reshape(groups, -1, *w.shape[1:]) for w in (one, other)]
        return torch.cat(pairs, 1).flatten(0, 1)

    @property
    def _channel(self) -> int:
        return 1 if self.geometry.rank else -1


def weight_and_bias(node: Node, get: Callable[[int], Any]) -> tuple[Tensor, Tensor | None, int] | None:
    """Weight and bias of a step, and the position of the argument that is its input; None for another form."""
    name = op_name(node.target)
    args = list(node.args)
    if name == "addmm":
        bias, _, weight = args[:3]
        if node.kwargs or not isinstance(weight, Ref):
            return None
        return get(weight.index).t(), map_refs(bias, get), 1
    if name in ("mm", "matmul"):
        weight = args[1]
        return (get(weight.index).t(), None, 0) if isinstance(weight, Ref) and get(weight.index).ndim == 2 else None
    bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
    return get(args[1].index), map_refs(bias, get), 0
