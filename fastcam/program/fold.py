"""Batch norms folded into the convolution or linear layer before them, for runs that need scores to rounding only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from fastcam._dtypes import accumulation_dtype

from .capture import Program
from .nodes import Node, Ref, op_name

__all__ = ["FoldedNorm", "fold_norms"]


@dataclass(frozen=True)
class FoldedNorm:
    """A layer's weight or bias with the batch norm behind it multiplied in.

    With f = scale / sqrt(variance + eps):  weight W f,  bias (b - mean) f + shift. The fields are indices of leaves, or
    None where the layer has no such parameter.
    """

    part: str
    weight: int
    bias: int | None
    scale: int | None
    shift: int | None
    mean: int
    variance: int
    eps: float

    def leaves(self) -> list[int]:
        found = (self.weight, self.bias, self.scale, self.shift, self.mean, self.variance)
        return [index for index in found if index is not None]

    def compute(self, live: dict[int, torch.Tensor]) -> torch.Tensor:
        """In the convolution's dtype; half precision is rounded once, at the end, as the norm itself would."""
        own = live[self.weight].dtype
        leaf = {index: live[index].to(accumulation_dtype(live[index].dtype)) for index in self.leaves()}
        factor = (leaf[self.variance] + self.eps).rsqrt()
        if self.scale is not None:
            factor = factor * leaf[self.scale]
        if self.part == "weight":
            weight = leaf[self.weight]
            return (weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))).to(own)
        bias = -leaf[self.mean] if self.bias is None else leaf[self.bias] - leaf[self.mean]
        return (bias * factor if self.shift is None else bias * factor + leaf[self.shift]).to(own)


def fold_norms(program: Program, feature: int) -> Program:
    """The same network with each evaluated batch norm that alone reads a convolution or linear layer folded into it.

    All indices keep their meaning; a layer whose output is `feature` is left as it is.
    """
    readers: dict[int, list[int]] = {}
    for node in program.nodes:
        for ref in node.refs():
            readers.setdefault(ref, []).append(node.index)
    nodes = list(program.nodes)
    storage = list(program.storage)
    for norm in program.nodes:
        source = _foldable(program, norm, readers, feature)
        if source is None:
            continue
        leaves = []
        for part in ("weight", "bias"):
            target = _folded(part, source, norm)
            leaves.append(Ref(len(nodes)))
            nodes.append(dataclasses.replace(_EMPTY, index=len(nodes), name=f"{norm.name}_{part}", target=target))
            storage.append(len(storage))
        args = (source.args[0], *leaves, *source.args[3:])
        nodes[norm.index] = dataclasses.replace(
            source, index=norm.index, args=args, kwargs=_without_bias(source.kwargs)
        )
    return dataclasses.replace(program, nodes=tuple(nodes), storage=tuple(storage), found={}, cuts={}, embedding=None)


_EMPTY = Node(0, "", "folded", None, (), {}, "", "", None, None)


def _without_bias(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "bias"}


def _foldable(program: Program, norm: Node, readers: dict[int, list[int]], feature: int) -> Node | None:
    """The convolution that `norm` may be folded into, or None."""
    if op_name(norm.target) != "batch_norm" or norm.kwargs or not isinstance(norm.args[0], Ref):
        return None
    source = program.nodes[norm.args[0].index]
    by_name = op_name(source.target) in ("conv1d", "conv2d", "conv3d")
    # Of more dimensions, the norm's second one is not the linear layer's last.
    by_name = by_name or (op_name(source.target) == "linear" and len(source.shape or ()) == 2)
    alone = readers[source.index] == [norm.index] and source.index not in program.output_indices
    stored = all(isinstance(norm.args[i], Ref) for i in (3, 4)) and norm.args[5] is False
    direct = all(
        program.nodes[arg.index].kind in ("parameter", "buffer", "constant")
        for arg in (*source.args[1:3], *norm.args[1:5])
        if isinstance(arg, Ref)
    )
    return source if by_name and alone and stored and direct and source.index != feature else None


def _folded(part: str, source: Node, norm: Node) -> FoldedNorm:
    def index(value: Any) -> int | None:
        return value.index if isinstance(value, Ref) else None

    bias = source.args[2] if len(source.args) > 2 else source.kwargs.get("bias")
    return FoldedNorm(
        part=part,
        weight=source.args[1].index,
        bias=index(bias),
        scale=index(norm.args[1]),
        shift=index(norm.args[2]),
        mean=norm.args[3].index,
        variance=norm.args[4].index,
        eps=norm.args[7],
    )
