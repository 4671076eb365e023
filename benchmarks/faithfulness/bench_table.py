"""Every method that explains images, on the testbed's two networks, by every metric: means, errors, costs.

    python -P benchmarks/faithfulness/bench_table.py [--model tiny_vgg] [--images 12] [--methods a,b]

Held-out scenes of three seeds, the first of the two digits of each, classes independent (sigmoid scores). Blocks:

  maps        --images scenes a seed: confidence, insertion and deletion (20 steps, to the mean colour), ROAD (nine
              shares), most-relevant-first (20 shares), localisation against the digits' masks, sparsity; for methods
              with channel coefficients their cosine to the SHAP values of the maps (`shap_cam`: exact on both networks)
  robustness  --robust scenes a seed: max-sensitivity (4 noisy copies, radius 0.2 of the normalised pixels) and
              Spearman's correlation of maps once every layer is randomised, other weights for each seed
  cost        one map of each of 8 scenes in multiples of the plain forward pass, in turns

`random pixels` and `random blobs` are maps of noise, the second at 12 x 12 and enlarged as CAMs are: what a metric
gives to maps without any idea. `ss_cam` and `is_cam` run with n = 2, and the Score-CAM family has no robustness:
minutes. Rows of networks and methods not asked for are kept from the newest file, so that the table can be made in
parts: `--missing --budget 200`, until no row is missing; then `--costs`, which takes the times of all rows again, on a
machine that does nothing else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam import metrics
from fastcam.metrics.evaluate import METRICS, Batch, Settings, evaluate
from fastcam.testbed import load, make_scenes, normalize
from fastcam.testbed.models import MEAN, MODELS, STD

SEEDS = (0, 1, 2)
RANDOM = {"random pixels": 1, "random blobs": 8}
OPTIONS: dict[str, dict[str, Any]] = {"ss_cam": {"n": 2}, "is_cam": {"n": 2}}
#: Of maps as they are; those that explain again share their explainer here.
OF_MAPS = [name for name, metric in METRICS.items() if metric.needs != "method"]
#: Too dear to be explained some twenty-five times more.
NOT_ROBUST = ("score_cam", "ss_cam", "is_cam")
KEYS = ("name", "model", "method", "n", "metrics", "times_forward")
TIMED = 8


def methods() -> list[str]:
    named = [name for name, facts in fastcam.methods().items() if facts["explains"] == "images"]
    return [*named, *RANDOM]


class Noise:
    """Maps of noise, drawn from a seed of their own."""

    def __init__(self, cell: int):
        self._cell, self._generator = cell, torch.Generator().manual_seed(cell)

    def __call__(self, images: Tensor, targets: Any = None) -> Tensor:
        size = [side // self._cell for side in images.shape[2:]]
        drawn = torch.rand(len(images), 1, *size, generator=self._generator)
        return functional.interpolate(drawn, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def bind(method: str, **more: Any) -> Callable[[nn.Module], Any]:
    options = {"mean": MEAN, "std": STD, **OPTIONS.get(method, {}), **more}
    return lambda model: Noise(RANDOM[method]) if method in RANDOM else fastcam.Explainer(model, method, **options)


def summary(values: list[Tensor]) -> dict[str, Any]:
    """Over all seeds' images; `seeds` are the means of each."""
    whole = metrics.Mean().update(torch.cat(values))
    known = torch.cat(values)
    known = known[~known.isnan()]
    return {
        "mean": float(whole.mean),
        "standard_error": float(whole.standard_error),
        "median": float(known.median()) if len(known) else None,
        "n": int(whole.count),
        "left_out": int(whole.left_out),
        "seeds": [float(metrics.Mean().update(part).mean) for part in values],
    }


def measured(model: nn.Module, method: str, images: int, robust: int) -> dict[str, dict[str, Any]]:
    """Metric -> its summary."""
    explain = bind(method)(model)
    shap = fastcam.Explainer(model, "shap_cam", size="layer", normalize=False)
    found: dict[str, list[Tensor]] = {}
    for seed in SEEDS:
        scenes = make_scenes(images, seed=seed)
        inputs, targets, masks = normalize(scenes.images), scenes.labels[:, 0], scenes.masks[:, 0]
        result = explain(inputs, targets)
        maps = getattr(result, "maps", result)
        settings = Settings(output="sigmoid", steps=20, chunk=64, mean=MEAN, std=STD, seed=seed)
        each = evaluate(model, [Batch(inputs, maps, targets, masks)], OF_MAPS, settings)
        for name, values in each.values.items():
            found.setdefault(name, []).append(torch.tensor(values, dtype=torch.float64))
        if getattr(result, "weights", None) is not None:
            agreement = metrics.shap_agreement(result.weights, shap(inputs, targets).weights)
            found.setdefault("shap_agreement", []).append(agreement)
        if method in NOT_ROBUST or method in RANDOM:
            continue
        few, classes = inputs[:robust], targets[:robust]
        moved = metrics.max_sensitivity(explain, few, classes, samples=4, seed=seed)
        fooled = metrics.cascading_randomisation(model, few, classes, method=bind(method, normalize=False), seed=seed)
        found.setdefault("max_sensitivity", []).append(moved)
        found.setdefault("randomised", []).append(fooled.similarity[-1])
    return {name: summary(values) for name, values in found.items()}


def cost(model: nn.Module, method: str) -> float | None:
    """Times the plain forward pass, median over rounds of both in turns."""
    if method in RANDOM:
        return None
    scenes = make_scenes(TIMED)
    inputs, targets, explain = normalize(scenes.images), scenes.labels[:, 0], bind(method)(model)

    def forward() -> None:
        with torch.inference_mode():
            model(inputs)

    calls = {"forward": forward, "explain": lambda: explain(inputs, targets)}
    slow = method in NOT_ROBUST
    return harness.ratio(harness.alternate(calls, 1 if slow else 5, warmup=0 if slow else 1), "explain", "forward")


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), help="one network (default: both)")
    parser.add_argument("--methods", default="", help="comma-separated (default: all)")
    parser.add_argument("--images", type=int, default=12, help="scenes a seed (default: 12)")
    parser.add_argument("--robust", type=int, default=4, help="scenes a seed for robustness (default: 4)")
    parser.add_argument("--missing", action="store_true", help="only rows the newest file lacks")
    parser.add_argument("--costs", action="store_true", help="take only the times again, of the rows that are there")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no row after these seconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = options.methods.split(",") if options.methods else methods()
    rows, begin = harness.kept("faithfulness", options.out), time.perf_counter()
    for name in [options.model] if options.model else MODELS:
        model = load(name)
        for method in chosen:
            start, key = time.perf_counter(), f"{name}: {method}"
            if options.costs:
                if key in rows:
                    rows[key]["times_forward"] = cost(model, method)
                continue
            if start - begin > options.budget or (options.missing and key in rows):
                continue
            try:
                found, times = measured(model, method, options.images, options.robust), cost(model, method)
            except (fastcam.UnsupportedOpError, ValueError) as error:  # `rsp`, `cam`: other networks
                print(f"{key} left out: {error}", flush=True)
                continue
            row = {"model": name, "method": method, "n": options.images * len(SEEDS), "metrics": found}
            rows[key] = {"name": key, **row, "times_forward": times}
            print(f"{key}, {time.perf_counter() - start:.1f} s", flush=True)
    order = {f"{name}: {method}": i for i, (name, method) in enumerate((m, k) for m in MODELS for k in methods())}
    listed = sorted(rows.values(), key=lambda row: order.get(row["name"], len(order)))
    command = "python -P benchmarks/faithfulness/bench_table.py"
    facts = {"command": command, "images": options.images, "robust": options.robust, "seeds": list(SEEDS)}
    harness.write("faithfulness", options.device, listed, options.out, KEYS, **facts)


if __name__ == "__main__":
    main()
