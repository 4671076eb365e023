"""A captured network up to one of its values, as a module to train: for networks that `torch.fx` cannot trace."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastcam.program.capture import Program
from fastcam.program.nodes import LEAVES, map_refs, op_name

__all__ = ["part_of_program", "reads_training_flag"]


def part_of_program(model: nn.Module, program: Program, index: int, layer: str) -> nn.Module:
    """The steps of `program` up to value `index`, on the parameters and batch norms of `model`.

    layer  the value's name, for errors

    A program is captured in evaluation mode, for one size of images. Batch norms run as the modules they are and follow
    their training flag; ValueError names another module on the way whose code reads that flag, such as drop-out. The
    result raises ValueError for images of another size.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    needed = program.ancestors(frozenset({index}))
    normalising = {i for i in needed if op_name(program.nodes[i].target) == "batch_norm"}
    norms = {i for i in normalising if isinstance(modules.get(program.nodes[i].module), _BatchNorm)}
    _refuse_what_changes(modules, program, needed - {index}, norms, layer)
    graph, held, made = fx.Graph(), {}, {}
    held["_of_size"] = _OfSize(tuple(program.nodes[program.input].shape or ())[1:])
    made[program.input] = graph.call_module("_of_size", (graph.placeholder("images"),))

    def value(i: int) -> Any:
        if i not in made:  # a leaf
            node = program.nodes[i]
            constant = node.kind == "constant"
            target = f"constant_{i}" if constant else node.target
            held[target] = program.constants[node.target] if constant else _attribute(modules, target)
            made[i] = graph.get_attr(target)
        return made[i]

    for node in (program.nodes[i] for i in sorted(needed)):
        if node.index in norms:
            held[node.module] = modules[node.module]
            made[node.index] = graph.call_module(node.module, (value(node.args[0].index),))
        elif node.kind not in LEAVES:
            arguments = map_refs(node.args, value), map_refs(node.kwargs, value)
            made[node.index] = graph.call_function(node.target, *arguments)
    graph.output(value(index))
    return fx.GraphModule(held, graph, type(model).__name__).train(model.training)


def reads_training_flag(module: nn.Module) -> bool:
    """Whether the code of the module's own forward pass may do something else in training."""
    if isinstance(module, _DropoutNd) and module.p == 0:
        return False
    try:
        return "self.training" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False


def _refuse_what_changes(
    modules: dict[str, nn.Module], program: Program, needed: set[int], norms: set[int], layer: str
) -> None:
    kept = {program.nodes[i].module for i in norms}
    running = {program.nodes[i].module for i in needed}
    # Drop-out leaves no step behind in evaluation mode, but its result has a name.
    running |= {name for name, calls in program.layers.items() if any(i in needed for call in calls for i in call)}
    for name in sorted(running - kept):
        module = modules.get(name)
        if module is not None and reads_training_flag(module):
            raise ValueError(
                f"{type(module).__name__} '{name}' does something else in training, which a captured network does not "
                f"keep before layer '{layer}'; wrap the backbone by hand, as a module that returns its features"
            )


def _attribute(modules: dict[str, nn.Module], target: str) -> Tensor:
    path, _, name = target.rpartition(".")
    found: Tensor = getattr(modules[path], name)
    return found


class _OfSize(nn.Module):
    """Images as they are, of one size. A module: torch.fx traces into functions when it is unpickled."""

    def __init__(self, size: tuple[int | None, ...]):
        super().__init__()
        self._size = size

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self._size:
            raise ValueError(
                f"this backbone was captured for images (B, {', '.join(map(str, self._size))}); got "
                f"{tuple(images.shape)}. Capture it at their size: LFICAM(image_size=), features_of(images=)"
            )
        return images
