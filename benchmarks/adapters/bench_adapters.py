"""Each adapter beside the library it stands in for, by the same script in the same rounds.

    python -P benchmarks/adapters/bench_adapters.py [--rounds 3] [--only TEXT]

Random weights, float32, 224 x 224 and batch 8 unless the row says otherwise; "small" is one image of 32 x 32 in a
network of two convolutions, where an adapter has least to save and its own work weighs most. These rows, and those of
64 x 64, have five times the rounds, and take turns by bursts of calls, a twentieth of a second each, as in a loop over
images. A row is the adapter's call; `speedup` is the library's own time for it over ours. `--only` keeps the other rows
of the newest file.
The results of both are compared before the clock starts, but where the definitions differ on purpose or the noise is
another.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads of NumPy's BLAS would spin for a tenth of a second behind one library's call, into the other's.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "14")

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

from fastcam._testing.models import torchvision_models
from fastcam.profiling.measure import seconds_of

Pair = tuple[Callable[[], Any], Callable[[], Any], float]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "small":
        return Small().eval()
    if name == "small, pooled":
        return nn.Sequential(Small().features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    return getattr(torchvision_models(), name)(weights=None).eval()


class Small(nn.Module):
    """A LeNet for 3 x 32 x 32, without the modules that Captum's LRP has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.features = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


def images(batch: int = 8, side: int = 224) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def classes(batch: int = 8) -> Tensor:
    return torch.arange(batch) * 7


def grad_cam() -> dict[str, Callable[[], Pair]]:
    torchvision_models()  # torchvision first, which the library imports too
    import pytorch_grad_cam as theirs
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection_with_sign_correction

    from fastcam.adapters import grad_cam as ours

    for each in (theirs.eigen_cam, theirs.eigen_grad_cam):
        each.get_2d_projection = get_2d_projection_with_sign_correction  # else its sign is arbitrary

    def pair(cls: str, name: str, layers: tuple[str, ...], batch: int = 8, side: int = 224, **call: Any) -> Pair:
        x, targets = images(batch, side), [ClassifierOutputTarget(int(c)) for c in classes(batch)]
        found = []
        for module in (ours, theirs):
            net = network(name)
            cam = getattr(module, cls)(net, [net.get_submodule(layer) for layer in layers])

            def run(cam: Any = cam) -> Any:
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                    return cam(input_tensor=x, targets=targets, **call)

            found.append(run)
        # float32 gradients through fifty layers; Grad-CAM++ divides by their cubes
        return found[0], found[1], 2e-2 if cls in ("GradCAMPlusPlus", "FullGrad", "EigenCAM") else 5e-3

    last = ("layer4",)
    rows = {
        "GradCAM resnet50 layer4": lambda: pair("GradCAM", "resnet50", last),
        "GradCAM resnet50 layer3+layer4": lambda: pair("GradCAM", "resnet50", ("layer3", "layer4")),
        "GradCAM resnet18 layer4, aug_smooth, batch 1": lambda: pair("GradCAM", "resnet18", last, 1, aug_smooth=True),
        "EigenGradCAM resnet18 layer4": lambda: pair("EigenGradCAM", "resnet18", last),
        "FullGrad resnet18, batch 2": lambda: pair("FullGrad", "resnet18", last, 2),
        "ScoreCAM resnet18 layer4, batch 1, 96 x 96": lambda: pair("ScoreCAM", "resnet18", last, 1, 96),
        "AblationCAM resnet18 layer4, batch 1, 96 x 96": lambda: pair("AblationCAM", "resnet18", last, 1, 96),
    }
    small = "GradCAM HiResCAM GradCAMPlusPlus XGradCAM LayerCAM EigenCAM EigenGradCAM ScoreCAM AblationCAM FullGrad"
    rows |= {
        f"{cls} resnet18 layer4, batch 1, 64 x 64": lambda cls=cls: pair(cls, "resnet18", last, 1, 64)
        for cls in small.split()
        if cls not in ("ScoreCAM", "AblationCAM")
    }
    return rows | {f"{cls} small": lambda cls=cls: pair(cls, "small", ("features.4",), 1, 32) for cls in small.split()}


def captum() -> dict[str, Callable[[], Pair]]:
    import captum.attr as theirs

    from fastcam.adapters import captum as ours

    def pair(
        cls: str, name: str, layer: str | None = None, limit: float = 1e-3, batch: int = 8, side: int = 224
    ) -> Pair:
        x, targets = images(batch, side), classes(batch)
        found = []
        for module in (ours, theirs):
            net = network(name)
            for relu in net.modules():
                if isinstance(relu, nn.ReLU):
                    relu.inplace = False  # Captum's hooks refuse modules that work in place
            method = getattr(module, cls)(net, *([] if layer is None else [net.get_submodule(layer)]))

            def run(method: Any = method) -> Tensor:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = method.attribute(x, target=targets).detach()
                return found / found.abs().amax()

            found.append(run)
        return found[0], found[1], limit

    rows = {
        # torchvision's new VGG has no biases, so of pools behind ReLUs both make the same (C4 in docs/parity.md)
        "DeepLift vgg16": lambda: pair("DeepLift", "vgg16"),
        "LayerDeepLift vgg16 features.29": lambda: pair("LayerDeepLift", "vgg16", "features.29"),
        # a unit within rounding of zero lets a gradient pass or not: Captum's own float32 is 3e-3 from its float64 here
        "GuidedBackprop vgg16": lambda: pair("GuidedBackprop", "vgg16", limit=1e-2),
        "LRP vgg16": lambda: pair("LRP", "vgg16"),
        "GuidedGradCam resnet18 layer4": lambda: pair("GuidedGradCam", "resnet18", "layer4", 1e-2),
        "LayerGradCam resnet50 layer4": lambda: pair("LayerGradCam", "resnet50", "layer4"),
        "LayerGradCam resnet50 layer3": lambda: pair("LayerGradCam", "resnet50", "layer3"),
    }
    rows |= {
        f"{cls} resnet18, batch 1, 64 x 64": lambda cls=cls, layer=layer: pair(cls, "resnet18", layer, 1e-3, 1, 64)
        for cls, layer in (("LayerGradCam", "layer4"), ("GuidedBackprop", None), ("Deconvolution", None))
    }
    small = {"LayerDeepLift": "features.4", "LayerLRP": "features.3"}
    small |= dict.fromkeys(("LayerGradCam", "GuidedGradCam"), "features.4")
    small |= dict.fromkeys(("DeepLift", "GuidedBackprop", "Deconvolution", "LRP"))
    return rows | {
        f"{cls} small": lambda cls=cls, layer=layer: pair(
            cls,
            "small",
            layer,
            float("inf") if cls == "DeepLift" else 1e-3,
            1,
            32,  # C4
        )
        for cls, layer in small.items()
    }


def zennit() -> dict[str, Callable[[], Pair]]:
    torchvision_models()  # torchvision first, which Zennit imports too
    from zennit import attribution as theirs
    from zennit.composites import COMPOSITES
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    from fastcam.adapters import zennit as ours

    def pair(
        name: str, composite: str, cls: str = "Gradient", batch: int = 8, side: int = 224, **arguments: Any
    ) -> Pair:
        x, seeds = images(batch, side), torch.eye(10 if name == "small" else 1000)[classes(batch)]
        bounds = {"low": torch.full((1, 3, 1, 1), -3.0), "high": torch.full((1, 3, 1, 1), 3.0)}
        found = []
        for module in (ours, theirs):
            canonizer = ResNetCanonizer() if "resnet" in name else VGGCanonizer()
            options = bounds if composite == "epsilon_gamma_box" else {}
            made = COMPOSITES[composite](canonizers=[canonizer], **options)
            attributor = getattr(module, cls)(network(name), made, **arguments)
            attributor.__enter__()  # registered once, before the clock starts

            def run(attributor: Any = attributor) -> Tensor:
                torch.manual_seed(2)  # for the noise of SmoothGrad
                relevance = attributor(x.clone(), seeds)[1]
                return relevance / relevance.abs().amax()

            found.append(run)
        # The release keeps eps in merged batch norms.
        return found[0], found[1], 2e-2

    names = ("epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box")
    rows = {f"{composite} resnet50": lambda composite=composite: pair("resnet50", composite) for composite in names}
    rows |= {
        f"{cls} epsilon_plus resnet18, batch 1, 96 x 96": lambda cls=cls: pair(
            "resnet18", "epsilon_plus", cls, 1, 96, n_iter=10
        )
        for cls in ("SmoothGrad", "IntegratedGradients")
    }
    rows |= {
        f"{composite} resnet18, batch 1, 64 x 64": lambda composite=composite: pair(
            "resnet18", composite, batch=1, side=64
        )
        for composite in ("epsilon_plus_flat", "guided_backprop")
    }
    return rows | {
        f"{composite} small": lambda composite=composite: pair("small", composite, batch=1, side=32)
        for composite in COMPOSITES
        if composite != "beta_smooth"  # Zennit's own code
    }


def torchcam() -> dict[str, Callable[[], Pair]]:
    torchvision_models()
    from torchcam import methods as theirs

    from fastcam.adapters import torchcam as ours

    def pair(cls: str, name: str, layer: str, fast: bool, batch: int = 8, side: int = 224) -> Pair:
        x, chosen = images(batch, side), classes(batch).tolist()
        found = []
        for module in (ours, theirs):
            options = {"input_shape": (3, side, side)}
            extractor = getattr(module, cls)(network(name), layer, **options)

            def run(extractor: Any = extractor, fast: bool = fast and module is ours) -> Tensor:
                return extractor.run(x, chosen)[0] if fast else extractor(chosen, extractor.model(x))[0].detach()

            found.append(run)
        # T1, T3, and noise from a seed: nothing to agree with
        return found[0], found[1], float("inf") if cls in ("GradCAMpp", "SmoothGradCAMpp", "SSCAM") else 5e-3

    rows = {
        "GradCAM resnet50 layer4, run": lambda: pair("GradCAM", "resnet50", "layer4", True),
        "GradCAM resnet50 layer3, run": lambda: pair("GradCAM", "resnet50", "layer3", True),
        "GradCAM resnet50 layer4": lambda: pair("GradCAM", "resnet50", "layer4", False),
        "ScoreCAM resnet18 layer4, batch 1, 96 x 96": lambda: pair("ScoreCAM", "resnet18", "layer4", False, 1, 96),
    }
    rows |= {
        f"{cls} resnet18 layer4, batch 1, 64 x 64{', run' * fast}": lambda cls=cls, fast=fast: pair(
            cls, "resnet18", "layer4", fast, 1, 64
        )
        for cls in ("CAM", "GradCAM", "LayerCAM")
        for fast in (False, True)
    }
    small = "CAM GradCAM GradCAMpp SmoothGradCAMpp XGradCAM LayerCAM ScoreCAM SSCAM ISCAM"
    return rows | {
        f"{cls} small{', run' * fast}": lambda cls=cls, fast=fast: pair(
            cls, "small, pooled" if cls == "CAM" else "small", "0.4" if cls == "CAM" else "features.4", fast, 1, 32
        )
        for cls in small.split()
        for fast in (False, True)
    }


def quantus() -> dict[str, Callable[[], Pair]]:
    torchvision_models()
    import quantus as theirs

    from fastcam.adapters import quantus as ours

    def pair(net: nn.Module, x: np.ndarray, step: int, own: dict[str, Any], mine: dict[str, Any]) -> Pair:
        y = np.arange(len(x)) % 10
        options = {"features_in_step": step, "disable_warnings": True}
        call = {"model": net, "x_batch": x, "y_batch": y, "device": "cpu", "softmax": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            maps = ours.explain(net, x, y, **mine)
            curves = [np.array(m.PixelFlipping(**options)(a_batch=maps, **call)) for m in (ours, theirs)]
        found = []
        for module, kwargs in ((ours, mine), (theirs, own)):

            def run(module: Any = module, kwargs: Any = kwargs) -> None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    metric = module.PixelFlipping(**options)
                    metric(explain_func=module.explain, explain_func_kwargs=dict(kwargs), **call)

            found.append(run)
        # Curves of the same maps must agree; which maps they are is the business of either explain path.
        agreed, _ = harness.agree(torch.from_numpy(curves[0]), torch.from_numpy(curves[1]), 1e-5)
        return found[0], found[1], 0.0 if agreed else -1.0

    def small(step: int) -> Pair:
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        ).eval()
        x = np.random.default_rng(0).standard_normal((8, 1, 28, 28)).astype(np.float32)
        return pair(
            net, x, step, {"method": "DeepLift"}, {"method": "deep_lift", "reference": torch.zeros(1, 1, 28, 28)}
        )

    def large(side: int, step: int) -> Pair:
        layer = "layer4" if side > 32 else "layer2"
        own = {"method": "LayerGradCam", "gc_layer": f"model.{layer}", "interpolate": (side, side)}
        return pair(network("resnet18"), images(8, side).numpy(), step, own, {"method": "grad_cam", "layer": layer})

    return {
        "PixelFlipping LeNet 28 x 28, 784 steps": lambda: small(1),
        "PixelFlipping LeNet 28 x 28, 28 steps": lambda: small(28),
        "PixelFlipping resnet18 32 x 32, 96 steps": lambda: large(32, 32),
        "PixelFlipping resnet18 224 x 224, 12 steps": lambda: large(224, 12544),
    }


PEERS = {"grad_cam": grad_cam, "captum": captum, "zennit": zennit, "torchcam": torchcam, "quantus": quantus}


def main() -> None:
    parser = harness.arguments((__doc__ or "").splitlines()[0])
    parser.set_defaults(rounds=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = harness.kept("adapters", options.out) if options.only else {}
    for peer, table in PEERS.items():
        for label, make in table().items():
            name = f"{peer} {label}"
            if options.only in name:
                short = "small" in name or "64 x 64" in name
                rows[name] = measured(name, peer, *make(), options.rounds * (5 if short else 1), short)
    harness.table(list(rows.values()), ["name", "speedup", "median_us", "iqr_us", "max_err", "match"])
    harness.write("adapters", options.device, list(rows.values()), options.out)


def measured(
    name: str, peer: str, mine: Callable[[], Any], theirs: Callable[[], Any], limit: float, rounds: int, burst: bool
) -> dict[str, Any]:
    match, error = limit == 0.0, 0.0  # Quantus' curves have been compared where they were made
    if peer != "quantus":
        match, error = harness.agree(torch.as_tensor(mine()), torch.as_tensor(theirs()), limit)
    calls = {"ours": mine, "theirs": theirs}
    counts = {each: max(1, round(0.05 / seconds_of(call))) if burst else 1 for each, call in calls.items()}

    def repeated(each: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(counts[each]):
                calls[each]()

        return run

    times = harness.alternate({each: repeated(each) for each in calls}, rounds, warmup=1)
    times = {each: [seconds / counts[each] for seconds in many] for each, many in times.items()}
    speedup = {peer: harness.ratio(times, "theirs", "ours")} if match else None
    baseline = {peer: float(np.median(times["theirs"])) * 1e6}
    print(f"{name}: {speedup}", flush=True)
    return harness.row(name, times["ours"], match, max_err=error, baselines_us=baseline, speedup=speedup)


if __name__ == "__main__":
    main()
