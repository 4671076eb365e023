"""Feature maps out of tokens (B, N, C) and out of blocks with channels last (B, *spatial, C), as the graph has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .capture import Program
from .layers import is_channels_last, shown
from .nodes import Node, Ref, op_name

__all__ = ["arrangement", "channels_first"]

#: Tokens beside those of the grid that are taken for class, distillation and register tokens.
_ASIDE = 16


@dataclass(frozen=True)
class Grid:
    """(B, N, C) -> (B, C, *size): the tokens from `start` on, row by row."""

    start: int
    size: tuple[int, ...]

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.start : self.start + math.prod(self.size)].mT.unflatten(2, self.size)


def channels_first(block: Tensor) -> Tensor:
    return block.movedim(-1, 1)


def arrangement(program: Program, index: int, layer: str) -> Callable[[Tensor], Tensor] | None:
    """What brings value `index`, the output of `layer`, into (B, K, *spatial); None where nothing need be moved, or
    where nothing is known that would.

    Tokens follow the grid of the convolution that made them. Others that are concatenated with them, such as a class
    token, are left out.

    Raises TypeError where tokens fit several grids, or where what else is among them cannot be told.
    """
    rank = len(program.nodes[program.input].shape or ()) - 2
    shape = program.nodes[index].shape or ()
    if index == program.input or shape[:1] != (None,) or len(shape) < 3:
        return None
    if len(shape) == rank + 2 and not is_channels_last(program, index):
        return None
    tokens = len(shape) == 3
    found = _grids(program, index, shape[1] or 0, rank) if tokens else set()
    if len(found) > 1:
        raise TypeError(f"{_what(layer, shape)}, which fit grids {_listed(found)}; {_CURE}")
    if not found:
        return channels_first if len(shape) == rank + 2 else None
    (size,) = found
    aside = (shape[1] or 0) - math.prod(size)
    start = 0 if aside == 0 else _start(program, index, shape[1] or 0, math.prod(size))
    if start is None:
        raise TypeError(
            f"{_what(layer, shape)}: a grid {_listed(found)} and {aside} more, whose place is unknown; {_CURE}"
        )
    return Grid(start, size)


_CURE = "pass reshape_transform=callable that turns them into (B, K, H, W)"


def _what(layer: str, shape: tuple[int | None, ...]) -> str:
    return f"layer '{layer}' gives tokens of shape {shown(shape)}"


def _listed(grids: set[tuple[int, ...]]) -> str:
    return ", ".join(" x ".join(map(str, grid)) for grid in sorted(grids))


def _grids(program: Program, index: int, tokens: int, rank: int) -> set[tuple[int, ...]]:
    """Sizes of the latest feature maps on the way here that have about as many positions as there are tokens."""
    exact: set[tuple[int, ...]] = set()
    near: set[tuple[int, ...]] = set()
    for ancestor in program.ancestors(frozenset({index})) & program.descendants(program.input):
        node = program.nodes[ancestor]
        shape = node.shape or ()
        if node.kind != "conv" or len(shape) != rank + 2 or None in shape[1:]:
            continue
        aside = tokens - math.prod(size or 0 for size in shape[2:])
        if 0 <= aside <= _ASIDE:
            (near if aside else exact).add(tuple(size or 0 for size in shape[2:]))
    return exact or near


def _start(program: Program, index: int, tokens: int, places: int) -> int | None:
    """How many tokens stand before the grid's, by the last concatenation that has the grid's for one operand."""
    for ancestor in sorted(program.ancestors(frozenset({index})), reverse=True):
        node = program.nodes[ancestor]
        if op_name(node.target) not in ("cat", "concat") or (node.shape or ())[1:2] != (tokens,) or not _along(node):
            continue
        sizes = [(program.nodes[arg.index].shape or (0, 0))[1] for arg in node.args[0] if isinstance(arg, Ref)]
        if sizes.count(places) == 1 and None not in sizes:
            return sum(size or 0 for size in sizes[: sizes.index(places)])
    return None


def _along(node: Node) -> bool:
    """Whether a concatenation lengthens the second of three dimensions."""
    return len(node.shape or ()) == 3 and len(node.args) > 1 and node.args[1] in (1, -2)
