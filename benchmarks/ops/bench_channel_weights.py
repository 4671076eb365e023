"""`channel_weights` in all modes: launch-bound, typical and bandwidth-bound shapes, against eager and compiled PyTorch.

Baselines: `eager` is the formula as CAM packages write it, `einsum` (mode "sum") one contraction, `compile` a warm
torch.compile of the reference.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

from fastcam import ops, reference

MODES = ("mean", "sum", "xgrad", "grad_cam_pp")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [
    ("launch", (1, 512, 7, 7)),
    ("typical", (8, 2048, 7, 7)),
    ("typical", (8, 512, 14, 14)),
    ("typical", (8, 256, 56, 56)),
    ("bandwidth", (64, 2048, 14, 14)),
]
compiled = torch.compile(reference.channel_weights, dynamic=False)


def eager(a: Tensor, g: Tensor, mode: str) -> Tensor:
    """The formulas without fusion and without guards beyond an epsilon, as packages have them."""
    if mode == "mean":
        return g.mean((2, 3))
    if mode == "sum":
        return (g * a).sum((2, 3))
    total = a.sum((2, 3), keepdim=True)
    if mode == "xgrad":
        return (g * a / (total + 1e-7)).sum((2, 3))
    squared = g * g
    alpha = torch.where(g != 0, squared / (2 * squared + total * squared * g + 1e-7), torch.zeros_like(g))
    return (alpha * g.relu()).sum((2, 3))


def main() -> None:
    """Measure all rows and write the file."""
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for (regime, shape), layout, mode in itertools.product(SHAPES, LAYOUTS, MODES):
        name = f"{'x'.join(map(str, shape))} {mode}, {layout}"
        if options.only not in name:
            continue
        torch.compiler.reset()  # each shape is compiled on its own, below the recompilation limit
        torch.manual_seed(0)
        a, g = (torch.rand(shape, device=options.device).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
        baselines = {
            "eager": lambda a=a, g=g, m=mode: eager(a, g, m),
            "compile": lambda a=a, g=g, m=mode: compiled(a, g, None, m),
        }
        if mode == "sum":
            baselines["einsum"] = lambda a=a, g=g: torch.einsum("bkhw,bkhw->bk", a, g)
        exact = reference.channel_weights(a.double(), g.double(), None, mode)
        moved = a.nbytes * (1 if mode == "mean" else 2)
        rows.append(
            harness.op_row(
                name,
                lambda a=a, g=g, m=mode: ops.channel_weights(a, g, mode=m),
                baselines,
                exact,
                1e-5 * exact.abs().max().item(),
                moved,
                options,
                op="channel_weights",
                shape=shape,
                mode=mode,
                dtype="torch.float32",
                layout=layout,
                regime=regime,
            )
        )
    harness.write("channel_weights", options.device, rows, options.out)


if __name__ == "__main__":
    main()
