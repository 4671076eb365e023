"""What may follow a convolution inside the same kernel: the addition of a residual, then a ReLU."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch

from .capture import Program
from .nodes import FRESH, Node, Ref, op_name

__all__ = ["Tail", "find_tails"]

#: What makes NaN of finite numbers where they are zero or negative.
_MAY_FAIL = {"div", "log", "log2", "log10", "pow", "reciprocal", "rsqrt", "sqrt", "std", "std_mean"}


@dataclass(frozen=True)
class Tail:
    """The nodes done with a convolution, at its place in the order.

    nodes  their indices; the last one's value is what comes out, the others' values never exist
    other  index of the value that is added to the convolution's, or None. Its memory is overwritten by the result
    relu   whether a ReLU comes last
    """

    nodes: tuple[int, ...]
    other: int | None
    relu: bool


def find_tails(program: Program, nodes: list[Node], keep: Container[int]) -> dict[int, Tail]:
    """Index of a 2-D convolution -> what of `nodes`, in the order in which they run, can be done with it.

    keep  values that must come into being and survive

    A ReLU stays outside where the nodes could make NaN of finite images: inside a convolution it would become 0.
    """
    readers: dict[int, list[Node]] = {}
    readers_of_storage: dict[int, set[int]] = {}
    for node in nodes:
        for ref in node.refs():
            readers.setdefault(ref, []).append(node)
            readers_of_storage.setdefault(program.storage[ref], set()).add(node.index)
    made = {node.index for node in nodes}
    kept_storage = {program.storage[index] for index in made if index in keep}

    def only_reader(index: int) -> Node | None:
        found = readers.get(index, [])
        return found[0] if len(found) == 1 and index not in keep else None

    def overwritable(other: int, conv: Node, add: Node) -> bool:
        """Whether nobody can tell that `conv`, instead of `add`, reads `other` and leaves the sum there."""
        root = program.storage[other]
        return (
            other in made
            and other < conv.index
            and program.nodes[other].kind in FRESH
            and root == other
            and root not in kept_storage
            and all(reader < conv.index or reader == add.index for reader in readers_of_storage[root])
        )

    fusable = not any(_may_fail(node, made) for node in nodes)
    found: dict[int, Tail] = {}
    for conv in nodes:
        after = only_reader(conv.index) if op_name(conv.target) == "conv2d" else None
        other = _other_summand(program, after, conv) if after is not None else None
        if after is not None and other is not None and overwritable(other, conv, after):
            relu = only_reader(after.index)
            if fusable and relu is not None and op_name(relu.target) == "relu":
                found[conv.index] = Tail((after.index, relu.index), other, relu=True)
            else:
                found[conv.index] = Tail((after.index,), other, relu=False)
        elif fusable and after is not None and op_name(after.target) == "relu":
            found[conv.index] = Tail((after.index,), None, relu=True)
    return found


def _may_fail(node: Node, made: Container[int]) -> bool:
    """Quotients only where the divisor is computed: constants and weights are looked at elsewhere."""
    name = op_name(node.target)
    if name == "div":
        return any(isinstance(divisor, Ref) and divisor.index in made for divisor in node.args[1:])
    return name in _MAY_FAIL


def _other_summand(program: Program, add: Node, conv: Node) -> int | None:
    """What `add` adds to the output of `conv`, if that is a tensor like it and the sum is a plain one."""
    if add.target != torch.ops.aten.add.Tensor or add.kwargs or not all(isinstance(a, Ref) for a in add.args):
        return None
    others = [a.index for a in add.args if a.index != conv.index]
    if len(others) != 1:
        return None
    other = program.nodes[others[0]]
    return other.index if (other.shape, other.dtype) == (conv.shape, conv.dtype) == (add.shape, add.dtype) else None
