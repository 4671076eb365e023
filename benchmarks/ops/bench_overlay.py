"""`overlay`: coloured pixels of images under their maps, in launch-bound, typical and bandwidth-bound shapes.

Baselines: `eager` is the formula in torch ops, as a rendering function has it, `compile` a warm torch.compile of it,
`reference` our own with its care for NaN. `copy` moves the images, the maps and three bytes a pixel.
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
ROWS = [("launch", (1, 3, 32, 32)), ("typical", (8, 3, 224, 224)), ("typical", (64, 3, 224, 224)),
        ("bandwidth", (256, 3, 224, 224))]  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eager(images: Tensor, maps: Tensor, table: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The picture step by step."""
    base = ((images.float() * std + mean).clamp(0, 1) * 255).round().movedim(1, -1)
    values = maps.float().clamp(0, 1)
    opacity = (0.8 * values.sqrt()).unsqueeze(-1)
    colour = table[(values * (len(table) - 1)).round().long()]
    return (base + opacity * (colour - base)).round().to(torch.uint8)


compiled = torch.compile(eager, dynamic=False)


def main() -> None:
    """Measure all rows and write the file."""
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for (regime, shape), layout, dtype in itertools.product(ROWS, LAYOUTS, (torch.float32, torch.bfloat16)):
        name = f"{'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')} {layout}"
        if options.only not in name or (dtype != torch.float32 and regime != "typical"):
            continue
        torch.compiler.reset()  # each shape is compiled on its own, below the recompilation limit
        torch.manual_seed(0)
        images = torch.randn(shape, device=options.device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        maps = torch.rand((shape[0], *shape[2:]), device=options.device)
        ramp = torch.linspace(0, 255, 256, device=options.device)  # neighbours differ by 1: either may be the nearest
        table = torch.stack([ramp, 255 - ramp, ramp / 2], 1)
        mean, std = (torch.tensor(x, device=options.device).view(3, 1, 1) for x in (MEAN, STD))
        steps = {name: lambda f=call, x=(images, maps, table, mean, std): f(*x)
                 for name, call in (("eager", eager), ("compile", compiled))}  # fmt: skip
        ours, plain = ops.overlay, reference.overlay
        rows.append(
            harness.op_row(
                name,
                lambda f=ours, x=(images, maps, table): f(*x, mean=MEAN, std=STD),
                {**steps, "reference": lambda f=plain, x=(images, maps, table): f(*x, mean=MEAN, std=STD)},
                eager(images, maps, table, mean, std),
                1.0,  # a pixel that is rounded the other way
                images.nbytes + maps.nbytes + 3 * maps.numel(),
                options,
                op="overlay",
                shape=shape,
                dtype=str(dtype),
                layout=layout,
                regime=regime,
            )
        )
    harness.write("overlay", options.device, rows, options.out)


if __name__ == "__main__":
    main()
