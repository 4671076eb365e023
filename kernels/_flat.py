"""What the kernels of elementwise ops share: blocks of flat memory, tiles of equal runs, the guarded quotient.

The arithmetic is that of `csrc/formulas.h`.
"""

import triton
import triton.language as tl

__all__ = [
    "BLOCK", "WARPS", "elements", "load", "negative_part", "positive_part", "quotient", "scaled", "tile", "tiling",
]  # fmt: skip

# 8 elements a thread: 16-byte loads of half types, two of float32.
BLOCK = 1024
WARPS = 4


@triton.jit
def elements(count, BLOCK: tl.constexpr):
    """The elements of this program's block, and which of them there are."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit
def tile(runs, length, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Runs (ROWS,) and elements (1,COLUMNS) of this program's tile, and which there are; `blocks` tiles a run."""
    program = tl.program_id(0)
    run = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return run, at, (run < runs)[:, None] & (at < length)


@triton.jit
def load(at, mask, ACC: tl.constexpr):
    return tl.load(at, mask=mask, other=0.0).to(ACC)


@triton.jit
def scaled(relevance, factor, at, mask, FACTOR: tl.constexpr, ACC: tl.constexpr):
    """Relevance, times its factor if it has one."""
    r = load(relevance + at, mask, ACC)
    if FACTOR:
        r *= load(factor + at, mask, ACC)
    return r


@triton.jit
def quotient(r, d, epsilon):
    """r / (d moved away from zero by epsilon), 0 where even that is 0."""
    moved = tl.where(d >= 0, d + epsilon, d - epsilon)
    return tl.where(moved == 0, 0.0, r / moved)


@triton.jit
def positive_part(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays, here and below


@triton.jit
def negative_part(x):
    return tl.where(x >= 0, 0.0, x)


def tiling(runs: int, length: int) -> tuple[int, int, dict[str, int]]:
    """Programs, tiles side by side in a run, and what the kernel is told of a tile's shape and its warps."""
    columns = min(triton.next_power_of_2(length), BLOCK)
    rows, blocks = BLOCK // columns, triton.cdiv(length, columns)
    return triton.cdiv(runs, rows) * blocks, blocks, {"ROWS": rows, "COLUMNS": columns, "num_warps": WARPS}
