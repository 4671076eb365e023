"""Finding the value a user means by `layer`."""

from __future__ import annotations

import difflib
import math

from torch import nn

from .capture import Program
from .nodes import Node, Ref, op_name

__all__ = ["LayerNotInProgram", "check_spatial", "find_layer", "layer_names", "layer_of", "several_outputs"]
__all__ += ["SeveralOutputs", "is_channels_last", "shown", "unknown_layer"]


_KEEPS_ORDER = frozenset({"getitem", "clone", "contiguous", "alias", "_to_copy"})


class UnfitLayer(Exception):
    """The layer's output is no feature map; raised as a TypeError or ValueError too."""


class UnfitLayerType(UnfitLayer, TypeError):
    """Tokens, or several values."""


class SeveralOutputs(UnfitLayerType):
    """A layer that gives something else than one tensor."""


class UnfitLayerShape(UnfitLayer, ValueError):
    """No spatial extent."""


class LayerNotInProgram(LookupError):
    """The module exists but computes nothing of its own, or does not run, in the captured network."""


def layer_names(model: nn.Module, layer: str | nn.Module) -> list[str]:
    """Dotted names of `layer` in `model`.

    Raises ValueError for a name or module that is not part of the model (close names are suggested), TypeError for
    another type.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, nn.Module):
        names = [name for name, module in modules.items() if module is layer]
        if not names:
            raise ValueError(f"the given {type(layer).__name__} layer is not a module of this {type(model).__name__}")
        return names
    if not isinstance(layer, str):
        raise TypeError(f"layer must be None, a dotted module name or a module; got {type(layer).__name__}")
    if layer not in modules:
        raise unknown_layer(layer, model)
    return [layer]


def several_outputs(layer: str, what: str) -> TypeError:
    return SeveralOutputs(
        f"layer '{layer}' returns {what}, not one tensor; name a module inside it that does "
        "(with reshape_transform= where that one gives tokens), or wrap the model"
    )


def unknown_layer(layer: str, model: nn.Module) -> ValueError:
    names = [name for name, _ in model.named_modules() if name]
    close = difflib.get_close_matches(layer, names, n=3, cutoff=0.4) or names[-3:]
    return ValueError(
        f"{type(model).__name__} has no layer '{layer}'; "
        f"close names: {', '.join(repr(c) for c in close) or '(the model has no named modules)'}"
    )


def find_layer(
    program: Program, model: nn.Module, layer: str | nn.Module | None, spatial_rank: int, reshaped: bool = False
) -> tuple[int, str]:
    """Index of the layer's output value and the layer's name.

    layer     None: the last spatial feature map before pooling · dotted module name · module. A module that runs
              several times stands for its last run.
    reshaped  whether a `reshape_transform` will rearrange the output

    Raises ValueError or TypeError as `layer_names` does, TypeError for a layer with several outputs or, unless
    `reshaped`, with its channels last, and LayerNotInProgram where only running the module itself can tell.
    """
    key = (id(layer) if isinstance(layer, nn.Module) else layer, spatial_rank, reshaped)
    if key not in program.found:
        program.found[key] = _find(program, model, layer, spatial_rank, reshaped)
    return program.found[key]


def _find(
    program: Program, model: nn.Module, layer: str | nn.Module | None, spatial_rank: int, reshaped: bool
) -> tuple[int, str]:
    index, name = _last_spatial(program, spatial_rank) if layer is None else _named(program, model, layer)
    shape = program.nodes[index].shape or ()
    if not reshaped and len(shape) == spatial_rank + 2 and is_channels_last(program, index):
        order = ", ".join(str(d) for d in (0, spatial_rank + 1, *range(1, spatial_rank + 1)))
        raise UnfitLayerType(
            f"layer '{name}' gives feature maps with their channels last, {shown(shape)}; "
            f"pass layer='{name}', reshape_transform=lambda t: t.permute({order})"
        )
    return index, name


def _named(program: Program, model: nn.Module, layer: str | nn.Module) -> tuple[int, str]:
    needed = program.ancestors(program.output_indices)
    names = layer_names(model, layer)
    for name in names:
        if name in program.structured:
            raise several_outputs(name, program.structured[name])
        for outputs in reversed(program.layers.get(name, ())):
            used = [index for index in outputs if index in needed]
            if len(used) > 1:
                raise several_outputs(name, f"{len(used)} values")
            if used:
                return used[0], name
    raise LayerNotInProgram(f"layer '{names[0]}' does not run, or computes nothing of its own that the output needs")


def shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("B" if size is None else str(size) for size in shape) + ")"


def is_channels_last(program: Program, index: int) -> bool:
    """Whether a value has its channels in the last dimension: a linear layer or layer norm over that dimension made it,
    perhaps followed by elementwise steps."""
    seen: set[int] = set()
    stack = [index]
    while stack:
        node = program.nodes[stack.pop()]
        if node.kind == "linear" or op_name(node.target) in ("layer_norm", "native_layer_norm", "rms_norm"):
            return True
        if node.kind in ("add", "mul", "activation") or op_name(node.target) in _KEEPS_ORDER:
            same = {ref for ref in node.refs() if program.nodes[ref].shape in (node.shape, None)}
            stack.extend(same - seen)
            seen |= same
    return False


def check_spatial(shape: tuple[int | None, ...], name: str, spatial_rank: int, reshaped: bool) -> None:
    """Raise unless `shape` is (B, K, *spatial); `reshaped` says that the user's `reshape_transform` made it."""
    if len(shape) == spatial_rank + 2:
        return
    given = shown(shape)
    if reshaped:
        raise TypeError(f"reshape_transform made {given} of layer '{name}'; it must return (B, K, *spatial)")
    if len(shape) == 3:
        raise UnfitLayerType(
            f"layer '{name}' gives tokens of shape {given}, not feature maps; "
            "pass reshape_transform=callable that turns them into (B, K, H, W)"
        )
    raise UnfitLayerShape(
        f"layer '{name}' has no spatial extent: its output has shape {given}, expected (B, K, *spatial)"
    )


def _last_spatial(program: Program, spatial_rank: int) -> tuple[int, str]:
    images = program.descendants(program.input)
    for index in sorted(program.ancestors(program.output_indices) & images, reverse=True):
        node = program.nodes[index]
        if index != program.input and _is_feature_map(node, spatial_rank):
            index = _before_power(program, index)
            name = layer_of(program, index)
            if _is_attention_result(program, index) or _mixes_positions_later(program, index, images):
                raise ValueError(
                    f"the last spatial feature map, '{name}', lies in or before attention layers and says little about "
                    "the decision; pass layer= and, if that layer gives tokens, reshape_transform="
                )
            return index, name
    raise ValueError("the model has no spatial feature map; pass layer= (and reshape_transform= for tokens)")


def _before_power(program: Program, index: int) -> int:
    """The feature map whose power a generalised-mean pool takes, past the clamp that keeps it positive."""
    node = program.nodes[index]
    for names in (("pow",), ("clamp", "clamp_min")):
        if op_name(node.target) not in names or not isinstance(node.args[0], Ref):
            break
        node = program.nodes[node.args[0].index]
    return node.index


def _is_feature_map(node: Node, spatial_rank: int) -> bool:
    return (
        node.shape is not None
        and node.dtype is not None
        and node.dtype.is_floating_point
        and len(node.shape) == spatial_rank + 2
        and node.shape[0] is None
        and node.kind not in ("pool", "resize")
        and math.prod(size or 0 for size in node.shape[2:]) > 1
        and math.prod(size or 0 for size in node.shape[1:-1]) > 1  # else a pooled vector, channels last
    )


def layer_of(program: Program, index: int) -> str:
    """The name of the module that gives a value, the shortest of several; else of the module whose code made it."""
    node = program.nodes[index]
    return _shortest_name(program, index) or node.module or node.name


def _shortest_name(program: Program, index: int) -> str:
    names = [name for name, calls in program.layers.items() if name and calls[-1] == (index,)]
    return min(names, key=len, default="")


def _is_attention_result(program: Program, index: int) -> bool:
    """Whether the value is what attention returns, perhaps rearranged: heads and tokens, not a feature map."""
    node = program.nodes[index]
    while node.kind == "reshape":
        node = program.nodes[next(node.refs())]
    return node.kind == "attention"


def _mixes_positions_later(program: Program, index: int, images: set[int]) -> bool:
    """Whether attention follows: a fused attention call, or a product of two values that both follow the image."""
    for later in program.descendants(index):
        node = program.nodes[later]
        if node.kind == "attention":
            return True
        if node.kind == "matmul" and sum(ref in images for ref in node.refs()) > 1:
            return True
    return False
