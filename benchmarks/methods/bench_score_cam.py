"""Score-CAM on ResNet-18, one image of 224 x 224, 512 masks: seconds beside TorchCAM at the same chunk size.

    python -P benchmarks/methods/bench_score_cam.py [--device cuda] [--rounds 5]

Random weights, float32. F is the model's own forward on one image under `inference_mode`; 512 masked images of it in
chunks are what any implementation has to run. Correctness first: coefficients against TorchCAM's in its own order of
scaling and resizing, maps of the bf16 run (where the processor has such arithmetic) against float32 by cosine
similarity. Peak memory is taken in fresh processes at two chunk sizes: it follows the chunk, not the number of maps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam._testing.models import torchvision_models

CHUNK, SIDE, TARGET = 32, 224, 7


def resnet(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return torchvision_models().resnet18(weights=None).eval().to(device)


def image(device: str = "cpu") -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(device)


def torchcam_call(model: nn.Module, images: torch.Tensor) -> Callable[[], list[torch.Tensor]] | None:
    try:
        from torchcam.methods import ScoreCAM
    except ImportError:
        print("torchcam is not installed (extra 'peers'); its row is left out")
        return None
    extractor = ScoreCAM(model, "layer4", batch_size=CHUNK, enable_hooks=False)

    def call() -> list[torch.Tensor]:
        extractor.enable_hooks()
        try:
            with torch.no_grad():
                return extractor(TARGET, model(images))
        finally:
            extractor.disable_hooks()

    return call


def measure(options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    device = options.device
    model, images = resnet(device), image(device)
    settings: dict[str, Any] = {"layer": "layer4", "chunk": CHUNK}
    full = fastcam.Explainer(model, "score_cam", **settings)
    half = fastcam.Explainer(model, "score_cam", precision="bf16", channels_last=True, **settings)

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    calls: dict[str, Callable[[], Any]] = {"forward": forward}
    match: dict[str, tuple[bool, float]] = {"forward": (True, 0.0)}
    expected = full(images, TARGET)
    with fastcam.backend("reference"):
        slow = full(images, TARGET)
    match["score_cam"] = harness.agree(expected.maps, slow.maps, 1e-4)
    calls["score_cam"] = lambda: full(images, TARGET)
    facts = {}
    if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        bf16 = half(images, TARGET).maps
        cosine = float(nn.functional.cosine_similarity(expected.maps.flatten(1), bf16.flatten(1)).min())
        match["score_cam, bf16 channels_last"] = (cosine > 0.99, 1 - cosine)
        calls["score_cam, bf16 channels_last"] = lambda: half(images, TARGET)
        facts["bf16_cosine"] = round(cosine, 5)
    else:
        print("this processor has no bf16 arithmetic; the bf16 row is left out")
    peer = torchcam_call(resnet(device), images)
    if peer is not None:
        theirs = fastcam.Explainer(model, "score_cam", order="minmax_then_resize", size="layer", **settings)
        match["torchcam"] = harness.agree(torch.as_tensor(peer()[0]), theirs(images, TARGET).maps, 1e-3)
        calls["torchcam"] = peer
    times = harness.alternate(calls, options.rounds, device, warmup=1)
    rows = []
    for name, seconds in times.items():
        ratios = {"times_forward": harness.ratio(times, name, "forward")}
        if "torchcam" in times:
            ratios["times_torchcam"] = harness.ratio(times, name, "torchcam")
        rows.append(harness.row(name, seconds, match[name][0], max_err=match[name][1], **ratios))
    return rows, facts


def peak_mib(chunk: int) -> float:
    setup = (
        "import bench_score_cam as bench, fastcam\n"
        "made = fastcam.Explainer(bench.resnet(), 'score_cam', layer='layer4', chunk=int(sys.argv[1]))\n"
        "images = bench.image()"
    )
    return harness.peak_mib(__file__, setup, "made(images, 7)", chunk)


def main() -> None:
    harness.keep_heap()
    parser = harness.arguments(__doc__.splitlines()[0], harness.DEVICES)
    parser.set_defaults(rounds=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.time()
    rows, more = measure(options)
    if options.device == "cpu":
        more |= {f"peak_mib_chunk_{chunk}": round(peak_mib(chunk), 1) for chunk in (8, CHUNK)}
    harness.table(rows, ["name", "times_forward", "times_torchcam", "median_us", "iqr_us", "max_err", "match"])
    print(json.dumps(more, indent=1))
    seconds = round(time.time() - start)
    harness.write("score_cam", options.device, rows, options.out, chunk=CHUNK, side=SIDE, seconds=seconds, **more)


if __name__ == "__main__":
    main()
