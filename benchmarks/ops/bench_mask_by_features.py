"""`mask_by_features`: chunks of Score-CAM's masked images, in launch-bound, typical and bandwidth-bound shapes.

Baselines: `eager` is the composition CAM packages use (interpolate, min-max, product), `compile` a warm torch.compile
of the same, `reference` our own PyTorch formula with its care for constant and non-finite maps.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

from fastcam import ops, reference

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROWS = [  # regime, images (B,C,H,W), maps (K,h,w), start, count
    ("launch", (1, 3, 32, 32), (64, 4, 4), 0, 4),
    ("typical", (1, 3, 224, 224), (512, 7, 7), 0, 32),
    ("typical", (1, 3, 224, 224), (2048, 7, 7), 64, 64),
    ("typical", (8, 3, 224, 224), (64, 56, 56), 32, 64),
    ("bandwidth", (4, 3, 224, 224), (512, 14, 14), 384, 512),
]


def eager(images: Tensor, features: Tensor, start: int, count: int) -> Tensor:
    """The usual composition, for the pairs of the chunk."""
    pair = torch.arange(start, start + count, device=images.device)
    image, channel = pair // features.shape[1], pair % features.shape[1]
    u = F.interpolate(features[image, channel][:, None], images.shape[2:], mode="bilinear", align_corners=False)
    low, high = u.amin((2, 3), keepdim=True), u.amax((2, 3), keepdim=True)
    return images[image] * ((u - low) / (high - low))


compiled = torch.compile(eager, dynamic=False)


def main() -> None:
    """Measure all rows and write the file."""
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for (regime, shape, maps, start, count), layout, dtype in itertools.product(
        ROWS, LAYOUTS, (torch.float32, torch.bfloat16)
    ):
        sizes = f"{'x'.join(map(str, shape))} by {count} of {'x'.join(map(str, maps))}"
        name = f"{sizes}, {str(dtype).removeprefix('torch.')} {layout}"
        if options.only not in name or (dtype != torch.float32 and regime != "typical"):
            continue
        torch.compiler.reset()  # each shape is compiled on its own, below the recompilation limit
        torch.manual_seed(0)
        x, f = (
            torch.rand(s, device=options.device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
            for s in (shape, (shape[0], *maps))
        )
        baselines = {
            "eager": lambda x=x, f=f, s=start, n=count: eager(x, f, s, n),
            "compile": lambda x=x, f=f, s=start, n=count: compiled(x, f, s, n),
            "reference": lambda x=x, f=f, s=start, n=count: reference.mask_by_features(x, f, s, n),
        }
        exact = reference.mask_by_features(x.double(), f.double(), start, count)
        touched = (start + count - 1) // maps[0] - start // maps[0] + 1  # images
        moved = touched * x[0].nbytes + count * (f[0, 0].nbytes + x[0].nbytes)
        rows.append(
            harness.op_row(
                name,
                lambda x=x, f=f, s=start, n=count: ops.mask_by_features(x, f, s, n),
                baselines,
                exact,
                1e-4 if dtype == torch.float32 else 2**-8,  # half a unit of bfloat16 below 1, and as much to spare
                moved,
                options,
                op="mask_by_features",
                shape=shape,
                maps=maps,
                start=start,
                count=count,
                dtype=str(dtype),
                layout=layout,
                regime=regime,
            )
        )
    harness.write("mask_by_features", options.device, rows, options.out)


if __name__ == "__main__":
    main()
