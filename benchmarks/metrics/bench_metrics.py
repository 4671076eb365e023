"""What metrics cost: insertion + deletion beside the bare forward passes they need, ROAD beside pytorch-grad-cam's.

    python -P benchmarks/metrics/bench_metrics.py [--only insertion] [--rounds 5]

Float32, smooth maps without equal values; random weights, but for the testbed's network. `--only`
keeps the other rows of the newest file. Rows:

  insertion + deletion   50 steps: 100 forward passes an image, one of them the image's own; beside a loop of as many
                         bare passes on tensors of the same sizes that are there already (under `inference_mode`, with
                         the scores' softmax). Results are compared with pixels perturbed one image at a time
  road                   ROADCombined, nine shares of either order, beside pytorch-grad-cam 1.5.7's on the same images:
                         19 forward passes an image instead of 36, and 18 systems solved as a batch instead of one by
                         one. Results are compared with the peer's noise switched off; timed with it
  imputation             the 18 systems of an image without the passes, beside the peer's solver
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

from fastcam import metrics, ops
from fastcam._testing.models import torchvision_models
from fastcam.testbed import load

STEPS, CHUNK = 50, 32
SHARES = tuple(n / 10 for n in range(1, 10))


def network(name: str) -> tuple[nn.Module, int]:
    """The network and its images' side."""
    if name.startswith("tiny"):
        return load(name), 96
    torch.manual_seed(0)
    return getattr(torchvision_models(), name)(weights=None).eval(), 224


def case(side: int, batch: int) -> tuple[Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, side, side, generator=generator)
    coarse = torch.rand(batch, 1, 7, 7, generator=generator)
    maps = nn.functional.interpolate(coarse, (side, side), mode="bilinear")[:, 0]
    maps = maps + 1e-4 * torch.rand(maps.shape, generator=generator)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return images, (maps - low) / (high - low), [i % 10 for i in range(batch)]


def insertion_row(name: str, batch: int, options: Any) -> dict[str, Any]:
    model, side = network(name)
    images, maps, targets = case(side, batch)
    match, error = check_curves(model, images, maps, targets)
    sizes = [CHUNK] * (batch * 2 * STEPS // CHUNK) + [batch * 2 * STEPS % CHUNK] * bool(batch * 2 * STEPS % CHUNK)
    inputs = torch.randn(CHUNK, 3, side, side)

    def bare() -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(inputs[:size]).softmax(1)[:, 0] for size in sizes])

    calls = {
        "ours": lambda: metrics.insertion_deletion(model, images, maps, targets, steps=STEPS, chunk=CHUNK),
        "forwards": bare,
    }
    times = harness.alternate(calls, options.rounds, options.device, warmup=1)
    multiple = harness.ratio(times, "ours", "forwards")
    title = f"insertion + deletion, {STEPS} steps, {name}, {batch} images"
    print(f"{title}: {multiple:.3f} x the bare forwards, match {match}, error {error:.2g}", flush=True)
    return harness.row(title, times["ours"], match, max_err=error, multiple=multiple if match else None)


def check_curves(model: nn.Module, images: Tensor, maps: Tensor, targets: list[int]) -> tuple[bool, float]:
    """Some points of the first image's curves, perturbed by hand."""
    curves = metrics.insertion_deletion(model, images[:1], maps[:1], targets[:1], steps=STEPS, chunk=CHUNK)
    order = np.argsort(-maps[0].numpy().ravel(), kind="stable")
    step = -(-order.size // STEPS)
    errors = []
    for curve, keep in zip(curves, (True, False), strict=True):
        for point in (0, 7, 31, 50):
            chosen = torch.zeros(order.size, dtype=torch.bool)
            chosen[order[: point * step]] = True
            shown = (chosen if keep else ~chosen).reshape(maps.shape[1:])
            with torch.no_grad():
                score = model((images[0] * shown)[None]).softmax(1)[0, targets[0]]
            errors.append(abs(curve.scores[0, point].item() - score.item()))
    return max(errors) < 1e-5, max(errors)


def road_rows(name: str, batch: int, options: Any) -> list[dict[str, Any]]:
    torchvision_models()  # torchvision first, which the library imports too
    try:
        from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
    except ImportError:
        print("pytorch-grad-cam is not installed (extra 'peers'); the rows of ROAD are left out")
        return []
    model, side = network(name)
    images, maps, targets = case(side, batch)
    peers = [ClassifierOutputSoftmaxTarget(target) for target in targets]

    def peer() -> np.ndarray:
        return ROADCombined()(images, maps.numpy(), peers, model)

    with mock.patch.object(torch, "randn_like", torch.zeros_like):
        want = torch.from_numpy(peer())
    found = metrics.road(model, images, maps, targets, noise=0, chunk=CHUNK)
    match, error = harness.agree(found, want, 1e-4)
    calls = {"ours": lambda: metrics.road(model, images, maps, targets, chunk=CHUNK), "peer": peer}
    rows = [speed(f"road, {name}, {batch} images", calls, match, error, options)]

    imputer, holes = NoisyLinearImputer(noise=0), missing(maps[0])
    each = images[:1].expand(len(holes), -1, -1, -1).contiguous()

    def solved() -> Tensor:
        return torch.stack([imputer(image, (~hole).float()) for image, hole in zip(each, holes, strict=True)])

    match, error = harness.agree(ops.impute_linear(each, holes), solved(), 1e-3)
    calls = {"ours": lambda: ops.impute_linear(each, holes), "peer": solved}
    rows.append(speed(f"imputation, {side} x {side}, {len(holes)} systems", calls, match, error, options))
    return rows


def missing(attribution: Tensor) -> Tensor:
    """(18, H, W): the highest and the lowest shares."""
    values = attribution.flatten()
    cuts = [values.quantile(1 - share) for share in SHARES], [values.quantile(share) for share in SHARES]
    return torch.stack([attribution >= cut for cut in cuts[0]] + [attribution <= cut for cut in cuts[1]])


def speed(title: str, calls: dict[str, Callable[[], Any]], match: bool, error: float, options: Any) -> dict[str, Any]:
    times = harness.alternate(calls, max(2, options.rounds // 3), options.device, warmup=0)  # the comparison was one
    faster = harness.ratio(times, "peer", "ours")
    print(f"{title}: {faster:.1f} x faster than pytorch-grad-cam, match {match}, error {error:.2g}", flush=True)
    return harness.row(
        title, times["ours"], match, max_err=error, speedup={"pytorch-grad-cam": faster} if match else None,
        peer_us=1e6 * sorted(times["peer"])[len(times["peer"]) // 2],
    )  # fmt: skip


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    makers = {
        "insertion tiny_resnet": lambda: [insertion_row("tiny_resnet", 16, options)],
        "insertion resnet18": lambda: [insertion_row("resnet18", 2, options)],
        "road tiny_resnet": lambda: road_rows("tiny_resnet", 4, options),
        "road resnet18": lambda: road_rows("resnet18", 1, options),
    }
    rows = harness.kept("metrics", options.out) if options.only else {}
    rows |= {row["name"]: row for name, make in makers.items() if options.only in name for row in make()}
    command = "python -P benchmarks/metrics/bench_metrics.py"
    harness.write("metrics", options.device, list(rows.values()), options.out, command=command, chunk=CHUNK)


if __name__ == "__main__":
    main()
