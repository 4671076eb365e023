"""The relevance_* ops at layers of VGG-16 and ResNet-50, against eager and compiled PyTorch.

Baselines: `eager` is the composition that packages run, one torch op after the other (Zennit's stabiliser, the clamps,
sums and choices of Attribution Equilibrium); `compile` a warm torch.compile of the reference. `copy` moves what the op
has to read and write: relevance_combine reads the inputs and the shared part twice, once to count.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

from fastcam import ops, reference

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [
    ("vgg16", (8, 64, 224, 224)),
    ("vgg16", (8, 256, 56, 56)),
    ("vgg16", (8, 512, 28, 28)),
    ("vgg16", (8, 512, 14, 14)),
    ("resnet50", (8, 64, 112, 112)),
    ("resnet50", (8, 256, 56, 56)),
    ("resnet50", (8, 2048, 7, 7)),
]
EPSILON = 1e-6


def stabilised(d: Tensor) -> Tensor:
    """As Zennit has it: sign(0) counts as +1."""
    return d + ((d == 0.0).to(d) + d.sign()) * EPSILON


def guarded(r: Tensor, d: Tensor) -> Tensor:
    """r / d, 0 where d is 0."""
    return torch.where(d == 0, torch.zeros_like(d), r / d)


def divide(r: Tensor, d: Tensor) -> Tensor:
    """One gradient of the epsilon rule."""
    return r / stabilised(d)


def add(r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The norm rule of a sum."""
    share = r / stabilised(a + b)
    return a * share, b * share


def alpha_beta(r: Tensor, z: Tensor, p: Tensor) -> Tensor:
    """Messages of positive and negative weights, at once as two groups of channels."""
    return torch.cat([2 * r / stabilised(p), -r / stabilised(z - p)], 1)


def gamma(r: Tensor, z: Tensor, p: Tensor) -> Tensor:
    """The generalised gamma rule: a message where the output is positive, another where it is negative."""
    u = (z > 0).to(r) * r / stabilised(z + 2 * p)
    return torch.cat([u, (z < 0).to(r) * r / stabilised(z + 2 * (z - p))], 1)


def rap(r: Tensor, z: Tensor, p: Tensor) -> Tensor:
    """Relative attributing propagation's two messages."""
    n = z - p
    u = guarded(r.clamp(min=0), p)
    return torch.cat([u, guarded(r.clamp(max=0), n.abs()) + guarded(r, p + n.abs())], 1)


def budgets(r: Tensor) -> Tensor:
    """Two clamps, two sums."""
    return torch.stack([r.clamp(min=0).sum((1, 2, 3)), -r.clamp(max=0).sum((1, 2, 3))], 1)


def equilibrium(r: Tensor, totals: Tensor, z: Tensor) -> Tensor:
    """Relevance brought to its budgets, by three divisors."""
    p, q = totals.to(r.dtype)[:, :, None, None, None].unbind(1)
    positive, negative = guarded(r.clamp(min=0), p.expand_as(r)), guarded(r.clamp(max=0), q.expand_as(r))
    shared, active, inactive = z.chunk(3)
    parts = guarded(2 * positive + negative, shared), guarded(positive, active), guarded(negative, inactive)
    return torch.cat(parts)


def combine(x: Tensor, t: Tensor, totals: Tensor) -> Tensor:
    """The shared part, one taken from it altogether, and what active and inactive inputs get."""
    shared, active, inactive = t.chunk(3)
    c = x.clamp(min=0) * shared
    touched = (c != 0).to(c)
    c = c - touched / touched.sum((1, 2, 3), keepdim=True, dtype=totals.dtype).to(c)
    return c + torch.where(x > 0, active, inactive)


def reference_split(rule: str) -> Callable[..., Tensor]:
    """The reference with its rule fixed."""
    return lambda r, z, p: reference.relevance_split(r, z, p, rule=rule)


def ours_split(rule: str) -> Callable[..., Tensor]:
    """The op with its rule fixed."""
    return lambda r, z, p: ops.relevance_split(r, z, p, rule=rule)


# Op, eager, reference, which inputs, how many times an image-sized tensor is read or written.
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], str, int]] = {
    "divide": (ops.relevance_divide, divide, reference.relevance_divide, "rz", 3),
    "add": (ops.relevance_add, add, reference.relevance_add, "rzp", 5),
    "split alpha_beta": (ours_split("alpha_beta"), alpha_beta, reference_split("alpha_beta"), "rzp", 5),
    "split gamma": (ours_split("gamma"), gamma, reference_split("gamma"), "rzp", 5),
    "split rap": (ours_split("rap"), rap, reference_split("rap"), "rzp", 5),
    "budgets": (ops.relevance_budgets, budgets, reference.relevance_budgets, "r", 1),
    "equilibrium": (ops.relevance_equilibrium, equilibrium, reference.relevance_equilibrium, "rtd", 7),
    "combine": (ops.relevance_combine, combine, reference.relevance_combine, "xdt", 7),
}


def tensors(names: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str) -> list[Tensor]:
    """Relevance r, outputs z with their positive parts p, inputs x, three divisors or messages d, totals t of r."""
    torch.manual_seed(0)

    def lying(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])

    r, p = lying(torch.randn(shape, device=device)), lying(torch.rand(shape, device=device) + 0.1)
    found = {
        "r": lambda: r,
        "p": lambda: p,
        "z": lambda: lying(p.float() - torch.rand(shape, device=device) - 0.1),
        "x": lambda: lying(torch.randn(shape, device=device).clamp(min=0)),
        "d": lambda: lying(torch.rand((3 * shape[0], *shape[1:]), device=device) + 0.1),
        "t": lambda: ops.relevance_budgets(r),
    }
    return [found[name]() for name in names]


def main() -> None:
    """Measure all rows and write the file."""
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for (network, shape), dtype, layout, (case, calls) in itertools.product(SHAPES, DTYPES, LAYOUTS, CASES.items()):
        name = f"{case} {network} {'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')} {layout}"
        if options.only not in name:
            continue
        ours, eager, exact, names, times = calls
        torch.compiler.reset()  # each shape is compiled on its own, below the recompilation limit
        compiled = torch.compile(exact, dynamic=False)
        given = tensors(names, shape, dtype, layout, options.device)
        expected = exact(*(x.double() for x in given))
        largest = max(x.abs().max().item() for x in (expected if isinstance(expected, tuple) else (expected,)))
        op = "relevance_" + case.split()[0]
        rows.append(
            harness.op_row(
                name,
                lambda f=ours, x=given: f(*x),
                {"eager": lambda f=eager, x=given: f(*x), "compile": lambda f=compiled, x=given: f(*x)},
                expected,
                (1e-5 if op == "relevance_budgets" else 8 * torch.finfo(dtype).eps) * largest,
                times * given[0].nbytes,
                options,
                op=op,
                shape=shape,
                dtype=str(dtype),
                layout=layout,
                network=network,
            )
        )
    harness.write("relevance_ops", options.device, rows, options.out)


if __name__ == "__main__":
    main()
