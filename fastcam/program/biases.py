"""Everything a network adds on the way from a value to its scores: biases of layers, constants in the code.

    T  =  sum x dT/dx  +  sum over biases of  b dT/db

for piecewise-linear networks, whose score is a sum over paths that start at the input or at a bias. The gradient at a
step's result is the gradient of whatever the step adds, so one backward pass gives all products; each is handed on as
soon as its gradient exists and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastcam._dtypes import accumulation_dtype

from .capture import Program
from .execute import Schedule
from .forward import Graph
from .layouts import channel_dims
from .nodes import Node, Ref, following_values, map_refs, op_name, refs_in

__all__ = ["BiasedGraph", "Biases", "Visit"]

#: Called with bias x gradient and whether it is a feature map (B, K, *spatial) or something else (B, n).
Visit: TypeAlias = Callable[[Tensor, bool], None]

#: Steps with a bias of one number a channel: where it stands among the arguments.
_CHANNEL_BIAS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), 2),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 2),
    **dict.fromkeys(("batch_norm", "instance_norm"), 2),
    "native_group_norm": 2,
    "group_norm": 3,
}
#: Steps with a bias of the result's last dimensions.
_LAST_BIAS = {"linear": 2, "layer_norm": 3, "native_layer_norm": 3}
#: Steps that pass on, or add, what they read; each with the arguments that are passed on.
_SUMS = {"add": (0, 1), "sub": (0, 1), "rsub": (0, 1), "addmm": (0,), "baddbmm": (0,), "cat": (0,), "stack": (0,)}


class Biases:
    """The steps between value `feature` and the outputs of a program that add something, ready to run.

    What does not follow from `feature` is a constant, so that the sum above also holds from a layer on.
    """

    def __init__(self, program: Program, feature: int, head: list[Node]):
        self._program = program
        self._feature = feature
        following = following_values(feature, head)
        channels = channel_dims(program, feature, head)
        self._adding = {
            node.index: _Adding(node, following, channels.get(node.index))
            for node in head
            if node.index in following and _adds(node, following)
        }
        outputs = program.output_indices
        self._schedule = Schedule(program, [node.index for node in head], outputs | {feature}, in_place=False)

    def run(self, values: dict[int, Any], layer: str) -> tuple[Any, BiasedGraph]:
        """The output and the graph behind it, on the features `values` holds; those become the graph's leaf."""
        leaf = values[self._feature].detach().requires_grad_()
        values[self._feature] = leaf
        batch, sink = leaf.shape[0], _Sink()

        def watch(index: int) -> None:
            adding = self._adding.get(index)
            if adding is None:
                return
            result = values[index] if isinstance(values[index], Tensor) else values[index][0]
            if result.requires_grad:
                term = adding.term(values.__getitem__)
                result.register_hook(lambda gradient: sink.take(adding, term, gradient, batch))

        with torch.enable_grad():
            self._schedule.run(values, watch=watch)
            output = self._program.result(values)
        return output, BiasedGraph(leaf, output, layer, sink)


class BiasedGraph(Graph):
    """A recorded head that also tells the gradients of its biases."""

    def __init__(self, leaf: Tensor, output: Any, layer: str, sink: _Sink):
        super().__init__(leaf, output, layer)
        self._sink = sink

    def full_gradients(self, targets: Any, visits: Sequence[Visit]) -> Tensor:
        """As `gradients`; every bias is told to the visitor of the target's column, in an order that does not vary."""

        def start(number: int) -> None:
            self._sink.visit = visits[number]

        try:
            return self.gradients(targets, start)
        finally:
            self._sink.visit = None


class _Sink:
    """Where the hooks of a graph send what they see; it holds no tensor, so hooks and graph make no cycle."""

    def __init__(self) -> None:
        self.visit: Visit | None = None

    def take(self, adding: _Adding, term: Tensor, gradient: Tensor, batch: int) -> None:
        if self.visit is not None:
            dtype = accumulation_dtype(gradient.dtype)
            self.visit(*adding.arranged(term.to(dtype) * gradient.to(dtype), batch))


class _Adding:
    """A step that adds something.

    channel  the dimension of the channels where the result is a feature map, or None
    """

    def __init__(self, node: Node, following: set[int], channel: int | None):
        self.node = node
        self.channel = channel
        self._following = following

    def term(self, get: Callable[[int], Any]) -> Tensor:
        """What the step adds, broadcast against its result."""
        node = self.node
        name = op_name(node.target)
        if _stored_statistics(node):
            return _by_channel(self._norm_offset(name, get), get(node.args[0].index))
        if name in _CHANNEL_BIAS:
            return _by_channel(get(_bias(node, _CHANNEL_BIAS[name])), get(node.args[0].index))
        if name in _LAST_BIAS:
            return get(_bias(node, _LAST_BIAS[name]))
        spread = name not in ("add", "sub", "rsub")

        def constant(ref: int) -> Any:
            if ref not in self._following:
                return get(ref)
            zero = get(ref).new_zeros(())
            return zero.expand(get(ref).shape) if spread else zero

        found = node.target(*map_refs(node.args, constant), **map_refs(node.kwargs, constant))
        assert isinstance(found, Tensor)
        return found.detach()

    def _norm_offset(self, name: str, get: Callable[[int], Any]) -> Tensor:
        """beta - mean gamma / sqrt(variance + eps)."""
        gamma, beta, mean, variance = map_refs(self.node.args[1:5], get)
        factor = (variance + self.node.args[6 if name.startswith("_") else 7]).rsqrt()
        offset = -mean * (factor if gamma is None else factor * gamma)
        return offset if beta is None else offset + beta

    def arranged(self, product: Tensor, batch: int) -> tuple[Tensor, bool]:
        if self.channel is not None and product.shape[0] == batch:
            return product.movedim(self.channel, 1), True
        follows = [dim for dim, size in enumerate(self.node.shape or ()) if size is None] or [0]
        if product.shape[follows[0]] % batch:
            raise RuntimeError(f"the batch cannot be told apart in the result of {self.node}")
        return product.movedim(follows[0], 0).reshape(batch, -1), False


def _stored_statistics(node: Node) -> bool:
    """Whether the step is a norm by stored statistics, whose mean is a bias too."""
    name = op_name(node.target)
    if name in ("batch_norm", "instance_norm"):
        return node.args[5] is False  # training, use_input_stats
    return name == "_native_batch_norm_legit_no_training"


def _by_channel(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.reshape(-1, *(1,) * (like.ndim - 2))


def _bias(node: Node, position: int) -> int:
    """Index of the bias that `node` reads, or -1."""
    found = node.args[position] if len(node.args) > position else node.kwargs.get("bias")
    return found.index if isinstance(found, Ref) else -1


def _adds(node: Node, following: set[int]) -> bool:
    name = op_name(node.target)
    if _stored_statistics(node):
        return True
    if name in _CHANNEL_BIAS or name in _LAST_BIAS:
        return _bias(node, _CHANNEL_BIAS.get(name, _LAST_BIAS.get(name, 0))) >= 0
    return any(_is_constant(part, following) for at in _SUMS.get(name, ()) for part in _parts(node.args[at]))


def _parts(argument: Any) -> Iterable[Any]:
    return argument if isinstance(argument, (list, tuple)) else [argument]


def _is_constant(part: Any, following: set[int]) -> bool:
    refs = list(refs_in(part))
    return refs[0] not in following if refs else isinstance(part, (int, float)) and part != 0
