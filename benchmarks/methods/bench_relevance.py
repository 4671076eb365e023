"""Relevance methods on ResNet-50 and VGG-16: time and memory as multiples of the plain forward, beside Zennit.

    python -P benchmarks/methods/bench_relevance.py [--device cuda] [--rounds 7]

or in parts, which end up in one file: --only "resnet50 lrp", "vgg16 sums", ..., "peak resnet50", "peak vgg16".

Random weights, batch 8, 224 x 224, float32. F is the model's own forward under `inference_mode`, of the same network.
Zennit runs with its canonizers, batch norms merged once before the clock starts. Correctness first: every map against
the same method with the ops' PyTorch references, and composites against Zennit's relevance.
"""

from __future__ import annotations

import sys
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
#: Methods that are measured together, taking turns with the forward pass: rows and options.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "lrp": {
        "lrp epsilon_plus": {"method": "lrp", "composite": "epsilon_plus"},
        "lrp epsilon_plus_flat": {"method": "lrp", "composite": "epsilon_plus_flat"},
        "lrp epsilon_alpha2_beta1": {"method": "lrp", "composite": "epsilon_alpha2_beta1"},
    },
    "sums": {
        "attribution_equilibrium": {"method": "attribution_equilibrium"},
        "relevance_cam": {"method": "relevance_cam"},
        "rap": {"method": "rap"},
    },
    "contrasts": {
        "clrp": {"method": "clrp"},
        "sglrp": {"method": "sglrp"},
        "guided_backprop": {"method": "guided_backprop"},
    },
}
METHODS = {row: options for group in GROUPS.values() for row, options in group.items()}
MEMORY = ("lrp epsilon_plus", "lrp epsilon_alpha2_beta1", "attribution_equilibrium", "rap")
#: The layer that relevance_cam stops at: ResNet's third stage, VGG's fourth block.
LAYERS = {"resnet50": "layer3", "vgg16": "features.22"}


def network(name: str, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return getattr(torchvision_models(), name)(weights=None).eval().to(device)


def batch(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return images.to(device), torch.arange(BATCH, device=device) * 7


def explainer(name: str, what: str, model: nn.Module) -> fastcam.Explainer:
    options = dict(METHODS[what])
    if what == "relevance_cam":
        options["layer"] = LAYERS[name]
    return fastcam.Explainer(model, options.pop("method"), **options)


def zennit_calls(name: str, device: str) -> dict[str, tuple[str, Callable[[], torch.Tensor]]]:
    """Row -> our row it answers, and the call."""
    try:
        from zennit.attribution import Gradient
        from zennit.composites import COMPOSITES
        from zennit.torchvision import ResNetCanonizer, VGGCanonizer
    except ImportError:
        print("zennit is not installed (extra 'peers'); its rows are left out")
        return {}
    images, targets = batch(device)
    seeds = torch.eye(1000, device=device)[targets]
    found = {}
    for composite in ("epsilon_plus", "epsilon_alpha2_beta1"):
        canonizer = ResNetCanonizer() if "resnet" in name else VGGCanonizer()
        attributor = Gradient(network(name, device), COMPOSITES[composite](canonizers=[canonizer]))
        attributor.register_composite() if hasattr(attributor, "register_composite") else attributor.__enter__()
        found[f"zennit {composite}"] = (
            f"lrp {composite}",
            lambda attributor=attributor: attributor(images.clone(), seeds)[1],
        )
    return found


def measure(name: str, group: dict[str, dict[str, Any]], options: Any) -> list[dict[str, Any]]:
    device = options.device
    model = network(name, device)
    images, targets = batch(device)

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    calls: dict[str, Callable[[], Any]] = {"forward": forward}
    match: dict[str, tuple[bool, float]] = {"forward": (True, 0.0)}
    ours: dict[str, torch.Tensor] = {}
    for what in group:
        made = explainer(name, what, model)
        maps = made(images, targets).maps
        with fastcam.backend("reference"):
            match[what] = harness.agree(made(images, targets).maps, maps, 2e-3)
        ours[what] = maps
        calls[what] = lambda made=made: made(images, targets)
    theirs = zennit_calls(name, device) if any(what.startswith("lrp") for what in group) else {}
    for label, (answers, call) in theirs.items():
        found = call().sum(1)
        found = found / found.flatten(1).abs().amax(1).reshape(-1, 1, 1)
        # The release keeps eps in merged batch norms, which moves ResNet maps by some 1e-4.
        match[label] = harness.agree(found, ours[answers], 2e-2)
        calls[label] = call
    times = harness.alternate(calls, options.rounds, device, warmup=1)
    rows = []
    for label, seconds in times.items():
        correct, error = match[label]
        more = {"times_forward": harness.ratio(times, label, "forward"), "max_err": error}
        if label.startswith("zennit"):
            more["times_ours"] = harness.ratio(times, label, "lrp" + label.removeprefix("zennit"))
        rows.append(harness.row(f"{name} {label}", seconds, correct, **more))
    harness.table(rows, ["name", "times_forward", "times_ours", "median_us", "iqr_us", "max_err", "match"])
    return rows


def peak_mib(name: str, what: str) -> float:
    setup = (
        "import bench_relevance as bench\n"
        "name, what = sys.argv[1:3]\n"
        "model = bench.network(name)\nimages, targets = bench.batch()\n"
        "if what == 'autograd':\n"
        "    def call():\n"
        "        leaf = images.clone().requires_grad_()\n"
        "        return torch.autograd.grad(model(leaf)[range(len(leaf)), targets].sum(), leaf)\n"
        "else:\n"
        "    made = bench.explainer(name, what, model)\n"
        "    call = lambda: made(images, targets)"
    )
    return harness.peak_mib(__file__, setup, "call()", name, what, FASTCAM_RESULT_POOL="0")


def main() -> None:
    harness.keep_heap()
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    rows: dict[str, dict[str, Any]] = {}
    for name in LAYERS:
        for label, group in GROUPS.items():
            if options.only in f"{name} {label}":
                rows |= {entry["name"]: entry for entry in measure(name, group, options) if entry["name"] not in rows}
    more: dict[str, Any] = {}
    for name in LAYERS:
        if options.device == "cpu" and options.only in f"peak {name}":
            for what in ("autograd", *MEMORY):
                more[f"peak_mib {name} {what}"] = round(peak_mib(name, what), 1)
                print(name, what, more[f"peak_mib {name} {what}"], flush=True)
    harness.write(
        "relevance", options.device, list(rows.values()), options.out, parts=True, batch=BATCH, side=SIDE, **more
    )


if __name__ == "__main__":
    main()
