"""From a user's module to a `Program`: `torch.export`, leaves resolved to dotted names, in-place writes removed.

Nothing is run on real numbers and nothing of the model is changed: the network is traced once on fake tensors with a
dynamic batch size. A `Program` holds no parameter of the model, only their names, so it never keeps a model alive and
always sees the weights as they are when it runs.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

from .functional import Functionalizer, NeedsDecomposition
from .nodes import Node, Ref, map_refs, refs_in
from .state import evaluating, exclusive, fingerprint, forward_hooked, keeping_attributes

__all__ = ["CaptureError", "Program", "capture"]

log = logging.getLogger("fastcam")

#: Programs kept for one model: one for each image size, dtype and device it was explained at.
_PROGRAMS_PER_MODEL = 8
_cache: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Any, Program | CaptureError]] = weakref.WeakKeyDictionary()


class CaptureError(RuntimeError):
    """The network cannot be turned into a program; the message says why and what can be done about it."""


@dataclass(eq=False)
class Program:
    """A network as a functional list of nodes.

    nodes      in execution order; `nodes[i].index == i`
    input      index of the image batch
    outputs    flat list of the output's leaves, each a `Ref` or a plain value, to be put together with `out_spec`
    layers     dotted module path -> for each call of that module the indices of its output values
    structured modules that return something else than one tensor, with the type's name
    constants  tensors the code created while it was traced, by name
    storage    for each value the index of the first value that may share memory with it
    found      layers looked up so far (filled by `fastcam.program.layers`)
    cuts       cuts made so far, by feature index, folding and packing (filled by `fastcam.program.cut`)
    embedding  the same network without a final normalisation (filled by `fastcam.program.embedding`)
    picked     the same network with one of its outputs alone, by that value (filled likewise)
    """

    nodes: tuple[Node, ...]
    input: int
    outputs: tuple[Any, ...]
    out_spec: Any
    layers: dict[str, tuple[tuple[int, ...], ...]]
    structured: dict[str, str]
    constants: dict[str, torch.Tensor]
    storage: tuple[int, ...]
    found: dict[tuple[Any, int, bool], tuple[int, str]] = field(default_factory=dict)
    cuts: dict[tuple[int, bool, bool], Any] = field(default_factory=dict)
    embedding: Any = None
    picked: dict[int, Any] = field(default_factory=dict)

    def result(self, values: dict[int, Any]) -> Any:
        """The model's output, in the structure the model returns it, from the computed values."""
        leaves = [map_refs(leaf, values.__getitem__) for leaf in self.outputs]
        return torch.utils._pytree.tree_unflatten(leaves, self.out_spec)

    @property
    def output_indices(self) -> frozenset[int]:
        return frozenset(refs_in(self.outputs))

    def ancestors(self, wanted: frozenset[int]) -> set[int]:
        """Indices of all values needed to compute `wanted`, themselves included."""
        found: set[int] = set()
        stack = list(wanted)
        while stack:
            index = stack.pop()
            if index not in found:
                found.add(index)
                stack.extend(self.nodes[index].refs())
        return found

    def descendants(self, index: int) -> set[int]:
        """Indices of all values computed from value `index`, itself included."""
        found = {index}
        for node in self.nodes[index + 1 :]:
            if not found.isdisjoint(node.refs()):
                found.add(node.index)
        return found


def capture(model: nn.Module, images: torch.Tensor) -> Program:
    """The program of `model` for images of this size, dtype and device, any batch size; from the cache when possible.

    model   an unwrapped module (`state.unwrap`)
    images  (B, C, *spatial); only shape, dtype and device are read

    Raises CaptureError when the network cannot be captured; the outcome is cached either way.
    Cost: one trace on fake tensors the first time (about a second for a ResNet-50), then a fingerprint of the modules.
    """
    with exclusive:
        return _captured(model, images)


def _captured(model: nn.Module, images: torch.Tensor) -> Program:
    key = (fingerprint(model), tuple(images.shape[1:]), images.dtype, images.device)
    programs = _cache.setdefault(model, OrderedDict())
    if key not in programs:
        try:
            programs[key] = _capture(model, images)
        except CaptureError as error:
            error.__cause__ = error.__context__ = error.__traceback__ = None  # a traceback would keep the model alive
            programs[key] = error
        while len(programs) > _PROGRAMS_PER_MODEL:
            programs.popitem(last=False)
    programs.move_to_end(key)
    found = programs[key]
    if isinstance(found, CaptureError):
        raise CaptureError(str(found))
    return found


def _capture(model: nn.Module, images: torch.Tensor) -> Program:
    hooked = forward_hooked(model)
    if hooked is not None:
        raise CaptureError(f"module '{hooked}' has forward hooks, which run only when the module itself runs")
    # Two images: export would take a batch of one for a constant.
    example = torch.zeros((2, *images.shape[1:]), dtype=images.dtype, device=images.device)
    # Under grad mode, else the no_grad blocks of the user's code would leave no mark in the graph.
    with evaluating(model), torch.inference_mode(False), torch.enable_grad(), _quiet():
        try:
            with (
                keeping_attributes(model),
                _noting_structured_outputs(model) as structured,
                _naming_graph_modules(model),
                _noting_cut_gradients() as cuts,
            ):
                exported = torch.export.export(model, (example,), dynamic_shapes=(_batch_only(example),), strict=False)
        except Exception as error:
            raise CaptureError(f"torch.export cannot trace it: {_first_line(error)}") from error
        if cuts:
            raise CaptureError(f"its forward uses {cuts[0]}, whose gradient a graph of plain operators does not keep")
        try:
            return _convert(exported, structured)
        except NeedsDecomposition as reason:
            log.debug("capture: %s; letting torch.export functionalise the graph", reason)
        try:
            return _convert(exported.run_decompositions({}), structured)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"torch.export cannot functionalise it: {_first_line(error)}") from error


@contextlib.contextmanager
def _noting_cut_gradients() -> Iterator[list[str]]:
    """Collects, while a model is traced in this thread, what gives steps another gradient than their operators have:
    custom autograd functions and `detach`."""
    found: list[str] = []
    thread = threading.get_ident()
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # Operators of torch.library keep their gradient: they are one step of the graph.
        if threading.get_ident() == thread and cls.__module__ != "torch._library.autograd":
            found.append(f"the custom autograd function {cls.__name__}")
        return original.__get__(None, cls)(*args, **kwargs)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.detach, torch.Tensor.detach_, torch.Tensor.data.__get__):
                found.append(f"Tensor.{'data' if func == torch.Tensor.data.__get__ else func.__name__}")
            return func(*args, **(kwargs or {}))

    torch.autograd.Function.apply = classmethod(apply)
    try:
        with Watch():
            yield found
    finally:
        torch.autograd.Function.apply = original


@contextlib.contextmanager
def _noting_structured_outputs(model: nn.Module) -> Iterator[dict[str, str]]:
    """Collects, while the model is traced, which of its modules return something else than one tensor.

    By PyTorch's process-wide hook, so that nothing is registered on the user's modules; modules of other models that
    run meanwhile are ignored.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    found: dict[str, str] = {}

    def note(module: nn.Module, args: Any, result: Any) -> None:
        if not isinstance(result, torch.Tensor):
            found.update(dict.fromkeys(names.get(id(module), ()), type(result).__name__))

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def _naming_graph_modules(model: nn.Module) -> Iterator[None]:
    """While a model is traced in this thread, its parts made by `torch.fx` leave their names in the graph, as other
    modules do: torch.export runs through them without."""
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, fx.GraphModule) and name}
    calls = itertools.count()

    def stack() -> dict[str, tuple[str, type]]:
        mode = get_proxy_mode()
        return {} if mode is None else mode.tracer.module_stack

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            name = names[id(module)]
            stack()[f"{name}@graph{next(calls)}"] = (name, type(module))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if id(module) in names:
            (now := stack()).pop(next(reversed(now), ""), None)

    with contextlib.ExitStack() as handles:
        if names:
            handles.callback(torch.nn.modules.module.register_module_forward_pre_hook(enter).remove)
            handles.callback(torch.nn.modules.module.register_module_forward_hook(leave).remove)
        yield


def _batch_only(example: torch.Tensor) -> dict[int, Any]:
    return {0: torch.export.Dim.AUTO, **dict.fromkeys(range(1, example.ndim), torch.export.Dim.STATIC)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export's deprecation warnings are about its own internals and mean nothing to the caller."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '(no message)'}"


def _convert(exported: Any, structured: dict[str, str]) -> Program:
    """Walk the exported graph once, resolving leaves and removing in-place writes."""
    graph = exported.graph
    work = Functionalizer(graph)
    leaves = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    inputs: list[int] = []
    outputs: tuple[Any, ...] = ()
    constants: dict[str, torch.Tensor] = {}
    for fx_node in graph.nodes:
        if fx_node.op == "placeholder":
            spec = leaves[fx_node.name]
            kind = spec.kind.name
            if kind == "USER_INPUT":
                inputs.append(work.leaf(fx_node, "input", fx_node.name))
            elif kind == "PARAMETER":
                work.leaf(fx_node, "parameter", spec.target)
            elif kind == "BUFFER":
                work.leaf(fx_node, "buffer", spec.target)
            elif kind == "CONSTANT_TENSOR":
                constants[spec.target] = exported.constants[spec.target]
                work.leaf(fx_node, "constant", spec.target)
            else:
                raise CaptureError(f"its graph reads a {kind.lower().replace('_', ' ')}, which has no place here")
        elif fx_node.op == "call_function":
            if isinstance(fx_node.target, torch._ops.HigherOrderOperator):
                raise CaptureError(
                    f"it uses the control-flow operator {fx_node.target}, e.g. a no_grad block in forward"
                )
            work.call(fx_node)
        elif fx_node.op == "output":
            outputs = tuple(work.arguments(fx_node.args[0]))
        elif fx_node.op != "get_attr":
            raise CaptureError(f"its graph has a node of the unknown type {fx_node.op!r}")
    if any(spec.kind.name != "USER_OUTPUT" for spec in exported.graph_signature.output_specs):
        raise CaptureError("its forward writes into its own parameters, buffers or input")
    if len(inputs) != 1:
        raise CaptureError(f"its forward reads {len(inputs)} inputs; exactly one image batch is expected")
    if work.shape_of(inputs[0])[0] is not None:
        raise CaptureError("its forward works for one fixed batch size only (e.g. x.view(8, -1)); use x.size(0) there")
    program = Program(
        nodes=tuple(work.nodes),
        input=inputs[0],
        outputs=outputs,
        out_spec=exported.call_spec.out_spec,
        layers=work.layers(),
        structured=structured,
        constants=constants,
        storage=tuple(work.storage),
    )
    if not any(isinstance(leaf, Ref) for leaf in outputs):
        raise CaptureError("its output does not depend on any computed value")
    return program
