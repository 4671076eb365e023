"""Running nodes: the weights a program reads and the schedules that compute its values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .capture import Program
from .nodes import ACTIVATIONS, LEAVES, Node, Ref, map_refs, op_name, refs_in

__all__ = ["Schedule", "Weights"]

#: Kinds whose operators always return fresh memory, so that their result may be overwritten once it is no longer read.
_FRESH = frozenset({"conv", "linear", "norm", "add", "mul", "activation"})
_IN_PLACE = ACTIVATIONS | {"add", "sub", "mul", "div"}


class Weights:
    """The leaves of a program, read from the user's model at every call.

    With `dtype` or `channels_last` converted copies are kept and made anew for each tensor that has changed: its
    storage, its version counter, or (on the CPU, where it costs a few milliseconds) a hash of its bytes, since writes
    through `.data` leave no other trace.
    """

    def __init__(
        self, program: Program, model: nn.Module, dtype: torch.dtype | None = None, channels_last: bool = False
    ):
        modules = dict(model.named_modules(remove_duplicate=False))
        self._constants = {n.index: program.constants[n.target] for n in program.nodes if n.kind == "constant"}
        self._slots: list[tuple[int, dict[str, Any], str]] = []
        for node in program.nodes:
            if node.kind in ("parameter", "buffer"):
                path, _, name = node.target.rpartition(".")
                owner = modules[path]
                self._slots.append(
                    (node.index, owner._parameters if node.kind == "parameter" else owner._buffers, name)
                )
        self._dtype = dtype
        self._channels_last = channels_last
        self._converted: dict[int, tuple[Any, torch.Tensor]] = {}

    def values(self) -> dict[int, torch.Tensor]:
        """Node index -> tensor, detached, for every parameter, buffer and constant."""
        live = {index: owner[name].detach() for index, owner, name in self._slots}
        live.update(self._constants)
        if self._dtype is None and not self._channels_last:
            return live
        return {index: self._convert(index, tensor) for index, tensor in live.items()}

    def _convert(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        key = _identity(tensor)
        kept = self._converted.get(index)
        if kept is not None and kept[0] == key:
            return kept[1]
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        layout = torch.preserve_format
        if self._channels_last and tensor.ndim in (4, 5):
            layout = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
        made = tensor.to(dtype=dtype, memory_format=layout)
        self._converted[index] = (key, made)
        return made


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    content = None
    if tensor.device.type == "cpu" and tensor.numel():
        words = tensor
        bytes_, start = (n * tensor.element_size() for n in (tensor.numel(), tensor.storage_offset()))
        if tensor.is_contiguous() and bytes_ % 8 == 0 and start % 8 == 0:
            words = tensor.flatten().view(torch.int64)  # four times as fast: as the memory can be read
        content = int(torch.hash_tensor(words).item())
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), content


class Schedule:
    """Some nodes of a program in execution order, with what may be forgotten after each.

    program   the program
    indices   nodes to run; leaves among them are expected to be given
    keep      values that must survive the run
    in_place  overwrite inputs nobody reads any more (only without autograd); results are the same, peak memory lower
    """

    def __init__(self, program: Program, indices: Iterable[int], keep: frozenset[int], in_place: bool):
        chosen = [
            program.nodes[i] for i in sorted(indices) if program.nodes[i].kind not in LEAVES and i != program.input
        ]
        last = {ref: node.index for node in chosen for ref in node.refs()}
        self._last_of_storage: dict[int, int] = {}
        for ref, at in last.items():
            root = program.storage[ref]
            self._last_of_storage[root] = max(at, self._last_of_storage.get(root, -1))
        made = {node.index for node in chosen}
        kept_storage = {program.storage[i] for i in keep}
        self._steps: list[tuple[int, Callable[..., Any], tuple[Any, ...], dict[str, Any], tuple[int, ...], Node]] = []
        for node in chosen:
            function = node.target
            if in_place:
                function = self._overwriting(program, node, made, kept_storage) or function
            dead = tuple({r for r in node.refs() if last[r] == node.index and r not in keep and r in made})
            self._steps.append((node.index, function, node.args, node.kwargs, dead, node))
        self._given = sorted(set(last) - made)
        self._kept = sorted(made & keep)
        self._compiled: Callable[..., Any] | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def run(self, values: dict[int, Any], compiled: bool = False) -> None:
        """Compute the nodes into `values`, which holds their inputs; values no longer needed are removed from it."""
        if compiled and self._steps:
            if self._compiled is None:
                self._compiled = torch.compile(self._as_module())
            values.update(zip(self._kept, self._compiled(*(values[i] for i in self._given)), strict=True))
            return
        get = values.__getitem__
        for index, function, args, kwargs, dead, node in self._steps:
            try:
                values[index] = function(
                    *[get(a.index) if type(a) is Ref else map_refs(a, get) for a in args],
                    **{k: map_refs(v, get) for k, v in kwargs.items()},
                )
            except Exception as error:
                raise _located(error, node) from error
            for value in dead:
                del values[value]

    def _as_module(self) -> torch.fx.GraphModule:
        """The schedule as a function of the values it is given, returning the values it keeps, for torch.compile."""
        graph = torch.fx.Graph()
        made: dict[int, Any] = {index: graph.placeholder(f"v{index}") for index in self._given}
        for index, _, args, kwargs, _, node in self._steps:
            mapped = map_refs(args, made.__getitem__), map_refs(kwargs, made.__getitem__)
            made[index] = graph.call_function(node.target, *mapped)
        graph.output(tuple(made[index] for index in self._kept))
        return torch.fx.GraphModule(torch.nn.Module(), graph)

    def _overwriting(
        self, program: Program, node: Node, made: set[int], kept_storage: set[int]
    ) -> torch._ops.OpOverload | None:
        """The in-place twin of `node`, where overwriting its first argument can be seen by nobody."""
        if op_name(node.target) not in _IN_PLACE or not node.args or not isinstance(node.args[0], Ref):
            return None
        source = program.nodes[node.args[0].index]
        safe = (
            source.index in made
            and source.kind in _FRESH
            and program.storage[source.index] == source.index
            and source.index not in kept_storage
            and self._last_of_storage[source.index] == node.index
            and source.shape == node.shape
            and source.dtype == node.dtype
            and source.index not in refs_in(node.args[1:])
        )
        if not safe:
            return None
        packet = getattr(torch.ops.aten, op_name(node.target) + "_", None)
        return getattr(packet, node.target._overloadname, None) if packet is not None else None


def _located(error: Exception, node: Node) -> Exception:
    """The same kind of error, where it takes a message, with the node that raised it at the end."""
    try:
        return type(error)(f"{error}\nwhile running {node}")
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\nwhile running {node}")
