"""Networks that end in an L2 normalisation, seen without it: similarity methods take norms for constants."""

from __future__ import annotations

import dataclasses
import weakref

from .capture import Program
from .nodes import Node, Ref, op_name

__all__ = ["unnormalised"]

_known: weakref.WeakKeyDictionary[Program, Program] = weakref.WeakKeyDictionary()

#: What may stand between the sum of squares and the division.
_OF_A_NORM = frozenset({"expand", "expand_as", "clamp_min", "clamp", "add", "maximum", "sqrt", "rsqrt", "reciprocal"})


def unnormalised(program: Program) -> Program:
    """The same program with the embedding before a final x / |x| (`functional.normalize`, or spelt out) as its output;
    the program itself where it ends otherwise."""
    if program not in _known:
        raw = _before_normalisation(program)
        _known[program] = program if raw is None else _ending_at(program, raw)
    return _known[program]


def _ending_at(program: Program, index: int) -> Program:
    return dataclasses.replace(program, outputs=(Ref(index),), found={}, cuts={})


def _before_normalisation(program: Program) -> int | None:
    if len(program.outputs) != 1 or not isinstance(program.outputs[0], Ref):
        return None
    last = program.nodes[program.outputs[0].index]
    if last.kind != "mul" or len(last.args) != 2 or not all(isinstance(arg, Ref) for arg in last.args):
        return None
    first, second = (program.nodes[arg.index] for arg in last.args)
    pairs = [(first, second)] if op_name(last.target) == "div" else [(first, second), (second, first)]
    for vector, norm in pairs:
        if vector.shape == last.shape and _is_norm_of(program, norm, vector):
            return vector.index
    return None


def _is_norm_of(program: Program, node: Node, vector: Node) -> bool:
    """Whether a value is the Euclidean norm of the rows of `vector`, or its inverse, maybe with a guard against 0."""
    while op_name(node.target) in _OF_A_NORM or _is_root(node):
        source = node.args[0]
        if not isinstance(source, Ref):
            return False
        node = program.nodes[source.index]
    name, rank = op_name(node.target), len(vector.shape or ())
    if name == "linalg_vector_norm":
        order, dims = (*node.args, 2.0, None)[1:3]
        return node.args[0] == Ref(vector.index) and order in (2, 2.0) and _last_alone(dims, rank)
    if name == "norm":
        order, dims = (*node.args, None, None)[1:3]
        return node.args[0] == Ref(vector.index) and order in (2, 2.0) and _last_alone(dims, rank)
    if name != "sum" or not _last_alone(node.args[1] if len(node.args) > 1 else None, rank):
        return False
    assert isinstance(node.args[0], Ref)
    square = program.nodes[node.args[0].index]
    own = Ref(vector.index)
    if op_name(square.target) == "mul":
        return tuple(square.args) == (own, own)
    return (op_name(square.target) == "square" and square.args[0] == own) or _is_power(square, (2, 2.0), own)


def _is_root(node: Node) -> bool:
    return op_name(node.target) == "pow" and len(node.args) == 2 and node.args[1] in (0.5, -0.5)


def _is_power(node: Node, exponents: tuple[float, ...], own: Ref) -> bool:
    return op_name(node.target) == "pow" and node.args[0] == own and node.args[1] in exponents


def _last_alone(dims: object, rank: int) -> bool:
    return isinstance(dims, (list, tuple)) and [dim % rank for dim in dims] == [rank - 1]
