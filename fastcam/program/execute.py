"""Running nodes: the weights a program reads and the schedules that compute its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastcam._decompositions import copied

from .capture import Program
from .freshness import Freshness
from .nodes import ACTIVATIONS, FRESH, LEAVES, Node, Ref, map_refs, op_name, refs_in
from .packed import PackedConvolution
from .tails import find_tails

__all__ = ["Schedule", "Weights"]

_IN_PLACE = ACTIVATIONS | {"add", "sub", "mul", "div"}

#: Operators that autograd has no derivative of, written out. `copy` is what a write into a slice becomes.
_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {torch.ops.aten.copy.default: copied}


#: The same operators by PyTorch's own bindings, which find them in two thirds of the time.
_BOUND: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.add_.Tensor: torch.Tensor.add_,
    torch.ops.aten.batch_norm.default: torch.batch_norm,
    torch.ops.aten.conv1d.default: torch.conv1d,
    torch.ops.aten.conv2d.default: torch.conv2d,
    torch.ops.aten.conv3d.default: torch.conv3d,
    torch.ops.aten.flatten.using_ints: torch.flatten,
    torch.ops.aten.linear.default: torch.nn.functional.linear,
    torch.ops.aten.max_pool2d.default: torch.max_pool2d,
    torch.ops.aten.mul.Tensor: torch.mul,
    torch.ops.aten.relu.default: torch.relu,
    torch.ops.aten.relu_.default: torch.relu_,
    torch.ops.aten.view.default: torch.Tensor.view,
}


class Weights:
    """The leaves of a program, read from the user's model at every call.

    With `dtype` or `channels_last`, or where batch norms are folded, converted copies are kept and made anew for each
    leaf whose sources have changed (`fastcam.program.freshness`). With `lasting` too, leaves are the same tensor
    objects from call to call until they change, so that more can be made of them and kept, and `finite` tells whether
    those on the CPU were all finite at the latest call.
    """

    def __init__(
        self,
        program: Program,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        lasting: bool = False,
    ):
        modules = dict(model.named_modules(remove_duplicate=False))
        needed = program.ancestors(program.output_indices)
        self._folded = {n.index: n.target for n in program.nodes if n.kind == "folded" and n.index in needed}
        self._needed = [n.index for n in program.nodes if n.kind in LEAVES and n.kind != "input" and n.index in needed]
        sources = needed | {leaf for folded in self._folded.values() for leaf in folded.leaves()}
        self._constants = {
            n.index: program.constants[n.target] for n in program.nodes if n.kind == "constant" and n.index in sources
        }
        self._slots: list[tuple[int, dict[str, Any], str]] = []
        for node in program.nodes:
            if node.kind in ("parameter", "buffer") and node.index in sources:
                path, _, name = node.target.rpartition(".")
                owner = modules[path]
                slots = owner._parameters if node.kind == "parameter" else owner._buffers
                self._slots.append((node.index, slots, name))
        self._dtype = dtype
        self._channels_last = channels_last
        self._lasting = lasting
        self._converted: dict[int, tuple[Hashable, torch.Tensor]] = {}
        self._freshness = Freshness()
        self._odd: set[int] = set()

    @property
    def finite(self) -> bool:
        return not self._odd

    def values(self) -> dict[int, torch.Tensor]:
        """Node index -> tensor, detached, for every leaf the output needs."""
        live = self.sources()
        if self._dtype is None and not self._channels_last and not self._folded and not self._lasting:
            return live
        keys = self._freshness.keys(live)
        return {index: self._convert(index, live, keys) for index in self._needed}

    def made_of(self, sources: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """As `values`, of other tensors in the place of `sources()`; nothing is kept."""
        return {index: self._make(index, sources) for index in self._needed}

    def version(self) -> Hashable:
        """Equal to what it was exactly when every leaf is (`fastcam.program.freshness`)."""
        return tuple(self._freshness.keys(self.sources()).values())

    def sources(self) -> dict[int, torch.Tensor]:
        """Node index -> tensor, detached, for every leaf of the model that `values` are made of."""
        live = {index: owner[name].detach() for index, owner, name in self._slots}
        live.update(self._constants)
        return live

    def own(self, indices: Container[int]) -> dict[int, torch.Tensor]:
        """Node index -> the model's own tensor, for those of `sources()` among `indices`."""
        live = {index: owner[name] for index, owner, name in self._slots if index in indices}
        live.update((index, tensor) for index, tensor in self._constants.items() if index in indices)
        return live

    def _convert(self, index: int, live: dict[int, torch.Tensor], keys: dict[int, Hashable]) -> torch.Tensor:
        folded = self._folded.get(index)
        key = tuple(keys[source] for source in (folded.leaves() if folded is not None else [index]))
        kept = self._converted.get(index)
        if kept is not None and kept[0] == key:
            return kept[1]
        made = self._make(index, live)
        self._converted[index] = (key, made)
        if self._lasting and made.device.type == "cpu" and made.is_floating_point():
            # A finite sum is of finite numbers alone, and read in one pass; the sum of large ones may be infinite.
            finite = math.isfinite(made.sum()) or bool(made.isfinite().all())
            (self._odd.discard if finite else self._odd.add)(index)
        return made

    def _make(self, index: int, live: dict[int, torch.Tensor]) -> torch.Tensor:
        folded = self._folded.get(index)
        tensor = folded.compute(live) if folded is not None else live[index]
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        layout = torch.preserve_format
        if self._channels_last and tensor.ndim in (4, 5):
            layout = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
        return tensor.to(dtype=dtype, memory_format=layout)


@dataclass(frozen=True)
class _Nested:
    """An argument with references somewhere inside; others are passed on as they are."""

    value: Any


class Schedule:
    """Some nodes of a program in execution order, with what may be forgotten after each.

    program   the program
    indices   nodes to run; leaves among them are expected to be given
    keep      values that must survive the run
    in_place  overwrite inputs nobody reads any more (only without autograd); results are the same, peak memory lower
    packed    run convolutions on weights kept in oneDNN's own order, with residuals and ReLUs behind them inside
              (only without autograd)
    """

    def __init__(
        self, program: Program, indices: Iterable[int], keep: frozenset[int], in_place: bool, packed: bool = False
    ):
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
        self._steps: list[tuple[int, Callable[..., Any], tuple[Any, ...], Any, tuple[int, ...], Node]] = []
        #: Values that exist only inside a fused step, by its result; all have the result's shape.
        self._inside: dict[int, tuple[int, ...]] = {}
        # Tails run earlier than their nodes would, never later, so a last reader stays one.
        tails = find_tails(program, chosen, keep) if packed else {}
        fused = {index for tail in tails.values() for index in tail.nodes}
        added = {index: tail.other for index, tail in tails.items() if tail.other is not None}
        last.update({other: index for index, other in added.items()})
        for node in chosen:
            if node.index in fused:
                continue
            function: Callable[..., Any] = _WRITTEN_OUT.get(node.target, node.target)
            kwargs, result = node.kwargs, node.index
            if packed and op_name(node.target) == "conv2d":
                tail = tails.get(node.index)
                function = PackedConvolution(relu=tail is not None and tail.relu)
                if tail is not None:
                    result = tail.nodes[-1]
                    self._inside[result] = (node.index, *tail.nodes[:-1])
                kwargs = kwargs | ({"other": Ref(added[node.index])} if node.index in added else {})
            elif in_place:
                function = self._overwriting(program, node, made, kept_storage) or function
            function = _BOUND.get(function, function)
            reads = {*node.refs(), *refs_in(kwargs)}
            dead = tuple({r for r in reads if last[r] == node.index and r not in keep and r in made})
            args = tuple(_Nested(a) if type(a) is not Ref and any(True for _ in refs_in(a)) else a for a in node.args)
            named = _Nested(kwargs) if any(True for _ in refs_in(kwargs)) else kwargs
            self._steps.append((result, function, args, named, dead, node))
        self._nodes = chosen
        self._given = sorted(set(last) - made)
        self._kept = sorted(made & keep)
        self._compiled: Callable[..., Any] | None = None

    def run(
        self,
        values: dict[int, Any],
        compiled: bool = False,
        shapes: dict[int, torch.Size] | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        """Compute the nodes into `values`, which holds their inputs; values no longer needed are removed from it.

        shapes  filled with the shape of every tensor computed, where given (not with `compiled`)
        watch   called with the index of every value computed, while all that its step read is there (likewise)
        """
        if compiled and self._steps:
            if self._compiled is None:
                self._compiled = torch.compile(self._as_module())
            values.update(zip(self._kept, self._compiled(*(values[i] for i in self._given)), strict=True))
            return
        get = values.__getitem__
        for index, function, args, kwargs, dead, node in self._steps:
            try:
                values[index] = function(
                    *[get(a.index) if type(a) is Ref else map_refs(a.value, get) if type(a) is _Nested else a
                      for a in args],
                    **(map_refs(kwargs.value, get) if type(kwargs) is _Nested else kwargs),
                )  # fmt: skip
            except Exception as error:
                raise _located(error, node) from error
            if shapes is not None and isinstance(values[index], torch.Tensor):
                for one in (index, *self._inside.get(index, ())):
                    shapes[one] = values[index].shape
            if watch is not None:
                watch(index)
            for value in dead:
                del values[value]

    def _as_module(self) -> torch.fx.GraphModule:
        """The schedule as a function of the values it is given, returning the values it keeps, for torch.compile."""
        graph = torch.fx.Graph()
        made: dict[int, Any] = {index: graph.placeholder(f"v{index}") for index in self._given}
        for node in self._nodes:
            mapped = map_refs(node.args, made.__getitem__), map_refs(node.kwargs, made.__getitem__)
            made[node.index] = graph.call_function(_WRITTEN_OUT.get(node.target, node.target), *mapped)
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
            and source.kind in FRESH
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
