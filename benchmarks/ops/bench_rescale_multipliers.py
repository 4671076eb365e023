"""`rescale_multipliers`: launch-bound, typical and bandwidth-bound shapes, against eager and compiled PyTorch.

Baselines: `eager` is the formula as packages write it, with an epsilon where inputs and reference are close; `compile`
a warm torch.compile of the reference.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

from fastcam import ops, reference

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SLOPES = (0.0, 0.01)
SHAPES = [
    ("launch", (1, 512, 7, 7)),
    ("typical", (8, 2048, 7, 7)),
    ("typical", (8, 512, 14, 14)),
    ("typical", (8, 256, 56, 56)),
    ("bandwidth", (64, 512, 28, 28)),
]
compiled = torch.compile(reference.rescale_multipliers, dynamic=False)


def eager(g: Tensor, u: Tensor, r: Tensor, slope: float) -> Tensor:
    """Quotient of differences, and the gradient where the inputs' difference is too small to divide by."""
    difference = u - r
    quotient = (leaky_relu(u, slope) - leaky_relu(r, slope)) / difference
    return g * torch.where(difference.abs() < 1e-6, torch.where(u > 0, 1.0, slope).to(u.dtype), quotient)


def main() -> None:
    """Measure all rows and write the file."""
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for (regime, shape), dtype, layout, slope in itertools.product(SHAPES, DTYPES, LAYOUTS, SLOPES):
        name = f"{'x'.join(map(str, shape))} slope {slope}, {str(dtype).removeprefix('torch.')} {layout}"
        if options.only not in name:
            continue
        torch.compiler.reset()  # each shape is compiled on its own, below the recompilation limit
        torch.manual_seed(0)
        g, u, r = (
            torch.randn((b, *shape[1:]), dtype=dtype, device=options.device).contiguous(memory_format=LAYOUTS[layout])
            for b in (shape[0], shape[0], 1)
        )
        baselines = {
            "eager": lambda g=g, u=u, r=r, s=slope: eager(g, u, r, s),
            "compile": lambda g=g, u=u, r=r, s=slope: compiled(g, u, r, s),
        }
        exact = reference.rescale_multipliers(g.double(), u.double(), r.double(), slope)
        rows.append(
            harness.op_row(
                name,
                lambda g=g, u=u, r=r, s=slope: ops.rescale_multipliers(g, u, r, s),
                baselines,
                exact,
                torch.finfo(dtype).eps * exact.abs().max().item(),
                3 * g.nbytes + r.nbytes,
                options,
                op="rescale_multipliers",
                shape=shape,
                negative_slope=slope,
                dtype=str(dtype),
                layout=layout,
                regime=regime,
            )
        )
    harness.write("rescale_multipliers", options.device, rows, options.out)


if __name__ == "__main__":
    main()
