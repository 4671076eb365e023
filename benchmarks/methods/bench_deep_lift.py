"""Contribution methods on ResNet-50 and VGG-16: time and memory as multiples of the plain forward, beside Captum.

    python -P benchmarks/methods/bench_deep_lift.py [--device cuda] [--rounds 9] [--only vgg16]

Random weights, batch 8, 224 x 224, float32. F is the model's own forward under `inference_mode`, of the same network.
Correctness first: completeness where the method has it, LIFT-CAM against its closed form on ResNet-50, DeepLIFT on
VGG-16 against Captum, which is right there (modules only, pools that do not overlap); the rest against the PyTorch
references of the ops.
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

BATCH, SIDE = 8, 224
#: Largest completeness residual, relative to the largest score difference.
COMPLETE = 1e-4


def network(name: str, device: str = "cpu", out_of_place: bool = False) -> nn.Module:
    """Random weights; `out_of_place` for peers whose hooks misread in-place ReLUs."""
    torch.manual_seed(0)
    model = getattr(torchvision_models(), name)(weights=None).eval().to(device)
    if out_of_place:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    return model


def batch(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return images.to(device), torch.arange(BATCH, device=device) * 7


def black() -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (-mean / std).reshape(1, 3, 1, 1).expand(1, 3, SIDE, SIDE).contiguous()


LAYERS = {"resnet50": "layer4", "vgg16": "features.29"}
#: Row -> options, by network. All VGG-16 maps are removed one by one by ablation_cam, on the 8 images: 4096 head runs.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet50": {
        "lift_cam": {},
        "a_fmi": {},
        "ablation_cam": {},
        "shap_cam": {},
        "smooth_grad_cam_pp": {},
        "full_grad": {},
        "deep_lift": {},
    },
    "vgg16": {"lift_cam": {}, "a_fmi": {}, "deep_lift": {}},
}
SLOW: dict[str, dict[str, dict[str, Any]]] = {
    "vgg16": {"ablation_cam": {}, "shap_cam": {"n_orders": 2}},
}
AT_PIXELS = ("deep_lift", "full_grad")


def explainer(name: str, method: str, model: nn.Module, **options: Any) -> fastcam.Explainer:
    return fastcam.Explainer(model, method, layer=None if method in AT_PIXELS else LAYERS[name], **options)


def captum_calls(name: str, device: str = "cpu") -> dict[str, Callable[[], torch.Tensor]]:
    """LayerDeepLift at the layer against zero features, and DeepLift at the pixels against black, where Captum can."""
    try:
        from captum.attr import DeepLift, LayerDeepLift
    except ImportError:
        print("captum is not installed (extra 'peers'); its rows are left out")
        return {}
    model = network(name, device, out_of_place=True)
    images, targets = batch(device)
    baseline = black().to(device)
    layer = dict(model.named_modules())[LAYERS[name]]
    at_layer, at_pixels = LayerDeepLift(model, layer), DeepLift(model)
    calls = {
        "captum LayerDeepLift": lambda: at_layer.attribute(images, baseline, target=targets).detach(),
        "captum DeepLift": lambda: at_pixels.attribute(images, baseline.expand_as(images), target=targets).detach(),
    }
    found = {}
    for label, call in calls.items():
        try:
            call()
        except Exception as error:
            print(f"{label} refuses {name}: {str(error).splitlines()[0]}")
            continue
        found[label] = call
    return found


def complete(result: fastcam.Attribution) -> tuple[bool, float]:
    """Whether the contributions add up, and the residual relative to the largest score."""
    scale = float(result.scores.abs().max())
    error = float(result.delta.abs().max()) / scale
    return error <= COMPLETE, error


def check(name: str, method: str, result: fastcam.Attribution, model: nn.Module) -> tuple[bool, float]:
    """Whether a result is right, and its error."""
    images, targets = batch(result.maps.device)
    if name == "resnet50" and method in ("lift_cam", "ablation_cam", "shap_cam"):
        with torch.no_grad():
            features = nn.Sequential(*list(model.children())[:-2])(images)
            expected = model.fc.weight[targets] * features.mean((2, 3))
        return harness.agree(result.weights, expected, 1e-4 * float(expected.abs().max()))
    if result.delta is not None:
        return complete(result)
    with fastcam.backend("reference"):
        return harness.agree(explainer(name, method, model)(images, targets).maps, result.maps, 1e-3)


def measure(name: str, options: Any) -> list[dict[str, Any]]:
    device = options.device
    model = network(name, device)
    images, targets = batch(device)

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    calls: dict[str, Callable[[], Any]] = {"forward": forward}
    match: dict[str, tuple[bool, float]] = {"forward": (True, 0.0)}
    slow = SLOW.get(name, {})
    for method, settings in (METHODS[name] | slow).items():
        if options.only not in f"{name} {method}":
            continue
        made = explainer(name, method, model, **settings)
        match[method] = check(name, method, made(images, targets), model)
        calls[method] = lambda made=made: made(images, targets)
    for label, call in captum_calls(name, device).items():
        found = call()
        if label == "captum DeepLift":
            ours = fastcam.Explainer(model, "deep_lift", normalize=False)(images, targets).maps
            # VGG's max-pools follow ReLUs directly, where Captum's contributions do not add up to the difference of the
            # scores and ours do: in float64 too, its row is marked as not matching (C4 of docs/parity.md).
            match[label] = harness.agree(found.sum(1), ours, 5e-3 * float(ours.abs().max()))
        else:
            ours = fastcam.Explainer(model, "a_fmi", layer=LAYERS[name])(images, targets).extra["contributions"]
            match[label] = harness.agree(found.sum((2, 3)), ours, 1e-3 * float(ours.abs().max()))
        calls[label] = call
    rows: dict[str, dict[str, Any]] = {}
    for part, rounds in ((calls.keys() - slow.keys(), options.rounds), (calls.keys() & slow.keys(), 3)):
        chosen = {label: call for label, call in calls.items() if label in part or label == "forward"}
        times = harness.alternate(chosen, rounds, device, warmup=1)
        for label, seconds in times.items():
            correct, error = match[label]
            ratio = harness.ratio(times, label, "forward")
            found = harness.row(f"{name} {label}", seconds, correct, times_forward=ratio, max_err=error)
            rows.setdefault(label, found)
    return list(rows.values())


def peak_mib(name: str, what: str) -> float:
    setup = (
        "import bench_deep_lift as bench\n"
        "name, what = sys.argv[1:3]\n"
        "if what == 'captum':\n    call = bench.captum_calls(name)['captum DeepLift']\n"
        "else:\n"
        "    made = bench.explainer(name, 'deep_lift', bench.network(name))\n"
        "    images, targets = bench.batch()\n    call = lambda: made(images, targets)"
    )
    return harness.peak_mib(__file__, setup, "call()", name, what)


def main() -> None:
    harness.keep_heap()
    options = harness.arguments(__doc__.splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    start = time.time()
    rows = [row for name in LAYERS if options.only.split()[:1] in ([], [name]) for row in measure(name, options)]
    more: dict[str, Any] = {}
    if not options.only and options.device == "cpu":
        more["peak_mib_deep_lift_vgg16"] = round(peak_mib("vgg16", "fastcam"), 1)
        if any("captum DeepLift" in row["name"] for row in rows):
            more["peak_mib_captum_vgg16"] = round(peak_mib("vgg16", "captum"), 1)
    harness.table(rows, ["name", "times_forward", "median_us", "iqr_us", "max_err", "match"])
    print(json.dumps(more, indent=1))
    harness.write(
        "deep_lift",
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
