"""Rewriting an exported graph into functional nodes.

User code writes in place (`nn.ReLU(inplace=True)`, `x += y`). In the node list each such write becomes its functional
twin and later readers read the new value, so a layer's output means the same thing whether the code after it writes
into it or not. Where a write goes through a view that others still read, `NeedsDecomposition` asks for
torch.export's own (slower) functionalisation.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .nodes import LEAVES, Node, Ref, kind_of, op_name

__all__ = ["Functionalizer", "NeedsDecomposition"]

_ASSERTIONS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range"})


class NeedsDecomposition(Exception):
    """A write that cannot be undone by renaming."""


class Functionalizer:
    """Builds the node list of a `Program` from an fx graph, one fx node at a time and in order."""

    def __init__(self, graph: fx.Graph):
        self.nodes: list[Node] = []
        self.storage: list[int] = []
        self._now: dict[fx.Node, int] = {}  # the value an fx node stands for at this point of the walk
        self._born: dict[fx.Node, int] = {}  # the value it stood for when it was computed
        self._position = {node: position for position, node in enumerate(graph.nodes)}
        self._calls: dict[tuple[str, str], list[fx.Node]] = {}

    def leaf(self, node: fx.Node, kind: str, target: str) -> int:
        return self._append(node, kind, target, (), {}, storage=None)

    def call(self, node: fx.Node) -> None:
        for key, entry in node.meta.get("nn_module_stack", {}).items():
            self._calls.setdefault((entry[0], key), []).append(node)
        name = op_name(node.target)
        if name in _ASSERTIONS:
            return
        if name in ("dropout", "dropout_", "feature_dropout", "alpha_dropout") and node.args[2] is False:
            source = node.args[0]
            self._now[node] = self._born[node] = self._now[source]
        elif written := _written_argument(node):
            self._write(node, written)
        else:
            args, kwargs = self.arguments(node.args), self.arguments(node.kwargs)
            self._append(node, kind_of(node.target), node.target, args, kwargs, storage=self._shared_storage(node))

    def arguments(self, value: Any) -> Any:
        """fx arguments with every fx node replaced by a `Ref` to the value it stands for now."""
        return fx.node.map_aggregate(value, lambda item: Ref(self._now[item]) if isinstance(item, fx.Node) else item)

    def shape_of(self, index: int) -> tuple[int | None, ...]:
        shape = self.nodes[index].shape
        assert shape is not None
        return shape

    def layers(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """For each module path and each of its calls, the values computed inside that are read outside."""
        found: dict[str, list[tuple[int, ...]]] = {}
        for (path, _), members in self._calls.items():
            inside = set(members)
            leaving = [m for m in members if m in self._born and any(user not in inside for user in m.users)]
            values = dict.fromkeys(self._born[m] for m in leaving if isinstance(m.meta.get("val"), torch.Tensor))
            found.setdefault(path, []).append(tuple(values))
        return {path: tuple(calls) for path, calls in found.items()}

    def _append(self, node: fx.Node, kind: str, target: Any, args: Any, kwargs: Any, storage: int | None) -> int:
        index = len(self.nodes)
        value = node.meta.get("val")
        tensor = value if isinstance(value, torch.Tensor) else None
        self.nodes.append(
            Node(
                index=index,
                name=node.name,
                kind=kind,
                target=target,
                args=tuple(args),
                kwargs=dict(kwargs),
                module=_module_path(node),
                where=_source_line(node) if kind not in LEAVES else "",
                shape=None if tensor is None else tuple(_fixed_size(size) for size in tensor.shape),
                dtype=None if tensor is None else tensor.dtype,
            )
        )
        self.storage.append(index if storage is None else storage)
        self._now[node] = self._born[node] = index
        return index

    def _write(self, node: fx.Node, written: fx.Node) -> None:
        """`written` is changed in place: compute the new value and let all later readers of the old one read it."""
        old = self._now[written]
        source = self.nodes[self.storage[old]]
        if source.kind in LEAVES and source.kind != "input":
            raise NeedsDecomposition(f"{node.name} writes into {source.kind} {source.target}")
        here = self._position[node]
        for other, value in self._now.items():
            shares = value != old and self.storage[value] == self.storage[old]
            if shares and any(self._position[user] > here for user in other.users):
                raise NeedsDecomposition(f"{node.name} writes into memory that {other.name} shares")
        twin = _functional_twin(node.target)
        if twin is None:
            raise NeedsDecomposition(f"{node.name} has no functional twin")
        aliases = [other for other, value in self._now.items() if value == old]
        args, kwargs = self.arguments(node.args), self.arguments(node.kwargs)
        new = self._append(node, kind_of(twin), twin, args, kwargs, storage=None)
        for other in aliases:
            self._now[other] = new

    def _shared_storage(self, node: fx.Node) -> int | None:
        """Storage of the argument that the result may be a view of, or None for a fresh result."""
        if node.target is operator.getitem:
            return self.storage[self._now[node.args[0]]]
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        schema = node.target._schema
        if any(result.alias_info is not None for result in schema.returns):
            for argument, value in zip(schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and isinstance(value, fx.Node):
                    return self.storage[self._now[value]]
        return None


def _fixed_size(size: int | torch.SymInt) -> int | None:
    """The size, or None where it follows the batch; export leaves some sizes symbolic whose value is settled."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _written_argument(node: fx.Node) -> fx.Node | None:
    if isinstance(node.target, torch._ops.OpOverload):
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
                return value
    return None


def _functional_twin(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten.relu_.default` -> `aten.relu.default`."""
    name = op_name(target)
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _module_path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def _source_line(node: fx.Node) -> str:
    """`file:line` of the innermost frame that made the call."""
    for line in reversed((node.meta.get("stack_trace") or "").splitlines()):
        if line.strip().startswith("File "):
            file, number = line.strip().split(", ")[:2]
            return f"{file[len('File ') :].strip(chr(34))}:{number.removeprefix('line ')}"
    return ""
