"""A classifier's feature maps as a network of their own, trainable: what follows a layer is cut off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fastcam.program.capture import CaptureError, Program, capture
from fastcam.program.embedding import sampled
from fastcam.program.execute import Weights
from fastcam.program.layers import LayerNotInProgram, find_layer, layer_names
from fastcam.program.state import evaluating

from .captured import part_of_program, reads_training_flag

__all__ = ["features_of"]


def features_of(model: nn.Module, layer: str | nn.Module | None = None, images: Tensor | None = None) -> nn.Module:
    """The part of `model` up to the output of `layer`, sharing its modules and parameters.

    model   traceable by `torch.fx` (torchvision's and most of timm's networks are), which keeps modules that behave in
            another way in training, drop-out and its relatives, whole · or, where `images` are given, by
            `torch.export`: then the result takes images of their size only, and holds no such module but batch norms
    layer   dotted name or module; None: the last spatial feature map, which needs `images`
    images  (1, C, H, W) as the model takes them, to find and to capture it

    Raises ValueError for an unknown layer, for one that does not run, where `images` is missing, or where code before
    the layer does something else in training; RuntimeError where neither torch.fx nor torch.export can trace the model.
    """
    found = None
    if layer is not None:
        name = layer_names(model, layer)[0]
    elif images is None:
        raise ValueError("to find the last feature map, pass images=torch.zeros(1, C, H, W), or name the layer")
    else:
        found = _last(model, images)
        name = found[2]
    try:
        return _traced(model, name, found)
    except _Untraceable as reason:
        if images is None:
            raise RuntimeError(f"{reason}; pass images=torch.zeros(1, C, H, W) to have it captured instead") from reason
        try:
            program, index, name = found or _place(model, layer, images)
        except (CaptureError, LayerNotInProgram) as error:
            raise RuntimeError(f"{reason}, nor can it be captured: {error}; {_BY_HAND}") from error
        return part_of_program(model, program, index, name)


_BY_HAND = "wrap the backbone by hand, as a module that returns the features"
#: A program, the index of one of its values, and the layer's name.
_Place = tuple[Program, int, str]


class _Untraceable(Exception):
    """What `torch.fx` cannot do."""


def _place(model: nn.Module, layer: str | nn.Module | None, images: Tensor) -> _Place:
    program = capture(model, images)
    return program, *find_layer(program, model, layer, images.ndim - 2)


def _last(model: nn.Module, images: Tensor) -> _Place:
    try:
        return _place(model, None, images)
    except CaptureError as error:
        raise RuntimeError(
            f"the last feature map of {type(model).__name__} cannot be found: {error}; pass layer="
        ) from error


def _traced(model: nn.Module, name: str, found: _Place | None) -> nn.Module:
    # The last feature map may be made by code between modules; its name is then that of a module around it.
    named = found is None or found[0].layers.get(name, ())[-1:] == ((found[1],),)
    graphs = [_graph(model, name if named else "", training) for training in (True, False)]
    ends = [node.name for node in graphs[1].nodes if named and node.op == "call_module" and node.target == name]
    end = ends[-1] if ends else None
    if end is None and found is not None:
        end = _node_of_value(model, graphs[1], found)
    if end is None:
        raise _Untraceable(f"'{name}' does not run as a module that torch.fx sees; name a layer that does")
    for graph in graphs:
        _cut(graph, end)
    if _steps(graphs[0]) != _steps(graphs[1]):
        raise ValueError(
            f"what runs before '{name}' differs between training and evaluation in code that torch.fx cannot keep "
            "(functional.dropout in the model's own forward, say); put that into a module, or wrap the backbone by hand"
        )
    part = fx.GraphModule(model, graphs[0])
    part.graph.eliminate_dead_code()
    part.recompile()
    part.delete_all_unused_submodules()
    return part.train(model.training)


class _Whole(fx.Tracer):
    """Keeps the layer whole, and everything beside the way to it that reads its training flag."""

    def __init__(self, layer: str = ""):  # unpickling a traced module makes its tracer without arguments
        super().__init__()
        self._layer = layer

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if self._layer.startswith(qualified_name + "."):
            return False
        whole = qualified_name == self._layer or super().is_leaf_module(module, qualified_name)
        return whole or reads_training_flag(module)


def _graph(model: nn.Module, layer: str, training: bool) -> fx.Graph:
    """The whole graph, as it is in training or in evaluation."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = training
        return _Whole(layer).trace(model)
    except Exception as error:
        raise _Untraceable(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
    finally:
        for module, flag in flags:
            module.training = flag


def _node_of_value(model: nn.Module, graph: fx.Graph, place: _Place) -> str | None:
    """The first node of a graph of evaluation mode that gives the value: by comparing numbers, on random images."""
    program, index, _ = place
    values = sampled(program, Weights(program, model).values(), {index})
    wanted = values[index]
    names: list[str] = []

    class Comparing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and result.shape == wanted.shape and n.op != "output":
                scale = float(wanted.abs().max())
                if torch.allclose(result.to(wanted.dtype), wanted, rtol=0, atol=1e-5 * scale):
                    names.append(n.name)
            return result

    with evaluating(model), torch.no_grad():
        Comparing(fx.GraphModule(model, graph)).run(values[program.input])
    return names[0] if names else None


def _cut(graph: fx.Graph, end: str) -> None:
    """The graph ends in the node of that name; what it does not need is gone."""
    last = next((node for node in graph.nodes if node.name == end), None)
    for node in [node for node in graph.nodes if node.op == "output"]:
        graph.erase_node(node)
    if last is None:  # the other mode runs something else
        return
    graph.output(last)
    needed, stack = set(), [last]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("output", "placeholder") and node not in needed:
            graph.erase_node(node)


def _steps(graph: fx.Graph) -> list[Any]:
    return [(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in graph.nodes]
