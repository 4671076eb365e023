"""`perturb_by_rank`: insertion and deletion images, in launch-bound, typical and bandwidth-bound shapes.

Baselines: `eager` is the one torch.where that does it, `compile` a warm torch.compile of the same, `reference` our own,
which also keeps the images' layout. `copy` moves what must be moved: images, baseline and ranks once, the result once.
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

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROWS = [  # regime, images (B,C,H,W), steps, whether the baseline has one pixel
    ("launch", (1, 3, 32, 32), 4, True),
    ("typical", (1, 3, 224, 224), 50, True),
    ("typical", (8, 3, 224, 224), 16, False),
    ("bandwidth", (8, 3, 224, 224), 100, True),
]


def eager(images: Tensor, baseline: Tensor, ranks: Tensor, counts: Tensor) -> Tensor:
    """Deletion as it is written down."""
    reached = ranks[:, None, None] < counts[:, None, None, None]
    return torch.where(reached, baseline[:, None], images[:, None])


compiled = torch.compile(eager, dynamic=False)


def main() -> None:
    """Measure all rows and write the file."""
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for (regime, shape, steps, plain), layout, dtype in itertools.product(
        ROWS, LAYOUTS, (torch.float32, torch.bfloat16)
    ):
        name = f"{'x'.join(map(str, shape))}, {steps} steps, {str(dtype).removeprefix('torch.')} {layout}"
        if options.only not in name or (dtype != torch.float32 and regime != "typical"):
            continue
        torch.compiler.reset()  # each shape is compiled on its own, below the recompilation limit
        torch.manual_seed(0)
        b, c, h, w = shape
        images = torch.rand(shape, device=options.device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        baseline = torch.zeros(1, c, 1, 1, dtype=dtype, device=options.device) if plain else images.roll(3, -1)
        ranks = torch.rand(b, h * w, device=options.device).argsort(1).view(b, h, w)
        counts = torch.linspace(0, h * w, steps, device=options.device).long()
        given = (images, baseline, ranks, counts)
        calls = {"eager": eager, "compile": compiled, "reference": reference.perturb_by_rank}
        moved = images.nbytes * (1 + steps) + baseline.nbytes + ranks.nbytes
        rows.append(
            harness.op_row(
                name,
                lambda x=given: ops.perturb_by_rank(*x),
                {other: lambda f=call, x=given: f(*x) for other, call in calls.items()},
                eager(*given),
                0.0,
                moved,
                options,
                op="perturb_by_rank",
                shape=shape,
                steps=steps,
                dtype=str(dtype),
                layout=layout,
                regime=regime,
            )
        )
    harness.write("perturb_by_rank", options.device, rows, options.out)


if __name__ == "__main__":
    main()
