"""Writes docs/ops.md, the table of ops, backends, dtypes, layouts and gradients; `--check` fails where it is stale.

    python -P docs/ops.py [--check]

Nothing in the table is typed in: backends are the registrations in the sources, the rest is what the ops themselves do
with small arguments (`fastcam/_testing/fuzz.py`) of every dtype, in channels_last, and with inputs that require grad.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcam import ops
from fastcam._library import SCHEMAS
from fastcam._testing.fuzz import CASES, Case, Draw, case
from fastcam._testing.ops import DTYPES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ops.md"
HEAD = """# Ops

`fastcam.ops.<name>`, and for graphs and C++ `torch.ops.fastcam.<name>`. What each computes, its shapes and its errors
stand in its docstring; `python -m fastcam.info` shows which backend serves it on this machine, and why not the others.
Every op takes NCHW and channels_last without a copy and any other strides, empty batches, and tensors of more than 2^31
elements (on GPUs, an image or a map of fewer); results are the same on every run and for an image in any batch.

`python -P docs/ops.py` writes this page from the registrations and from what the ops do.

| op | reference | C++ (CPU) | Triton | CUDA C++ | dtypes | result of channels_last inputs | gradients |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def sample(op: str, dtype: torch.dtype) -> Case:
    """The first plain case of a dtype whose tensors are images with several values in every dimension."""
    for seed in count():
        draw = Draw(op, seed)
        if draw.kind != "plain" or draw.dtype != dtype:
            continue
        made = case(op, seed)
        first = made.arguments[0]
        if (first.dim() == 4 or op == "similarity_weights") and min(first.shape) > 1 and first.numel() < 20000:
            return made
    raise AssertionError


def call(op: str, made: Case, change: Any) -> list[Tensor]:
    """Results of the registered op for changed tensors."""
    overload = SCHEMAS_OF[op]
    name, _, suffix = overload.partition(".")
    arguments = [change(x) if isinstance(x, Tensor) else x for x in made.arguments]
    options = {key: change(x) if isinstance(x, Tensor) else x for key, x in made.options.items()}
    found = getattr(getattr(torch.ops.fastcam, name), suffix or "default")(*arguments, **options)
    return [found] if isinstance(found, Tensor) else list(found)


SCHEMAS_OF = {name.partition(".")[0]: name for name in SCHEMAS}  # the last overload is the one kernels have


def registered(op: str, folder: str, ending: str) -> str:
    """Whether the op's kernel is there and registered."""
    there = (ROOT / folder / f"{op}{ending}").is_file()
    if there and ending != ".py":
        listed = f'OP("{SCHEMAS_OF[op]}", {op},' in (ROOT / "csrc" / "op_list.h").read_text()
        there = listed or f'm.impl("{SCHEMAS_OF[op]}", {op})' in (ROOT / folder / f"{op}{ending}").read_text()
    return "yes" if there else "no"


def dtypes(op: str) -> str:
    """Those it runs in."""
    for dtype in DTYPES:
        call(op, sample(op, dtype), lambda x: x)
    short = {"torch.float64": "fp64", "torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
    return ", ".join(short[str(dtype)] for dtype in DTYPES)


def layout(op: str) -> str:
    """Of the first result, where that is images."""

    def last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    found = call(op, sample(op, torch.float32), last)[0]
    if op == "overlay" or found.dim() < 4:
        return "contiguous"
    images = found.flatten(0, -4) if found.dim() > 4 else found
    return "channels_last" if images.is_contiguous(memory_format=torch.channels_last) else "contiguous"


def gradients(op: str) -> str:
    """Of the public function."""
    public = getattr(ops, op)
    if not callable(public):
        return "is a backward pass"
    made = sample(op, torch.float32)
    first = made.arguments[0].detach().clone().requires_grad_()
    try:
        found = public(first, *made.arguments[1:], **made.options)
    except RuntimeError:
        return "refused"
    return "yes" if (found if isinstance(found, Tensor) else found[0]).requires_grad else "no"


def page() -> str:
    """What docs/ops.md has to be."""
    lines = []
    for op in sorted(CASES):
        kernels = [registered(op, *where) for where in (("csrc/cpu", ".cpp"), ("kernels", ".py"), ("csrc/cuda", ".cu"))]
        lines.append(f"| `{op}` | yes | {' | '.join(kernels)} | {dtypes(op)} | {layout(op)} | {gradients(op)} |\n")
    return HEAD + "".join(lines)


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    if "--check" in arguments:
        if PAGE.is_file() and PAGE.read_text() == page():
            return 0
        print("docs/ops.md is stale: python -P docs/ops.py", file=sys.stderr)
        return 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
