"""Closed-form heads: where every score is affine in the features, its gradient is a constant of the weights.

Global average pooling + linear is the common case; every composition of average pools, linear layers, convolutions,
evaluated batch norms, additions, multiplications by weights, concatenations and reshapes qualifies. Whether a head
qualifies is decided from its nodes and then verified once on random numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastcam._dtypes import accumulation_dtype
from fastcam._tracing import tracing

from .capture import Program
from .nodes import LEAVES, Node, Ref, op_name, refs_in

__all__ = ["AffineHead", "analyse"]

log = logging.getLogger("fastcam")

_UNARY = frozenset({"reshape", "pad", "neg"})
_AVERAGES = frozenset(
    {f"{prefix}avg_pool{rank}d" for rank in (1, 2, 3) for prefix in ("", "adaptive_", "_adaptive_")} | {"mean", "sum"}
)
#: Classes handled in one backward pass through a general affine head.
_CHUNK = 64

RunHead = Callable[[torch.Tensor, dict[int, Any]], torch.Tensor]


class AffineHead:
    """Gradients of the scores of an affine head with respect to its features, without running the head on the batch.

    `pooled` heads (global average pool, reshapes, at most one linear layer) read them off the weight, W[c] / Z, in the
    accumulation dtype; without a linear layer W is the identity. Other affine heads need one backward pass on a single
    made-up sample for each class asked for, whatever the batch. `uniform` heads have the same gradient everywhere.
    """

    def __init__(self, weight: int | None, positions: int, uniform: bool, average: bool = False):
        self._weight = weight
        self._average = average
        self._positions = positions
        self.uniform = uniform
        self._verdict: bool | None = None

    @property
    def pooled(self) -> bool:
        """Whether the head is a global average pool, with or without a linear layer behind it."""
        return self._weight is not None or self._average

    def holds(self, run: RunHead, leaves: dict[int, Any], features: torch.Tensor) -> bool:
        """Whether the analysis agrees with autograd on random features; checked at the first call, then remembered."""
        if self._verdict is None and not tracing():
            self._verdict = self._verify(run, leaves, features)
            if self._verdict is False:
                log.warning("a head that looks affine is not; its gradients are taken by autograd")
        return self._verdict is not False

    def gradients(
        self, classes: torch.Tensor, run: RunHead, leaves: dict[int, Any], like: torch.Tensor
    ) -> torch.Tensor:
        """d score[c] / d features for `classes` (B,) or (B, T): (B[, T], K, *spatial), expanded where uniform."""
        spatial = like.shape[2:]
        if self._weight is not None:
            rows = leaves[self._weight][classes].to(accumulation_dtype(like.dtype))
            return _everywhere(rows / self._positions, spatial)
        if self._average:
            hot = torch.nn.functional.one_hot(classes, like.shape[1]).to(accumulation_dtype(like.dtype))
            return _everywhere(hot / self._positions, spatial)
        if tracing():  # how many classes there are is a matter of numbers
            unique, inverse = classes.flatten(), torch.arange(classes.numel(), device=like.device).view_as(classes)
            found = self._rows(unique, run, leaves, like)
        else:
            unique, inverse = torch.unique(classes, return_inverse=True)
            found = torch.cat([self._rows(part, run, leaves, like) for part in unique.split(_CHUNK)])
        if self.uniform:
            return _everywhere(found.flatten(2)[..., 0][inverse], spatial)
        return found[inverse]

    def from_scores(self, slopes: torch.Tensor, leaves: dict[int, Any], like: torch.Tensor) -> torch.Tensor:
        """Gradient of a score with slopes d score / d output (B, C), on a pooled head: (B, K, *spatial), expanded."""
        assert self.pooled
        rows = slopes.to(accumulation_dtype(like.dtype))
        if self._weight is not None:
            rows = rows @ leaves[self._weight].to(rows.dtype)
        return _everywhere(rows / self._positions, like.shape[2:])

    @staticmethod
    def _rows(classes: torch.Tensor, run: RunHead, leaves: dict[int, Any], like: torch.Tensor) -> torch.Tensor:
        probe = like.new_zeros((classes.shape[0], *like.shape[1:]))
        return _vjp(probe, classes, run, leaves)

    def _verify(self, run: RunHead, leaves: dict[int, Any], like: torch.Tensor) -> bool | None:
        """The verdict, or None where the weights of the moment (all zero, say) cannot tell."""
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn((2, *like.shape[1:]), generator=generator).to(like)
        classes = torch.zeros(2, dtype=torch.int64, device=like.device)
        found = _vjp(draw, classes, run, leaves).flatten(2)
        scale = float(found.abs().max())
        if scale == 0:
            return None
        tolerance = (1e-4 if like.dtype in (torch.float32, torch.float64) else 3e-2) * scale
        agrees = bool((found[0] - found[1]).abs().max() <= tolerance)
        if self.uniform:
            agrees = agrees and bool((found - found[..., :1]).abs().max() <= tolerance)
        if self.pooled:
            closed = self.gradients(classes, run, leaves, draw).flatten(2)
            agrees = agrees and bool((closed - found).abs().max() <= tolerance)
        return agrees


def _everywhere(rows: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """(..., K) -> (..., K, *spatial), the same at every position, without a copy."""
    return rows.reshape(*rows.shape, *(1,) * len(spatial)).expand(*rows.shape, *spatial)


def _vjp(probe: torch.Tensor, classes: torch.Tensor, run: RunHead, leaves: dict[int, Any]) -> torch.Tensor:
    with torch.enable_grad():
        probe = probe.requires_grad_()
        (output,) = torch.utils._pytree.tree_leaves(run(probe, leaves))  # in whatever structure
        (found,) = torch.autograd.grad(output.gather(1, classes.unsqueeze(1)).sum(), probe)
    return found


def analyse(program: Program, feature: int, head: list[Node]) -> AffineHead | None:
    """The closed form of the head behind value `feature`, or None where some node is not affine in it."""
    images = program.descendants(program.input)
    affine = {feature}
    for node in head:
        if not _is_affine(program, node, affine, images):
            return None
        affine.add(node.index)
    outputs = program.outputs
    if len(outputs) != 1 or not isinstance(outputs[0], Ref) or len(program.nodes[outputs[0].index].shape or ()) != 2:
        return None
    shape = program.nodes[feature].shape or ()
    uniform = _is_uniform(program, feature, head)
    weight = _pooled_weight(program, feature, head) if uniform else None
    positions = math.prod(size or 0 for size in shape[2:])
    return AffineHead(weight, positions, uniform, uniform and _is_average(program, feature, head))


def _is_uniform(program: Program, feature: int, head: list[Node]) -> bool:
    """Whether every path from the features averages over all positions before it tells them apart."""
    spread = {feature}  # values that still have positions
    for node in head:
        reads = [ref for ref in node.refs() if ref in spread]
        if not reads:
            continue
        source = program.nodes[reads[0]].shape or ()
        if not _treats_positions_alike(program, node, source):
            return False
        if math.prod(size or 0 for size in (node.shape or ())[2:]) > 1:
            spread.add(node.index)
    return True


def _treats_positions_alike(program: Program, node: Node, source: tuple[int | None, ...]) -> bool:
    name = op_name(node.target)
    result = node.shape or ()
    if name in ("mean", "sum"):
        dims = node.args[1] if len(node.args) > 1 else None
        return isinstance(dims, (list, tuple)) and all(dim % len(source) >= 2 for dim in dims)
    if name.endswith(("avg_pool1d", "avg_pool2d", "avg_pool3d")):
        everything = "adaptive" in name or tuple(node.args[1]) == source[2:]
        return everything and math.prod(size or 0 for size in result[2:]) == 1
    if node.kind == "conv":
        kernel = program.nodes[next(iter(refs_in(node.args[1])))].shape or ()
        return math.prod(size or 0 for size in kernel[2:]) == 1 and result[2:] == source[2:]
    if node.kind == "mul":
        return all(not isinstance(arg, Ref) or program.nodes[arg.index].shape == source for arg in node.args)
    return node.kind in ("norm", "add")


def _is_affine(program: Program, node: Node, affine: set[int], images: set[int]) -> bool:
    """Whether `node`'s result is affine in the features, with coefficients that do not depend on the image."""
    reads = [ref for ref in node.refs() if ref in affine]
    others = [ref for ref in node.refs() if ref not in affine]
    # Nothing but the batch size may come from the image, not even as a summand: the closed form is evaluated on
    # made-up samples, for which such a value does not exist.
    if any(ref in images and op_name(program.nodes[ref].target) != "sym_size" for ref in others):
        return False
    first = isinstance(node.args[0], Ref) and node.args[0].index in affine if node.args else False
    name = op_name(node.target)
    if node.kind in _UNARY or name == "neg":
        if name == "pad":
            return first and (len(node.args) < 3 or node.args[2] == "constant")
        return first and len(set(reads)) == 1 and not any(program.nodes[r].kind in LEAVES for r in others)
    if name in _AVERAGES or node.kind == "resize":
        return first
    if node.kind in ("conv", "linear"):
        return first and len(reads) == 1
    if node.kind == "norm":
        return first and len(reads) == 1 and name in ("batch_norm", "_native_batch_norm_legit_no_training")
    if node.kind == "add":
        return True
    if node.kind == "mul":
        return len(reads) == 1 and (name == "mul" or (first and "rounding_mode" not in node.kwargs))
    if node.kind == "matmul":
        return name in ("matmul", "mm", "bmm", "addmm") and len(reads) == 1
    if node.kind == "cat":
        return bool(reads) and set(refs_in(node.args[0])) <= affine
    return False


def _pooled_weight(program: Program, feature: int, head: list[Node]) -> int | None:
    """Index of the weight W when the head is global average pool -> reshapes -> linear(W, b), else None."""
    *steps, last = head
    pooled = _end_of_average(program, feature, steps)
    if pooled is None or op_name(last.target) != "linear" or last.args[0] != Ref(pooled):
        return None
    weight = last.args[1]
    return weight.index if isinstance(weight, Ref) and program.nodes[weight.index].kind == "parameter" else None


def _is_average(program: Program, feature: int, head: list[Node]) -> bool:
    """Whether the head is global average pool -> reshapes and nothing else."""
    return _end_of_average(program, feature, head) == program.outputs[0].index


def _end_of_average(program: Program, feature: int, steps: list[Node]) -> int | None:
    """Index of the (B, K) means when `steps` are one global average pool and reshapes, else None."""
    pooled, previous = 0, feature
    for node in steps:
        if not node.args or node.args[0] != Ref(previous) or node.shape is None:
            return None
        if op_name(node.target) in _AVERAGES - {"sum"}:
            pooled += 1
        elif node.kind != "reshape":
            return None
        previous = node.index
    flat = (None, (program.nodes[feature].shape or ())[1])
    return previous if pooled == 1 and program.nodes[previous].shape == flat else None
