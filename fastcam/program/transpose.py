"""Transposes of the affine steps of a program: multipliers at a step's result to multipliers at what it reads.

Convolutions, linear layers, evaluated batch norms and the common arithmetic have theirs written out, which needs no
activation at all. Every other affine step is transposed by autograd at zero, which is where its offset drops out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .nodes import Node, Ref, map_refs, op_name

__all__ = ["Cotangent", "transpose"]

#: Multipliers of one value: a tensor, or one for each position of a step that returns several.
Cotangent: TypeAlias = Tensor | dict[int, Tensor]


def transpose(
    node: Node, given: Cotangent, active: frozenset[int], shapes: Mapping[int, torch.Size], get: Callable[[int], Any]
) -> dict[int, Cotangent]:
    """Multipliers at the values of `active` that `node` reads, summed where it reads one several times.

    given   multipliers at the node's result
    shapes  actual shapes of the active values
    get     everything else the node reads, by index: weights, sizes, constants
    """
    if op_name(node.target) == "getitem" and isinstance(given, Tensor):
        return {node.args[0].index: {node.args[1]: given}}
    written = _WRITTEN_OUT.get(op_name(node.target))
    if written is not None and isinstance(given, Tensor):
        found = written(node, given, active, shapes, get)
        if found is not None:
            return found
    return _by_autograd(node, given, active, shapes, get)


def _by_autograd(
    node: Node, given: Cotangent, active: frozenset[int], shapes: Mapping[int, torch.Size], get: Callable[[int], Any]
) -> dict[int, Cotangent]:
    like = given if isinstance(given, Tensor) else next(iter(given.values()))
    reads = [ref for ref in dict.fromkeys(node.refs()) if ref in active]
    with torch.enable_grad():
        # One zero, expanded: no memory, whatever the shape.
        points = {ref: like.new_zeros(()).expand(shapes[ref]).requires_grad_() for ref in reads}

        def value(ref: int) -> Any:
            return points[ref] if ref in points else get(ref)

        result = node.target(*map_refs(node.args, value), **map_refs(node.kwargs, value))
        if isinstance(given, Tensor):
            outputs, seeds = [result], [given]
        else:
            outputs, seeds = [result[position] for position in given], list(given.values())
        seeds = [seed.to(output.dtype) for seed, output in zip(seeds, outputs, strict=True)]
        found = torch.autograd.grad(outputs, list(points.values()), seeds)
    return dict(zip(reads, found, strict=True))


def _first(node: Node, active: frozenset[int]) -> int | None:
    """Index of the first argument where it is active and nothing else is."""
    first = node.args[0]
    if isinstance(first, Ref) and first.index in active and sum(ref in active for ref in node.refs()) == 1:
        return first.index
    return None


def _argument(node: Node, position: int, default: Any, get: Callable[[int], Any]) -> Any:
    return map_refs(node.args[position], get) if len(node.args) > position else default


def _convolution(
    node: Node, g: Tensor, active: frozenset[int], shapes: Mapping[int, torch.Size], get: Callable[[int], Any]
) -> dict[int, Cotangent] | None:
    source = _first(node, active)
    if source is None or node.kwargs:
        return None
    shape = shapes[source]
    rank = len(shape) - 2
    stride, padding, dilation = (_each(_argument(node, at, default, get), rank) for at, default in _GEOMETRY)
    if any(isinstance(p, str) for p in padding):
        return None
    weight = _argument(node, 1, None, get)
    groups = _argument(node, 6, 1, get)
    kernel = weight.shape[2:]
    # What the strided convolution left unread at the end of each dimension.
    left = [
        shape[2 + d] - ((g.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (kernel[d] - 1) + 1)
        for d in range(rank)
    ]
    if any(not 0 <= extra < max(s, t) for extra, s, t in zip(left, stride, dilation, strict=True)):
        return None
    back = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[rank - 1]
    return {source: back(g, weight, None, stride, padding, left, groups, dilation)}


_GEOMETRY = ((3, 1), (4, 0), (5, 1))


def _each(value: Any, rank: int) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * rank if len(values) == 1 else values


def _linear(
    node: Node, g: Tensor, active: frozenset[int], shapes: Mapping[int, torch.Size], get: Callable[[int], Any]
) -> dict[int, Cotangent] | None:
    source = _first(node, active)
    return None if source is None else {source: g @ _argument(node, 1, None, get)}


def _batch_norm(
    node: Node, g: Tensor, active: frozenset[int], shapes: Mapping[int, torch.Size], get: Callable[[int], Any]
) -> dict[int, Cotangent] | None:
    source = _first(node, active)
    if source is None or node.kwargs or node.args[5] is not False:
        return None
    weight, variance = _argument(node, 1, None, get), _argument(node, 4, None, get)
    factor = (variance + node.args[7]).rsqrt()
    if weight is not None:
        factor = factor * weight
    return {source: g * factor.to(g.dtype).reshape(1, -1, *(1,) * (g.ndim - 2))}


def _sum(
    node: Node, g: Tensor, active: frozenset[int], shapes: Mapping[int, torch.Size], get: Callable[[int], Any]
) -> dict[int, Cotangent] | None:
    """`add` and `sub` of two values."""
    factor = node.kwargs.get("alpha", 1)
    signs = (1, factor if op_name(node.target) == "add" else -factor)
    if not isinstance(factor, (int, float)) or set(node.kwargs) - {"alpha"}:
        return None
    found: dict[int, Cotangent] = {}
    for arg, sign in zip(node.args, signs, strict=True):
        if isinstance(arg, Ref) and arg.index in active:
            part = (g if sign == 1 else g * sign).sum_to_size(shapes[arg.index])
            earlier = found.get(arg.index)
            found[arg.index] = part if earlier is None else earlier + part
    return found


def _scaled(
    node: Node, g: Tensor, active: frozenset[int], shapes: Mapping[int, torch.Size], get: Callable[[int], Any]
) -> dict[int, Cotangent] | None:
    """`mul` by something that is not active, `div` by it."""
    if node.kwargs or sum(ref in active for ref in node.refs()) != 1:
        return None
    first, second = node.args
    at = first if isinstance(first, Ref) and first.index in active else second
    other = map_refs(second if at is first else first, get)
    if op_name(node.target) == "div":
        return {at.index: (g / other).sum_to_size(shapes[at.index])} if at is first else None
    return {at.index: (g * other).sum_to_size(shapes[at.index])}


def _copy(
    node: Node, g: Tensor, active: frozenset[int], shapes: Mapping[int, torch.Size], get: Callable[[int], Any]
) -> dict[int, Cotangent] | None:
    """The second argument in the shape of the first, whose values are lost; autograd knows no derivative of it."""
    source = node.args[1]
    found = isinstance(source, Ref) and source.index in active
    return {source.index: g.sum_to_size(shapes[source.index])} if found else {}


def _reshaped(
    node: Node, g: Tensor, active: frozenset[int], shapes: Mapping[int, torch.Size], get: Callable[[int], Any]
) -> dict[int, Cotangent] | None:
    """Another shape around the same numbers in the same order."""
    source = _first(node, active)
    return None if source is None else {source: g.reshape(shapes[source])}


_WRITTEN_OUT: dict[str, Callable[..., dict[int, Cotangent] | None]] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "add": _sum,
    "sub": _sum,
    "mul": _scaled,
    "div": _scaled,
    "copy": _copy,
    **dict.fromkeys(("flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"), _reshaped),
}
