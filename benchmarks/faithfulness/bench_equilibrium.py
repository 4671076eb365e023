"""What a pixel map says of two objects: Attribution Equilibrium beside Grad-CAM and other relevance methods.

    python -P benchmarks/faithfulness/bench_equilibrium.py [--images 100]

or in parts, which end up in one file: --only "tiny_vgg figures", --only "tiny_resnet randomised", ...

Held-out scenes of the testbed, both digits of each, one map a digit, at image size and signed where the method is.
Masks are dilated by two pixels. Rows, means over digits:

  hit         the highest pixel lies on the target digit
  target      share of the positive values on the target, `other` on the other digit, `background` on neither
  negative    share of background pixels that are below zero
  oirr        mean positive value off the target over that on it, median
  total       sum of the unnormalised map (median)

Rows "without ..." leave out one term of the rule at k x k convolutions: the positive unit for active inputs, the
negative unit for inactive ones, the shift. Cascading randomisation: Spearman's correlation of signed maps with the
trained model's, after the weights are drawn anew (Xavier-uniform, biases uniform in [0, 1]) from the last layer down. A
batch norm is a part of the convolution before it: its gains and statistics go with that one's weights, its shifts are
the biases.

Correctness first: on `tiny_vgg`, a chain of convolutions, the median total must be ratio - 2 within 1e-3.
No times are measured, so load on the machine does not matter.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam.program.relevance import equilibrium
from fastcam.relevance import Composite, ZPlus
from fastcam.testbed import MODELS, load, make_scenes, normalize

BATCH = 25
COMMAND = "python -P benchmarks/faithfulness/bench_equilibrium.py"
EVERYWHERE = Composite(conv=ZPlus(), linear=ZPlus())
METHODS: dict[str, dict[str, Any]] = {
    "grad_cam": {"method": "grad_cam"},
    "lrp, z+ everywhere": {"method": "lrp", "composite": EVERYWHERE},
    "lrp, epsilon_plus": {"method": "lrp", "composite": "epsilon_plus"},
    "lrp, epsilon_plus_flat": {"method": "lrp"},
    "sglrp": {"method": "sglrp"},
    "rap": {"method": "rap"},
    "relevance_cam": {"method": "relevance_cam"},
    "guided_backprop": {"method": "guided_backprop"},
    "attribution_equilibrium, ratio 1": {"method": "attribution_equilibrium", "ratio": 1.0},
    "attribution_equilibrium, ratio 1.5": {"method": "attribution_equilibrium", "ratio": 1.5},
    "attribution_equilibrium": {"method": "attribution_equilibrium"},
    "attribution_equilibrium, proportional": {"method": "attribution_equilibrium", "residual": "proportional"},
}
TERMS = {"without the positive unit": "active", "without the negative unit": "inactive", "without the shift": "shift"}
FIGURES = ("hit", "target", "other", "background", "negative", "oirr", "total")


def maps_of(model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """(B, 2, H, W): a map for either digit, not normalised."""
    options = dict(options)
    return fastcam.attribute(
        model, images, options.pop("method"), targets=labels, normalize=False, **options
    ).maps.double()


@contextlib.contextmanager
def without(term: str) -> Iterator[None]:
    """Attribution Equilibrium with one term of its rule left out."""
    original = equilibrium.ops.relevance_combine

    class Changed:
        relevance_budgets = staticmethod(equilibrium.ops.relevance_budgets)
        relevance_equilibrium = staticmethod(equilibrium.ops.relevance_equilibrium)

        @staticmethod
        def relevance_combine(
            inputs: Tensor, parts: Tensor, budgets: Tensor, shift: bool = True, threshold: float = 0.0
        ) -> Tensor:
            shared, active, inactive = parts.chunk(3)
            if term != "shift" and shift:
                zero = torch.zeros_like(shared)
                active, inactive = (zero, inactive) if term == "active" else (active, zero)
            kept = torch.cat([shared, active, inactive])
            return original(inputs, kept, budgets, shift and term != "shift", threshold)

    saved, equilibrium.ops = equilibrium.ops, Changed  # type: ignore[assignment]
    try:
        yield
    finally:
        equilibrium.ops = saved


def figures(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Each (N,) of maps (N, H, W), masks of the target and of the other object (N, H, W)."""
    grown = functional.max_pool2d(masks.float().flatten(0, 1).unsqueeze(1), 5, 1, 2).squeeze(1) > 0
    target, other = grown.unflatten(0, (-1, 2)).unbind(1)
    background = ~(target | other)
    positive = maps.clamp(min=0)
    whole = positive.flatten(1).sum(1).clamp(min=1e-300)

    def share(where: Tensor) -> Tensor:
        return (positive * where).flatten(1).sum(1) / whole

    def mean(where: Tensor) -> Tensor:
        return (positive * where).flatten(1).sum(1) / where.flatten(1).sum(1)

    return {
        "hit": target.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True)).squeeze(1).double(),
        "target": share(target),
        "other": share(other & ~target),
        "background": share(background),
        "negative": ((maps < 0) & background).flatten(1).sum(1) / background.flatten(1).sum(1),
        "oirr": mean(~target) / mean(target),
        "total": maps.flatten(1).sum(1),
    }


def row(name: str, parts: list[dict[str, Tensor]]) -> dict[str, Any]:
    found = {key: torch.cat([part[key] for part in parts]).double() for key in FIGURES}
    means = {k: float(v.median() if k in ("oirr", "total") else v.mean()) for k, v in found.items()}
    hits = found["hit"]
    error = float(hits.std() / len(hits) ** 0.5)
    return {"name": name, "mean": means["hit"], "standard_error": error, "n": len(hits), **means}


def ranks(maps: Tensor) -> Tensor:
    return maps.flatten(1).argsort(1).argsort(1).double()


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's, of each map."""
    a, b = (ranks(x) - (x[0].numel() - 1) / 2 for x in (one, other))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def randomised(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model after each layer, from the last one down, has lost its weights."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, module in reversed(list(model.named_modules())):
            if isinstance(module, nn.BatchNorm2d):  # stands behind its convolution, which is next
                module.reset_parameters()
                nn.init.uniform_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.uniform_(module.bias)
                yield name, model


def measure(name: str, images: int) -> list[dict[str, Any]]:
    """The rows of the table."""
    model = load(name).requires_grad_(False)
    rows: dict[str, list[dict[str, Tensor]]] = {}
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        label: lambda x, y, options=options: maps_of(model, x, y, **options) for label, options in METHODS.items()
    }
    if name == "tiny_vgg":
        calls.pop("attribution_equilibrium, proportional")  # it has no residual sums
    for label, term in TERMS.items():

        def call(x: Tensor, y: Tensor, term: str = term) -> Tensor:
            with without(term):
                return maps_of(model, x, y, method="attribution_equilibrium")

        calls[label] = call
    for start in range(0, images, BATCH):
        scenes = make_scenes(min(BATCH, images - start), split="test", seed=0, start=start)
        x = normalize(scenes.images)
        masks = torch.stack([scenes.masks, scenes.masks.flip(1)], 2).flatten(0, 1)
        for label, call in calls.items():
            rows.setdefault(label, []).append(figures(call(x, scenes.labels).flatten(0, 1), masks))
        print(f"{name}: {start + len(x)} images", flush=True)
    found = [row(f"{name}: {label}", parts) for label, parts in rows.items()]
    totals = {entry["name"]: entry["total"] for entry in found}
    for label, ratio in (("", 2.0), (", ratio 1", 1.0), (", ratio 1.5", 1.5)):
        total = totals[f"{name}: attribution_equilibrium{label}"]
        if name == "tiny_vgg" and abs(total - (ratio - 2)) > 1e-3:
            raise RuntimeError(f"maps at ratio {ratio} total {total}, expected {ratio - 2}")
    return found


def drift(name: str) -> list[dict[str, Any]]:
    """Correlations of 16 scenes' maps, after each layer, with the trained model's."""
    model = load(name).requires_grad_(False)
    scenes = make_scenes(16, split="test", seed=0, start=0)
    x, labels = normalize(scenes.images), scenes.labels[:, :1]
    found = []
    for label in ("attribution_equilibrium", "grad_cam", "lrp, z+ everywhere"):
        whole = maps_of(model, x, labels, **METHODS[label]).flatten(0, 1)
        for layer, changed in randomised(model):
            values = correlation(whole, maps_of(changed, x, labels, **METHODS[label]).flatten(0, 1)).nan_to_num()
            found.append(
                {
                    "name": f"{name}, randomised: {label} after {layer}",
                    "mean": float(values.mean()),
                    "standard_error": float(values.std() / len(values) ** 0.5),
                    "n": len(values),
                }
            )
    return found


def main() -> None:
    parser = harness.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="held-out scenes (default: 100)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        rows += measure(name, options.images) if options.only in f"{name} figures" else []
        rows += drift(name) if options.only in f"{name} randomised" else []
    harness.table(rows, ["name", *FIGURES, "mean"])
    harness.write(
        "equilibrium",
        "cpu",
        rows,
        options.out,
        harness.QUALITY_KEYS,
        parts=True,
        measure="argmax hits (mean), shares of positive values, Spearman's correlation under randomisation",
        command=f"{COMMAND} --images {options.images}",
    )


if __name__ == "__main__":
    main()
