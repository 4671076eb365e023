"""A method on a model as a straight line of plain ATen operators: what is exported, differentiated and compiled.

The explainer's own pipeline runs once on stand-ins without numbers, and what it does is written down; no method is
implemented twice. Gradients of the head are operators of the line like all others.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)

from fastcam import _decompositions
from fastcam._tracing import traced
from fastcam.program.nodes import Node
from fastcam.program.session import Bound, CapturedSession
from fastcam.program.state import exclusive, neutral_modes
from fastcam.program.targets import TargetSpec

if TYPE_CHECKING:
    from fastcam.explainer import Attribution, Explainer

__all__ = ["ExportError", "Line", "inlined", "prepared", "straight_line"]


class ExportError(RuntimeError):
    """The method on this model is no straight line of operators; the message says why."""


def straight_line(
    explainer: Explainer,
    example: Tensor,
    targets: TargetSpec,
    given: Tensor | None,
    results: Callable[[Attribution], Any],
) -> torch.export.ExportedProgram:
    """(images[, targets]) -> what `results` makes of the attribution; for any number of images of the example's size.

    targets  as chosen by the line itself, where `given` is None
    given    an example of targets (B,) or (B, T) that the line reads

    The explainer must have explained the example already: that is when heads are analysed on real numbers.
    """
    with _ready(explainer, example, given) as (bound, inputs):
        weights = bound.weights.sources()
        traced = _traced_line(explainer, bound, weights, None if given is not None else targets, inputs, results)
        return _exported(_Attribution(bound, weights, *traced), inputs, _what(explainer))


def inlined(
    explainer: Explainer,
    example: Tensor,
    targets: TargetSpec,
    given: Tensor | None,
    results: Callable[[Attribution], Any],
) -> Line:
    """As `straight_line`, to be called with the weights of the model itself, and as it was traced: gradients are the
    framework's own operators, for `torch.compile` to choose what becomes of them."""
    with _ready(explainer, example, given) as (bound, inputs):
        weights = bound.weights.sources()
        traced = _traced_line(explainer, bound, weights, None if given is not None else targets, inputs, results)
        constants = nn.Module()
        places = []
        for index, tensor in weights.items():
            node = bound.cut.program.nodes[index]
            if node.kind == "constant":
                places.append(_placed(constants, node, tensor))
            else:
                path, _, name = node.target.rpartition(".")
                places.append((bound.model.get_submodule(path), name))
        return Line(places, *traced)


@torch.compiler.assume_constant_result
def prepared(explainer: Explainer, images: Tensor, targets: TargetSpec, given: Tensor | None) -> str:
    """Key among the explainer's lines of the one for images and targets of this kind, made where there is none.

    For code that `torch.compile` traces: called once while it does, with the tensors of the call that is compiled.
    """
    with torch._guards.tracing(None):  # what is traced in here is no part of what is traced outside
        return explainer._inlined(images, targets, given)


@contextlib.contextmanager
def _ready(explainer: Explainer, example: Tensor, given: Tensor | None) -> Iterator[tuple[Bound, tuple[Tensor, ...]]]:
    """What a trace needs, and the surroundings for it."""
    session = explainer._session(example)
    if not isinstance(session, CapturedSession):
        reason = getattr(session, "reason", "this one is none")
        raise ExportError(
            f"{_what(explainer)} is no straight line of operators: it needs a captured network, but {reason}"
        )
    with exclusive, _quiet(), neutral_modes():
        yield session.bound, ((_two(example),) if given is None else (_two(example), _two(given)))


def _traced_line(
    explainer: Explainer,
    bound: Bound,
    weights: dict[int, Tensor],
    targets: TargetSpec,
    inputs: tuple[Tensor, ...],
    results: Callable[[Attribution], Any],
) -> tuple[torch.fx.GraphModule, Any]:
    """(*weights, images[, targets]) -> leaves of the results, and the structure they belong into."""
    structure: Any = None
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)

    def run(*tensors: Tensor) -> list[Any]:
        nonlocal structure
        images, *chosen = tensors[len(weights) :]
        session = CapturedSession(bound, leaves=bound.weights.made_of(dict(zip(weights, tensors, strict=False))))
        found = results(explainer._through(session, images, chosen[0] if chosen else targets))
        leaves, structure = torch.utils._pytree.tree_flatten(found)
        return leaves

    stand_ins = [_stand_in(mode, tensor, free=True) for tensor in inputs]
    fixed = [_stand_in(mode, tensor, free=False) for tensor in weights.values()]
    try:
        with traced():
            line = make_fx(run, tracing_mode="fake")(*fixed, *stand_ins)
    except Exception as error:
        raise ExportError(f"{_what(explainer)} is no straight line of operators: {_reason(error)}") from error
    if not isinstance(stand_ins[0].shape[0], torch.SymInt) or stand_ins[0].shape[0].node.expr.is_number:
        raise ExportError(
            f"{_what(explainer)} is no straight line of operators for any number of images: it counts them while "
            "it runs, as methods that perturb images in chunks do, or a step of the network does, as the resize in "
            "fastcam.nn.LFICAM (whose attention has a graph itself: model(images).attention)"
        )
    line.graph.eliminate_dead_code()
    for node in line.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_numel.default):
        node.target = torch.numel  # the same, and `torch.compile` knows it
    # A plain module: within `torch.compile` make_fx gives a lazy one, which cannot be looked into.
    return torch.fx.GraphModule(line, line.graph), structure


def _stand_in(mode: FakeTensorMode, tensor: Tensor, free: bool) -> Tensor:
    """A tensor without numbers, its first size free or none."""
    sizes = [DimDynamic.DYNAMIC if free and dim == 0 else DimDynamic.STATIC for dim in range(tensor.ndim)]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(tensor, source=ConstantSource(f"t{id(tensor)}"), symbolic_context=context)


class Line:
    """(images[, targets]) -> results, by a traced attribution and weights read where they lie at every call."""

    def __init__(self, places: list[tuple[nn.Module, str]], run: torch.fx.GraphModule, structure: Any):
        self._places = places
        self._run = run.forward
        self._structure = structure

    def __call__(self, *inputs: Tensor) -> Any:
        weights = [getattr(owner, name) for owner, name in self._places]
        return torch.utils._pytree.tree_unflatten(self._run(*weights, *inputs), self._structure)


class _Attribution(nn.Module):
    """A traced attribution with the weights it reads, under their names in the model."""

    def __init__(self, bound: Bound, weights: dict[int, Tensor], run: torch.fx.GraphModule, structure: Any):
        super().__init__()
        places = [_placed(self, bound.cut.program.nodes[i], t) for i, t in weights.items()]
        self.__dict__["_line"] = Line(places, run, structure)  # no submodule: its constants are nobody's weights

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        return self._line(images, *([] if targets is None else [targets]))


def _placed(root: nn.Module, node: Node, tensor: Tensor) -> tuple[nn.Module, str]:
    """Registers a weight under its dotted name."""
    *path, name = node.target.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if node.kind == "parameter":
        owner.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(name, tensor)
    return owner, name


def _exported(module: nn.Module, inputs: tuple[Tensor, ...], what: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    program = program.run_decompositions(_decompositions.table())
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims"):
            raise ExportError(
                f"{what} cannot be exported: it runs {node.target}, which is no operator of PyTorch's own"
            )
    return program


def _two(tensor: Tensor) -> Tensor:
    """At least two images: a single one would be taken for a constant."""
    return tensor if tensor.shape[0] > 1 else torch.cat([tensor, tensor])


def _what(explainer: Explainer) -> str:
    return f"method '{explainer.method.name}' on {type(explainer.model).__name__}"


def _reason(error: Exception) -> str:
    """What went wrong and where in this package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}fastcam{os.sep}" in f.filename]
    text = str(error).strip().splitlines()
    at = f" (at {frames[-1].filename.rpartition(os.sep)[2]}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, _DECIDED_BY_NUMBERS):
        return f"it decides by numbers computed on the way, as methods that perturb images in chunks do{at}"
    return f"{type(error).__name__}: {text[0] if text else '(no message)'}{at}"


#: What asking a stand-in for a number, or for what depends on one, raises.
_DECIDED_BY_NUMBERS = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export's warnings are about its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
