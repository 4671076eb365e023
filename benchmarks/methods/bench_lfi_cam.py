"""What LFI-CAM's attention costs at inference, beside backbone, importance convolutions and classifier alone.

    python -P benchmarks/methods/bench_lfi_cam.py [--device cuda] [--rounds 15]

Random weights, float32. `F` is a forward pass that computes backbone, the four convolutions of the importance network
(on the features instead of the masks) and the classifier on pooled features, and nothing of the attention; rows are the
median over rounds of time / F. ResNet-20 at 32 x 32, batch 128 and 8; ResNet-18 with 14 x 14 maps at 224 x 224, batch
8. Then `fastcam.Explainer(model, "lfi_cam")` with maps at image size.

Correctness first: logits and attention against the formulas in plain PyTorch within 1e-4.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam._testing.models import torchvision_models
from fastcam.nn import LFICAM, resnet, without_classifier

CASES = (("ResNet-20", 32, 128), ("ResNet-20", 32, 8), ("ResNet-18", 224, 8))


def network(name: str, side: int) -> LFICAM:
    torch.manual_seed(0)
    if name == "ResNet-20":
        return LFICAM(resnet(20), 10, channels=64).eval()
    backbone = without_classifier(torchvision_models().resnet18(weights=None))
    return LFICAM(backbone, 1000, channels=512, fin_relu="all").eval()


def without_attention(model: LFICAM, images: Tensor) -> tuple[Tensor, Tensor]:
    features = model.backbone(images)
    return model.fin.layers(features).mean((2, 3)).softmax(1), model.fc(features.mean((2, 3)))


def formulas(model: LFICAM, images: Tensor) -> tuple[Tensor, Tensor]:
    f = model.backbone(images)
    g = functional.interpolate(images.mean(1, keepdim=True), f.shape[2:], mode="bilinear", align_corners=False)
    low, high = f.amin((2, 3), keepdim=True), f.amax((2, 3), keepdim=True)
    n = torch.where(f == 0, 0, torch.where(high > low, (f - low) / (high - low), 1))
    s = model.fin.layers(n * g).mean((2, 3)).softmax(1)
    p = (s[:, :, None, None] * f).sum(1, keepdim=True).relu()
    low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
    a = (p - low) / (high - low)
    return model.fc(((1 + a) * f).mean((2, 3))), a


def measure(options: Any) -> list[dict[str, Any]]:
    rows = []
    for network_name, side, batch in CASES:
        name = f"{network_name}, batch {batch}"
        if options.only and options.only not in name:
            continue
        model = network(network_name, side).to(options.device)
        images = torch.randn((batch, 3, side, side), generator=torch.Generator().manual_seed(1)).to(options.device)
        with torch.inference_mode():
            found = model(images)
            match, error = harness.agree((found.logits, found.attention), formulas(model, images), 1e-4)
        explainer = fastcam.Explainer(model, "lfi_cam")

        def run(call: Any, model: LFICAM = model, images: Tensor = images) -> None:
            with torch.inference_mode():
                call(model, images)

        calls = {
            "F": lambda r=run: r(without_attention),  # type: ignore[misc]
            "ours": lambda r=run: r(LFICAM.__call__),  # type: ignore[misc]
            "plain": lambda r=run: r(formulas),  # type: ignore[misc]
            "explainer": lambda e=explainer, x=images: e(x),  # type: ignore[misc]
        }
        times = harness.alternate(calls, options.rounds, options.device)
        for key in ("ours", "plain", "explainer"):
            multiple = median(x / y for x, y in zip(times[key], times["F"], strict=True))
            rows.append(harness.row(f"{name}, {key}", times[key], match, max_err=error, multiple=multiple))
            print(f"{name}, {key}: {multiple:.3f} F", flush=True)
    return rows


def main() -> None:
    harness.keep_heap()
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    command = "python -P benchmarks/methods/bench_lfi_cam.py"
    harness.write("lfi_cam_cost", options.device, measure(options), options.out, command=command)


if __name__ == "__main__":
    main()
