"""A classifier's feature maps as a network of their own, trainable: what follows a layer is cut off."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx, nn

from fastcam.program.capture import capture
from fastcam.program.layers import find_layer, layer_names

__all__ = ["features_of"]


def features_of(model: nn.Module, layer: str | nn.Module | None = None, images: Tensor | None = None) -> nn.Module:
    """The part of `model` up to the output of `layer`, sharing its modules and parameters.

    model   traceable by `torch.fx` (torchvision's and most of timm's networks are). Modules that behave in another way
            in training, drop-out and its relatives, are kept whole
    layer   dotted name or module; None: the module that gives the last spatial feature map, which needs `images`
    images  (1, C, H, W) as the model takes them, to find it

    Raises ValueError for an unknown layer, for one that does not run as a module, where `images` is missing, or where
    code around the layer does something else in training; RuntimeError where torch.fx cannot trace the model.
    """
    if layer is None:
        if images is None:
            raise ValueError("to find the last feature map, pass images=torch.zeros(1, C, H, W), or name the layer")
        name = find_layer(capture(model, images), model, None, images.ndim - 2)[1]
    else:
        name = layer_names(model, layer)[0]
    graphs = [_graph(model, name, training) for training in (True, False)]
    if _steps(graphs[0]) != _steps(graphs[1]):
        raise ValueError(
            f"what runs before '{name}' differs between training and evaluation in code that torch.fx cannot keep "
            "(functional.dropout in the model's own forward, say); put that into a module, or wrap the backbone by hand"
        )
    cut = fx.GraphModule(model, graphs[0])
    cut.graph.eliminate_dead_code()
    cut.recompile()
    cut.delete_all_unused_submodules()
    return cut.train(model.training)


class _Whole(fx.Tracer):
    """Keeps the layer whole, and everything beside the way to it that reads its training flag."""

    def __init__(self, layer: str):
        super().__init__()
        self._layer = layer

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if self._layer.startswith(qualified_name + "."):
            return False
        whole = qualified_name == self._layer or super().is_leaf_module(module, qualified_name)
        return whole or "self.training" in _source(module)


def _graph(model: nn.Module, layer: str, training: bool) -> fx.Graph:
    """The graph up to the layer, as it is in training or in evaluation."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = training
        graph = _Whole(layer).trace(model)
    except Exception as error:
        raise RuntimeError(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
    finally:
        for module, flag in flags:
            module.training = flag
    found = [node for node in graph.nodes if node.op == "call_module" and node.target == layer]
    if not found:
        raise ValueError(f"'{layer}' does not run as a module; name a layer that does")
    for node in [node for node in graph.nodes if node.op == "output"]:
        graph.erase_node(node)
    graph.output(found[-1])
    needed, stack = set(), [found[-1]]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("output", "placeholder") and node not in needed:
            graph.erase_node(node)
    return graph


def _steps(graph: fx.Graph) -> list[Any]:
    return [(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in graph.nodes]


def _source(module: nn.Module) -> str:
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return ""
