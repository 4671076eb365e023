"""Networks that end in an L2 normalisation, seen without it: similarity methods take norms for constants.

Where an embedding comes from is read off the graph, loosely: whatever the output is a rearrangement, multiple or
quotient of. What of it is the embedding before a normalisation is then decided by numbers: on random images the outputs
all have one length, and point where it points.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .capture import Program
from .execute import Schedule
from .layers import shown
from .nodes import LEAVES, Node, Ref, op_name
from .state import neutral_modes

__all__ = ["Unnormalised", "described", "picked", "sampled", "unnormalised"]

_IMAGES = 4
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclasses.dataclass(frozen=True)
class Unnormalised:
    """A network without its final normalisation.

    program  ends in the embedding (B, D) before it; the network itself where it has none
    length   of its embeddings, all alike; None where it does not normalise
    """

    program: Program
    length: float | None = None


def picked(program: Program, pick: Callable[[Any], Any]) -> Program:
    """`program` ending in the value that `pick` takes from its output; the same one for the same value.

    Raises TypeError where `pick` does not take one of the output's tensors as it is.
    """
    output = _pytree.tree_unflatten(program.outputs, program.out_spec)
    try:
        chosen, wrong = pick(output), ""
    except Exception as error:
        chosen, wrong = None, f" ({type(error).__name__}: {error})"
    if not isinstance(chosen, Ref):
        raise TypeError(
            f"embedding= must take one tensor of the model's output as it is, and this callable does not{wrong}; the "
            f"model returns {described(output, program)}. Where more has to be computed, wrap the model in a module"
        )
    if chosen.index not in program.picked:
        single = _pytree.tree_structure(0)
        program.picked[chosen.index] = dataclasses.replace(
            program, outputs=(chosen,), out_spec=single, found={}, cuts={}, embedding=None, picked={}
        )
    return program.picked[chosen.index]


def described(output: Any, program: Program | None = None) -> str:
    """What a model's output holds, for errors; of a program, with references for tensors."""
    found = []
    for path, leaf in _pytree.tree_flatten_with_path(output)[0]:
        shape = program.nodes[leaf.index].shape if program is not None and isinstance(leaf, Ref) else None
        size = (
            shown(shape or ()) if shape else str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
        )
        found.append(f"output{_pytree.keystr(path)} {size}")
    return f"{type(output).__name__} with {', '.join(found)}" if found else type(output).__name__


def unnormalised(program: Program, leaves: Mapping[int, Tensor]) -> Unnormalised:
    """`program`, whose leaves have these values, without a final normalisation of its rows to one length.

    Raises RuntimeError where the rows have one length, but no value before it points in their direction.
    Cost: a forward pass of four random images.
    """
    if program.embedding is None:
        program.embedding = _decide(program, leaves)
    return program.embedding or Unnormalised(program)


def _decide(program: Program, leaves: Mapping[int, Tensor]) -> Unnormalised | None:
    """None where the weights of the moment cannot tell."""
    outputs = program.outputs
    last = program.nodes[outputs[0].index] if len(outputs) == 1 and isinstance(outputs[0], Ref) else None
    if last is None or last.shape is None or len(last.shape) != 2 or (last.shape[1] or 0) < 2:
        return Unnormalised(program)
    sources = _sources(program, last)
    # Rounding of half types would hide what tells lengths apart.
    wide = {index: leaf.double() if leaf.is_floating_point() else leaf for index, leaf in leaves.items()}
    values = sampled(program, wide, {last.index, *sources})
    rows = values[last.index].double()
    lengths = rows.norm(dim=1)
    within = _TOLERANCE.get(values[last.index].dtype, 2e-2)
    length = float(lengths.mean())
    if length == 0 or bool((rows - rows[:1]).abs().max() <= within * length):
        return None
    if not bool(((lengths - length).abs() <= within * length).all()):
        return Unnormalised(program)
    units = rows / lengths.unsqueeze(1)
    for index in sorted(sources):  # the earliest one: a network may normalise twice
        raw = values[index].double().flatten(1)
        sizes = raw.norm(dim=1)
        alike = ((raw / sizes.unsqueeze(1).clamp(min=1e-300) - units).abs().amax(1) <= within).all()
        if bool(alike) and not bool(((sizes - sizes.mean()).abs() <= within * sizes.mean()).all()):
            return Unnormalised(_ending_at(program, index), length)
    raise RuntimeError(
        f"this network's embeddings all have length {length:.4g}, and what comes before their normalisation cannot be "
        "told from its graph; return the embedding before it is normalised, or pass embedding='avg'"
    )


def _sources(program: Program, last: Node) -> set[int]:
    """Values with as many numbers an image as the output that it is rearranged, multiplied or divided from."""
    size, found, seen, stack = last.shape[1] if last.shape else None, set(), set(), [last.index]
    while stack:
        node = program.nodes[stack.pop()]
        if node.index in seen or node.kind in LEAVES or node.index == program.input:
            continue
        seen.add(node.index)
        shape = node.shape or ()
        rows = node.index != last.index and shape[:1] == (None,) and None not in shape[1:]
        if rows and math.prod(each or 0 for each in shape[1:]) == size:
            found.add(node.index)
        if node.kind in ("reshape", "mul") or op_name(node.target) in ("clone", "contiguous", "_to_copy", "to"):
            stack.extend(node.refs())
    return found


def sampled(program: Program, leaves: Mapping[int, Tensor], wanted: set[int]) -> dict[int, Any]:
    """Values computed from random images, and these."""
    node = program.nodes[program.input]
    device = next((leaf.device for leaf in leaves.values()), torch.device("cpu"))
    drawn = torch.randn(
        (_IMAGES, *(size or 1 for size in (node.shape or ())[1:])), generator=torch.Generator().manual_seed(0)
    )
    dtype = next((leaf.dtype for leaf in leaves.values() if leaf.is_floating_point()), node.dtype)
    values: dict[int, Any] = dict(leaves)
    values[program.input] = drawn.to(device=device, dtype=dtype)
    with neutral_modes():
        Schedule(program, program.ancestors(frozenset(wanted)), frozenset(wanted), in_place=False).run(values)
    return values


def _ending_at(program: Program, index: int) -> Program:
    """The program with value `index`, as (B, D), for its output."""
    node, nodes, storage = program.nodes[index], program.nodes, program.storage
    if len(node.shape or ()) != 2:
        size = math.prod(each or 0 for each in (node.shape or ())[1:])
        target = torch.ops.aten.flatten.using_ints
        flat = dataclasses.replace(
            node, index=len(nodes), name="embedding", kind="reshape", target=target, args=(Ref(index), 1), kwargs={},
            shape=(None, size),
        )  # fmt: skip
        nodes, storage, index = (*nodes, flat), (*storage, storage[index]), flat.index
    return dataclasses.replace(
        program, nodes=nodes, storage=storage, outputs=(Ref(index),), found={}, cuts={}, embedding=None, picked={}
    )
