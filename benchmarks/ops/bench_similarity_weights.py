"""`similarity_weights` of one query against a gallery and of pairs, against eager and compiled PyTorch.

Baselines: `eager` is the formula as one writes it, in float32 and one torch op after the other; `compile` a warm
torch.compile of that; `reference` the reference, in float64. `copy` moves what the op has to read and write.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

from fastcam import ops, reference

TERMS = ("cosine", "neg_sq", "inverse")
WEIGHTINGS = ("minmax", "ratio")
# Rows of the first embeddings and of the second.
SHAPES = [("gallery", 1, 1000, 2048), ("pairs", 64, 64, 512), ("pairs", 8, 8, 2048), ("pairs", 16384, 16384, 1024)]


def eager(u: Tensor, v: Tensor, term: str, weighting: str) -> tuple[Tensor, Tensor, Tensor]:
    """Contributions, weights, total, without guards beyond those of torch."""
    if term == "cosine":
        c = functional.normalize(u) * functional.normalize(v)
    else:
        c = -((u - v) ** 2) if term == "neg_sq" else 1 / (1 + (u - v).abs())
    total = c.sum(1)
    if weighting == "ratio":
        return c, c / total.abs()[:, None], total
    low, high = c.amin(1, keepdim=True), c.amax(1, keepdim=True)
    return c, (c - low) / (high - low), total


compiled = torch.compile(eager, dynamic=False)


def main() -> None:
    """Measure all rows and write the file."""
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for (regime, first, second, channels), term, weighting in itertools.product(SHAPES, TERMS, WEIGHTINGS):
        name = f"{first}:{second}x{channels} {term} {weighting}"
        if options.only not in name:
            continue
        torch.compiler.reset()  # each shape is compiled on its own, below the recompilation limit
        torch.manual_seed(0)
        u, v = (torch.rand(rows, channels, device=options.device) for rows in (first, second))
        calls = {"eager": eager, "compile": compiled, "reference": reference.similarity_weights}
        exact = reference.similarity_weights(u.double(), v.double(), term, weighting)
        rows.append(
            harness.op_row(
                name,
                lambda u=u, v=v, t=term, w=weighting: ops.similarity_weights(u, v, t, w),
                {n: lambda f=f, u=u, v=v, t=term, w=weighting: f(u, v, t, w) for n, f in calls.items()},
                exact,
                1e-6 * max(x.abs().max().item() for x in exact),
                u.nbytes + v.nbytes + (2 * channels + 1) * second * 4,
                options,
                op="similarity_weights",
                shape=(first, second, channels),
                term=term,
                weighting=weighting,
                dtype="torch.float32",
                regime=regime,
            )
        )
    harness.write("similarity_weights", options.device, rows, options.out)


if __name__ == "__main__":
    main()
