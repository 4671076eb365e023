"""Which values of a network are feature maps, and where their channels stand."""

from __future__ import annotations

import math

from .capture import Program
from .nodes import Node, Ref, op_name, refs_in

__all__ = ["channel_dims"]

_CHANNELS_FIRST = frozenset({"batch_norm", "_native_batch_norm_legit_no_training", "group_norm", "instance_norm"})
_KEEPING_KINDS = frozenset({"norm", "activation", "pool", "reduce", "add", "mul", "cat", "pad", "resize"})
_KEEPING_NAMES = """
clone contiguous alias detach to _to_copy dropout roll flip slice narrow split split_with_sizes chunk tensor_split
getitem
"""
_KEEPING = frozenset(_KEEPING_NAMES.split())


def channel_dims(program: Program, feature: int, head: list[Node]) -> dict[int, int]:
    """For each value from `feature` on that is a feature map, the dimension of its channels: 1 or the last.

    Convolutions make feature maps; what works on positions one by one or in windows keeps them; a permutation may move
    the channels; any other step, such as flattening into tokens, ends them.
    """
    rank = len(program.nodes[program.input].shape or ())
    shape = program.nodes[feature].shape or ()
    found = {feature: 1} if len(shape) == rank and math.prod(size or 0 for size in shape[2:]) > 1 else {}
    for node in head:
        if node.shape is not None and (len(node.shape) != rank or node.shape[0] is not None):
            continue
        at = _channel_dim(node, found, rank)
        if at is not None:
            found[node.index] = at
    return found


def _channel_dim(node: Node, found: dict[int, int], rank: int) -> int | None:
    name = op_name(node.target)
    if node.kind == "conv" or name in _CHANNELS_FIRST:
        return 1
    source = next((found[ref] for ref in refs_in(node.args) if ref in found), None)
    if source is None:
        return None
    if name == "permute" and isinstance(node.args[0], Ref):
        order = [dim % rank for dim in node.args[1]]
        positions = [dim for dim in order if dim not in (0, source)]
        at = order.index(source)
        return at if order[0] == 0 and positions == sorted(positions) and at in (1, rank - 1) else None
    if name == "linear":
        return source if source == rank - 1 else None
    return source if node.kind in _KEEPING_KINDS or name in _KEEPING else None
