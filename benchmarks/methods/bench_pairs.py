"""SFAM: a pair in multiples of two forward passes, and one query against a gallery beside a loop in eager PyTorch.

    python -P benchmarks/methods/bench_pairs.py [--device cuda] [--rounds 9]

Random weights, float32. Pairs: ResNet-50 without its classifier (2048 averaged maps of 7 x 7), with a linear projection
to 128 channels behind it, and with a hidden layer between; 8 images of 224 x 224 a side, both maps at that size. F2 is
the plain forward pass of both sides under `inference_mode` in the same rounds; rows are the median over rounds of time
/ F2.

Gallery: 1000 stored feature maps 2048 x 7 x 7 against one query, maps of both at 7 x 7 and at 224 x 224, one call,
beside the same formulas pair by pair in eager PyTorch on the same stored features, and on features the loop computes by
the network (estimated: the loop, and 1000 forward passes of one image).

Correctness first: maps against the formulas in eager PyTorch within 1e-4.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam._testing.models import torchvision_models

BATCH, SIDE, GALLERY = 8, 224, 1000
HEADS = ("no head", "linear head", "two-layer head")


def network(head: str) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision_models().resnet50(weights=None)
    hidden = nn.Sequential(nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 128))
    model.fc = {"no head": nn.Identity(), "linear head": nn.Linear(2048, 128), "two-layer head": hidden}[head]
    return model.eval()


def by_pairs(a: Tensor, b: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Maps (N, size, size) of features a (1, K, h, w) and b (N, K, h, w), a loop over pairs; cosine, min-max."""
    first, second = [], []
    for one in b:
        x, y = a[0].mean((1, 2)), one.mean((1, 2))
        c = x * y / (x.norm() * y.norm())
        r = c / c.sum().abs()
        w = (r - r.min()) / (r.max() - r.min())
        for features, found in ((a[0], first), (one, second)):
            m = (w[:, None, None] * features).sum(0).relu()
            if size != m.shape[-1]:
                m = functional.interpolate(m[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]
            found.append((m - m.min()) / (m.max() - m.min()))
    return torch.stack(first), torch.stack(second)


def pairs(options: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn((BATCH, 3, SIDE, SIDE), generator=generator).to(options.device) for _ in range(2))
    rows = []
    for head in HEADS:
        name = f"pair, {head}"
        if options.only and options.only not in name:
            continue
        model = network(head).to(options.device)
        explainer = fastcam.PairExplainer(model)
        result = explainer(a, b)
        match, error = True, 0.0
        if head == "no head":
            features = [explainer.gallery(x).features for x in (a, b)]
            expected = torch.stack(
                [by_pairs(features[0][i : i + 1], features[1][i : i + 1], SIDE)[0][0] for i in range(BATCH)]
            )
            match, error = harness.agree(result.maps_a, expected, 1e-4)
        else:
            with torch.no_grad():
                cosine = functional.cosine_similarity(model(a), model(b))
            match, error = harness.agree(result.score, cosine, 1e-4)

        def plain(model: nn.Module = model) -> None:
            with torch.inference_mode():
                model(a)
                model(b)

        calls = {"F2": plain, "ours": lambda e=explainer: e(a, b)}  # type: ignore[misc]
        times = harness.alternate(calls, options.rounds, options.device, warmup=2)
        multiple = median(x / y for x, y in zip(times["ours"], times["F2"], strict=True))
        rows.append(harness.row(name, times["ours"], match, max_err=error, multiple=multiple))
        print(f"{name}: {multiple:.3f} x two forwards", flush=True)
    return rows


def gallery(options: Any) -> list[dict[str, Any]]:
    device = options.device
    model = network("no head").to(device)
    image = torch.randn((1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1)).to(device)
    explainers = {7: fastcam.PairExplainer(model, size="layer"), SIDE: fastcam.PairExplainer(model)}
    query = explainers[7].gallery(image)
    features = torch.rand((GALLERY, 2048, 7, 7), generator=torch.Generator().manual_seed(2)).relu().to(device)
    stored = fastcam.Gallery(features, features.mean((2, 3)), None, (3, SIDE, SIDE), query.layer, query.length)
    with torch.inference_mode():
        forward = median(harness.alternate({"one": lambda: model(image)}, 5, device, warmup=2)["one"])
    rows = []
    for size, explainer in explainers.items():
        name = f"1 against {GALLERY}, maps at {size} x {size}"
        if options.only and options.only not in name:
            continue
        found, expected = explainer(query, stored), by_pairs(query.features, stored.features, size)
        match, error = harness.agree((found.maps_a, found.maps_b), expected, 1e-4)
        calls = {
            "ours": lambda e=explainer: e(query, stored),  # type: ignore[misc]
            "eager loop": lambda s=size: by_pairs(query.features, stored.features, s),  # type: ignore[misc]
        }
        times = harness.alternate(calls, max(3, options.rounds // 3), device, warmup=1)
        loop, mine = median(times["eager loop"]), median(times["ours"])
        speedup = {"eager loop": loop / mine, "eager loop with features": (loop + GALLERY * forward) / mine}
        rows.append(harness.row(name, times["ours"], match, max_err=error, speedup=speedup if match else None))
        print(f"{name}: {1e3 * mine:.0f} ms, " + ", ".join(f"{v:.1f}x {k}" for k, v in speedup.items()), flush=True)
    return rows


def main() -> None:
    harness.keep_heap()
    parser = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES)
    parser.set_defaults(rounds=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        rows = pairs(options) + gallery(options)
    harness.write("pairs", options.device, rows, options.out, command="python -P benchmarks/methods/bench_pairs.py")


if __name__ == "__main__":
    main()
