"""`cam_map` to 224x224: launch-bound, typical and bandwidth-bound shapes, against three ways to write it in PyTorch.

Baselines: `eager` is the composition CAM packages use (broadcast product, sum, ReLU, interpolate, min-max), `bmm` the
same with a batched matrix product instead of the product and sum, `compile` a warm torch.compile of the reference.
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

SIZE = (224, 224)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROWS = [  # regime, (B,K,H,W), targets or None, size
    ("launch", (1, 512, 7, 7), None, SIZE),
    ("typical", (8, 2048, 7, 7), None, SIZE),
    ("typical", (8, 512, 14, 14), None, SIZE),
    ("typical", (8, 256, 56, 56), None, SIZE),
    ("typical", (32, 2048, 7, 7), None, SIZE),
    ("typical", (8, 2048, 7, 7), 100, None),
    ("typical", (8, 2048, 7, 7), 100, SIZE),
    ("bandwidth", (64, 2048, 14, 14), None, None),
    ("bandwidth", (64, 2048, 14, 14), None, SIZE),
    ("bandwidth", (64, 1024, 28, 28), None, SIZE),
]
compiled = torch.compile(lambda a, w, size: reference.cam_map(a, w, None, True, True, size)[0], dynamic=False)


def finish(m: Tensor, size: tuple[int, int] | None) -> Tensor:
    """ReLU, resize and min-max as separate PyTorch calls; m is (B,T,H,W)."""
    u = m.relu()
    if size is not None:
        u = F.interpolate(u, size, mode="bilinear", align_corners=False)
    low, high = u.amin((2, 3), keepdim=True), u.amax((2, 3), keepdim=True)
    return (u - low) / (high - low)


def eager(a: Tensor, w: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The usual composition, for one target."""
    return finish((w[..., None, None] * a).sum(1, keepdim=True), size).squeeze(1)


def bmm(a: Tensor, w: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The matrix-product composition."""
    rows = w.unsqueeze(1) if w.dim() == 2 else w
    maps = finish(torch.bmm(rows, a.flatten(2)).unflatten(2, a.shape[2:]), size)
    return maps.squeeze(1) if w.dim() == 2 else maps


def main() -> None:
    """Measure all rows and write the file."""
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for (regime, shape, targets, size), layout, dtype in itertools.product(
        ROWS, LAYOUTS, (torch.float32, torch.bfloat16)
    ):
        sizes = "x".join(map(str, shape)) + (f" T={targets}" if targets else "")
        name = f"{sizes} to {'layer' if size is None else '224x224'}, {str(dtype).removeprefix('torch.')} {layout}"
        if options.only not in name or (dtype != torch.float32 and (regime != "typical" or targets)):
            continue
        torch.compiler.reset()  # each shape is compiled on its own, below the recompilation limit
        torch.manual_seed(0)
        b, k, h, width = shape
        a = torch.rand(shape, device=options.device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        w = torch.randn((b, targets, k) if targets else (b, k), device=options.device).to(dtype)
        baselines = {
            "bmm": lambda a=a, w=w, s=size: bmm(a, w, s),
            "compile": lambda a=a, w=w, s=size: compiled(a, w, s),
        }
        if not targets:  # the product of a hundred targets with all features takes minutes
            baselines["eager"] = lambda a=a, w=w, s=size: eager(a, w, s)
        exact = reference.cam_map(a.double(), w.double(), None, True, True, size)[0]
        area = h * width if size is None else size[0] * size[1]
        moved = a.nbytes + w.numel() * 4 + b * (targets or 1) * (area + h * width) * 4
        rows.append(
            harness.op_row(
                name,
                lambda a=a, w=w, s=size: ops.cam_map(a, w, size=s),
                baselines,
                exact,
                1e-4,
                moved,
                options,
                op="cam_map",
                shape=shape,
                targets=targets,
                size=size,
                dtype=str(dtype),
                layout=layout,
                regime=regime,
            )
        )
    harness.write("cam_map", options.device, rows, options.out)


if __name__ == "__main__":
    main()
