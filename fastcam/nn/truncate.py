"""A classifier's feature maps as a network of their own, trainable: what follows a layer is cut off."""

from __future__ import annotations

from torch import Tensor, fx, nn

from fastcam.program.capture import capture
from fastcam.program.layers import find_layer, layer_names

__all__ = ["features_of"]


def features_of(model: nn.Module, layer: str | nn.Module | None = None, images: Tensor | None = None) -> nn.Module:
    """The part of `model` up to the output of `layer`, sharing its modules and parameters.

    model   traceable by `torch.fx` with its named layers kept whole (torchvision's and most of timm's networks are)
    layer   dotted name or module; None: the module that gives the last spatial feature map, which needs `images`
    images  (1, C, H, W) as the model takes them, to find it

    Raises ValueError for an unknown layer, for one that does not run as a module, or where `images` is missing;
    RuntimeError where torch.fx cannot trace the model.
    """
    if layer is None:
        if images is None:
            raise ValueError("to find the last feature map, pass images=torch.zeros(1, C, H, W), or name the layer")
        name = find_layer(capture(model, images), model, None, images.ndim - 2)[1]
    else:
        name = layer_names(model, layer)[0]

    class Whole(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
            inside = name.startswith(qualified_name + ".")
            return not inside and (qualified_name == name or super().is_leaf_module(module, qualified_name))

    try:
        graph = Whole().trace(model)
    except Exception as error:
        raise RuntimeError(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
    found = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if not found:
        raise ValueError(f"'{name}' does not run as a module; name a layer that does")
    for node in [node for node in graph.nodes if node.op == "output"]:
        graph.erase_node(node)
    graph.output(found[-1])
    cut = fx.GraphModule(model, graph)
    cut.graph.eliminate_dead_code()
    cut.recompile()
    cut.delete_all_unused_submodules()
    return cut.train(model.training)
