"""The vocabulary of a captured network: `Node`, `Ref` and the table that gives every ATen operator its kind.

A `Program` is a flat list of nodes in execution order. A node is one ATen call (or one input, parameter, buffer or
constant); its arguments name earlier nodes by `Ref`. The list is functional: no node writes into a value that another
node reads, whatever in-place spelling the user's code had.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["ACTIVATIONS", "FRESH", "LEAVES", "Node", "Ref", "following_values", "kind_of", "map_refs", "op_name"]
__all__ += ["reads_size_alone", "refs_in"]

LEAVES = frozenset({"input", "parameter", "buffer", "constant", "folded"})

_KINDS = {
    "conv": "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    "linear": "linear",
    "matmul": "matmul mm bmm addmm baddbmm einsum",
    "norm": "batch_norm layer_norm group_norm instance_norm rms_norm _native_batch_norm_legit_no_training "
    "native_layer_norm native_group_norm",
    "activation": "relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish sigmoid hardsigmoid hardswish tanh "
    "softplus softsign log_sigmoid prelu rrelu threshold clamp clamp_min clamp_max",
    "pool": "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "max_pool2d_with_indices max_pool3d_with_indices fractional_max_pool2d lp_pool2d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d",
    "reduce": "mean sum amax amin max min logsumexp norm linalg_vector_norm var std prod",
    "add": "add sub rsub",
    "mul": "mul div",
    "cat": "cat stack concat",
    "softmax": "softmax log_softmax _softmax _log_softmax",
    "reshape": "view reshape flatten unflatten _unsafe_view squeeze unsqueeze permute transpose t mT expand expand_as "
    "view_as movedim swapaxes contiguous clone alias detach slice select narrow split split_with_sizes chunk unbind "
    "tensor_split to _to_copy roll flip pixel_shuffle pixel_unshuffle channel_shuffle type_as getitem repeat tile",
    "pad": "pad constant_pad_nd reflection_pad2d replication_pad2d",
    "resize": "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa",
    "attention": "scaled_dot_product_attention",
    "size": "sym_size sym_numel sym_stride",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}

#: Elementwise activations that have an in-place twin; used to save a buffer where the input is no longer needed.
ACTIVATIONS = frozenset(_KINDS["activation"].split())

_SIZE_ALONE_NAMES = """
zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty fill zero
"""
_SIZE_ALONE = frozenset(_SIZE_ALONE_NAMES.split())

#: Kinds whose operators always return fresh memory, so that their result may be overwritten once it is no longer read.
FRESH = frozenset({"conv", "linear", "norm", "add", "mul", "activation"})


@dataclass(frozen=True, slots=True)
class Ref:
    """The value produced by node `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Node:
    """One step of a captured network.

    `kind` groups operators ("conv", "norm", "activation", "pool", "add", ..., "other"); leaves are "input",
    "parameter", "buffer" and "constant", whose `target` is the dotted name in the user's model, and "folded", a weight
    made from others (`fastcam.program.fold`). `module` is the dotted
    path of the module whose code made the call and `where` the line of that code, both for error messages. `shape`
    holds ints, or None where the size follows the batch; it is None for values that are not tensors.
    """

    index: int
    name: str
    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    where: str
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype | None

    def refs(self) -> Iterator[int]:
        """Indices of the values this node reads, in argument order."""
        yield from refs_in(self.args)
        yield from refs_in(self.kwargs)

    def __str__(self) -> str:
        place = f" in module '{self.module}'" if self.module else ""
        return f"{self.name} ({op_name(self.target)}){place}{', ' + self.where if self.where else ''}"


def op_name(target: Any) -> str:
    """Bare operator name: `aten.relu_.default` -> "relu_", `operator.getitem` -> "getitem"."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def kind_of(target: Any) -> str:
    """Kind of an operator; in-place spellings count as their functional twin."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace != "aten":
        return "other"
    if not isinstance(target, torch._ops.OpOverload) and target is not operator.getitem:
        return "size" if getattr(target, "__module__", "") == "_operator" else "other"
    name = op_name(target)
    return _KIND_OF.get(name) or _KIND_OF.get(name.removesuffix("_"), "other")


def refs_in(value: Any) -> Iterator[int]:
    """Indices of all `Ref`s inside nested tuples, lists, dicts and slices."""
    if isinstance(value, Ref):
        yield value.index
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from refs_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs_in(item)
    elif isinstance(value, slice):
        yield from refs_in((value.start, value.stop, value.step))


def reads_size_alone(node: Node, varying: Iterable[int]) -> bool:
    """Whether the step makes constants in the shape of its first argument: `zeros_like`, or a number written over all
    of it. `varying` are the values that may differ; a written tensor must not be one of them."""
    return op_name(node.target) in _SIZE_ALONE and set(varying).isdisjoint(refs_in((node.args[1:], node.kwargs)))


def following_values(start: int, nodes: Iterable[Node]) -> set[int]:
    """Indices of `start` and of all floats among `nodes`, in order, that are computed from its numbers.

    What is made from sizes, comparisons or integers alone does not follow: no gradient goes through it.
    """
    found = {start}
    for node in nodes:
        real = node.kind != "size" and (node.dtype is None or node.dtype.is_floating_point)
        if real and not found.isdisjoint(node.refs()) and not reads_size_alone(node, found):
            found.add(node.index)
    return found


def map_refs(value: Any, replace: Callable[[int], Any]) -> Any:
    """A copy of `value` with every `Ref` replaced by `replace(index)`."""
    if isinstance(value, Ref):
        return replace(value.index)
    if isinstance(value, (tuple, list)):
        return type(value)(map_refs(item, replace) for item in value)
    if isinstance(value, dict):
        return {key: map_refs(item, replace) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_refs(part, replace) for part in (value.start, value.stop, value.step)))
    return value
