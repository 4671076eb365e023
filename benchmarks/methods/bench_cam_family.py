"""The CAM family on ResNet-50: time and memory as multiples of the plain eager forward pass, beside the peers.

    python -P benchmarks/methods/bench_cam_family.py [--device cuda] [--rounds 15]

ResNet-50 with random weights, batch 8, 224 x 224, float32. F is the model's own forward under `inference_mode`; every
row takes turns with passes of its own and is the median of the turns' quotients.
Correctness first: fastcam's maps against the textbook Grad-CAM written here with a hook and autograd.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam._testing.models import torchvision_models

METHODS = ("cam", "grad_cam", "xgrad_cam", "hires_cam", "grad_cam_pp", "layer_cam", "eigen_cam", "eigen_grad_cam")
BATCH, SIDE = 8, 224


def resnet(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return torchvision_models().resnet50(weights=None).eval().to(device)


def textbook_grad_cam(model: nn.Module, images: torch.Tensor, layer: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Hook, backward from the score, mean gradients, weighted sum, ReLU, resize, min-max."""
    kept: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda m, a, out: kept.append(out))
    try:
        score = model(images).gather(1, targets[:, None]).sum()
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    raw = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).relu()
    maps = functional.interpolate(raw, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0].detach()
    return scaled(maps)


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """Min-max, a constant map to zeros."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low)).nan_to_num(0.0)


def peer_calls(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Grad-CAM at layer4 as each installed peer computes it, on a model of its own: peers leave hooks on it."""
    calls: dict[str, Callable[[], Any]] = {}
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        extractor = GradCAM(model=model, target_layers=[model.layer4])
        goals = [ClassifierOutputTarget(int(t)) for t in targets]
        calls["pytorch-grad-cam"] = lambda: extractor(input_tensor=images, targets=goals)
    except ImportError:
        print("pytorch-grad-cam is not installed (extra 'peers'); its row is left out")
    try:
        from torchcam.methods import GradCAM as TorchGradCAM

        hooked = TorchGradCAM(model, "layer4", enable_hooks=False)

        def torchcam() -> Any:
            hooked.enable_hooks()
            try:
                return hooked(targets.tolist(), model(images))
            finally:
                hooked.disable_hooks()

        calls["torchcam (no resize)"] = torchcam
    except ImportError:
        print("torchcam is not installed (extra 'peers'); its row is left out")
    try:
        from captum.attr import LayerGradCam

        layer = LayerGradCam(model, model.layer4)
        calls["captum (no resize)"] = lambda: layer.attribute(images, target=targets, relu_attributions=True)
    except ImportError:
        print("captum is not installed (extra 'peers'); its row is left out")
    return calls


def measure(options: Any) -> list[dict[str, Any]]:
    device = options.device
    model = resnet(device)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(device)
    targets = torch.arange(BATCH, device=device) * 7
    hundred = torch.arange(100, device=device).expand(BATCH, 100)
    features = torch.randn(BATCH, 1024, SIDE // 16, SIDE // 16, device=device)

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    def head() -> None:
        with torch.inference_mode():
            model.fc(model.avgpool(model.layer4(features)).flatten(1))

    expected = {
        layer: textbook_grad_cam(model, images, getattr(model, layer), targets) for layer in ("layer4", "layer3")
    }
    calls: dict[str, Callable[[], Any]] = {"forward": forward, "layer4 + fc forward": head}
    match: dict[str, tuple[bool, float]] = {"forward": (True, 0.0), "layer4 + fc forward": (True, 0.0)}
    explainers = {f"{method}": fastcam.Explainer(model, method) for method in METHODS}
    explainers["grad_cam, layer3"] = fastcam.Explainer(model, "grad_cam", layer="layer3")
    explainers["grad_cam, channels_last"] = fastcam.Explainer(model, "grad_cam", channels_last=True)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        bf16 = fastcam.Explainer(model, "grad_cam", precision="bf16", channels_last=True)
        explainers["grad_cam, bf16 channels_last"] = bf16
    with fastcam.backend("reference"):
        on_reference = {name: explainer(images, targets).maps for name, explainer in explainers.items()}
    for name, explainer in explainers.items():
        found = explainer(images, targets).maps
        wanted = on_reference[name]
        if name.startswith("grad_cam") and "pp" not in name and "bf16" not in name:
            wanted = expected["layer3" if "layer3" in name else "layer4"]
        match[name] = harness.agree(found, wanted, 1e-3)
        calls[name] = lambda explainer=explainer: explainer(images, targets)
    many = explainers["grad_cam"](images, hundred).maps
    match["grad_cam, 100 targets"] = harness.agree(many[:, 7], explainers["grad_cam"](images, 7).maps, 1e-4)
    calls["grad_cam, 100 targets"] = lambda: explainers["grad_cam"](images, hundred)
    calls["textbook hook + autograd"] = lambda: textbook_grad_cam(model, images, model.layer4, targets)
    match["textbook hook + autograd"] = (True, 0.0)
    for name, call in peer_calls(resnet(device), images, targets).items():
        found = call()
        found = found[0] if isinstance(found, list) else found
        found = torch.as_tensor(found).to(device).detach().float().reshape(BATCH, *found.shape[-2:])
        if found.shape[-1] != SIDE:
            found = functional.interpolate(found[:, None], size=(SIDE, SIDE), mode="bilinear")[:, 0]
        match[name] = harness.agree(scaled(found), expected["layer4"], 1e-3)
        calls[name] = call
    chosen = {n: c for n, c in calls.items() if options.only in n or n in ("forward", "layer4 + fc forward")}
    rows = []
    for name, call in chosen.items():
        # Each beside its own forward passes: two calls a turn are close in time, and neither meets the others' weights.
        times = harness.alternate({"forward": forward, name: call}, options.rounds, device, warmup=1)
        ok, error = match[name]
        multiple = harness.ratio(times, name, "forward")
        rows.append(harness.row(name, times[name], ok, times_forward=multiple, max_err=error))
        print(f"{name}: {multiple:.3f} F", flush=True)
    return rows


def first_call(rounds: int = 3) -> dict[str, Any]:
    """A fresh process: seconds of the first `attribute` on one image minus a plain forward; then the second call."""
    code = (
        "import sys, time, torch; sys.path.insert(0, sys.argv[1])\n"
        "from bench_cam_family import resnet\nimport fastcam\n"
        "model = resnet(); images = torch.randn(1, 3, 224, 224)\n"
        "def forward():\n"
        "    with torch.inference_mode():\n        model(images)\n"
        "forward(); t0 = time.perf_counter(); forward(); plain = time.perf_counter() - t0\n"
        "t0 = time.perf_counter(); fastcam.attribute(model, images, 'grad_cam'); first = time.perf_counter() - t0\n"
        "t0 = time.perf_counter(); fastcam.attribute(model, images, 'grad_cam'); second = time.perf_counter() - t0\n"
        "print(first - plain, second - plain)\n"
    )
    found = []
    for _ in range(rounds):
        command = [sys.executable, "-P", "-c", code, str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append([float(part) for part in done.stdout.split()])
    extra = sorted(first for first, _ in found)
    later = sorted(second for _, second in found)
    return {
        "first_call_extra_s": round(extra[len(extra) // 2], 3),
        "second_call_extra_s": round(later[len(later) // 2], 4),
    }


def peak_memory() -> dict[str, Any]:
    """Peak resident memory of the forward pass and of grad_cam, each the median of three processes."""
    setup = (
        "from bench_cam_family import resnet, BATCH, SIDE\nimport fastcam\n"
        "model = resnet(); images = torch.randn(BATCH, 3, SIDE, SIDE)\n"
        "explainer = fastcam.Explainer(model, 'grad_cam')\n"
        "def forward():\n"
        "    with torch.no_grad():\n        model(images)\n"
        "call = forward if sys.argv[1] == 'forward' else lambda: explainer(images)"
    )
    peaks = {
        name: sorted(harness.peak_mib(__file__, setup, "call()", name) for _ in range(3))[1]
        for name in ("forward", "grad_cam")
    }
    return {
        "peak_mib_forward": round(peaks["forward"], 1),
        "peak_mib_grad_cam": round(peaks["grad_cam"], 1),
        "peak_ratio": round(peaks["grad_cam"] / peaks["forward"], 3),
    }


def bf16_similarity(device: str) -> dict[str, Any]:
    """Cosine similarity of bf16 to fp32 maps on the testbed's held-out scenes, the lowest of both models' means."""
    from fastcam.testbed import load, make_scenes, normalize

    scenes = make_scenes(64, split="test", seed=0)
    means = []
    for name in ("tiny_resnet", "tiny_vgg"):
        model = load(name).to(device)
        images, labels = normalize(scenes.images).to(device), scenes.labels.to(device)
        full = fastcam.Explainer(model, "grad_cam")(images, labels).maps
        half = fastcam.Explainer(model, "grad_cam", precision="bf16", channels_last=True)(images, labels).maps
        means.append(float(functional.cosine_similarity(full.flatten(2), half.flatten(2), dim=-1).mean()))
    return {"bf16_cosine_testbed": round(min(means), 5)}


def main() -> None:
    harness.keep_heap()
    options = harness.arguments(__doc__.splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    start = time.time()
    rows = measure(options)
    more = bf16_similarity(options.device)
    if options.device == "cpu":
        more |= first_call() | peak_memory()
    harness.table(rows, ["name", "times_forward", "median_us", "iqr_us", "max_err", "match"])
    print(json.dumps(more, indent=1))
    harness.write(
        "cam_family",
        options.device,
        rows,
        options.out,
        batch=BATCH,
        side=SIDE,
        seconds=round(time.time() - start),
        **more,
    )


if __name__ == "__main__":
    main()
