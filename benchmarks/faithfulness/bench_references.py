"""How much a heat map depends on the choice of the reference: mean rank correlation over pairs of references.

    python -P benchmarks/faithfulness/bench_references.py [--images 200] [--steps 16]

Held-out scenes of the testbed, one map an image, for its first digit. Each method runs under each of the references
black, white, mean, blur and noise; a row's figure is Spearman's correlation (ties by their mean rank) between two
references' heat maps, averaged over the ten pairs of references, then over images. Rows:

  a_fmi, VARIANT           its heat map at image size: after ReLU and the resize from 12 x 12
  a_fmi, VARIANT, signed   at 12 x 12, without the ReLU
  deep_lift, integrated gradients             signed pixel maps, summed over colours
  ..., pooled              those at 12 x 12, averaged over 8 x 8 pixels: the resolution of A-FMI's maps, so that what
                           its smoothness alone gives is no part of the comparison with "signed"

Integrated gradients are (x - x') times the mean gradient at `steps` midpoints between x' and x. A pair of which a map
is constant has no correlation; it is left out of its image's mean and counted in `constant_pairs`.

On a pooled linear head two references' maps differ by CAM(x'_1) - CAM(x'_2), the same for all images of a class: its
size relative to the maps, |CAM(x'_1) - CAM(x'_2)| / mean(|M_1|, |M_2|) in the 2-norm, is a row of its own.

Correctness first: contributions of every method with a completeness theorem must sum to the difference of the scores.
No times are measured, so load on the machine does not matter.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam.methods._method import Pixels
from fastcam.methods._references import reference_images
from fastcam.testbed import MEAN, MODELS, STD, load, make_scenes, normalize

REFERENCES = ("black", "white", "mean", "blur", "noise")
VARIANTS = ("mean_multiplier", "contribution_ratio", "contribution", "swap")
PAIRS = tuple(itertools.combinations(range(len(REFERENCES)), 2))
BATCH, CELL = 25, 8
COMMAND = "python -P benchmarks/faithfulness/bench_references.py"

#: Heat maps (B, H, W) under each of the references.
Maps = list[Tensor]
Attributing = Callable[[Tensor, Tensor, str], Tensor]


def explaining(model: nn.Module, method: str, size: str, **options: Any) -> Attributing:
    """Heat maps of a fastcam method, each reference by an explainer that keeps it."""
    settings: dict[str, Any] = {"mean": MEAN, "std": STD, "size": size, "normalize": size == "input", **options}
    explainers = {name: fastcam.Explainer(model, method, reference=name, **settings) for name in REFERENCES}

    def attribute(images: Tensor, targets: Tensor, name: str) -> Tensor:
        found = explainers[name](images, targets)
        scores = found.scores.gather(1, targets[:, None])[:, 0].abs()
        size = found.raw.flatten(1).abs().sum(1) if method == "deep_lift" else scores
        require(method, found.delta, torch.maximum(size, scores), 1e-4)
        return found.maps

    return attribute


def integrated_gradients(model: nn.Module, steps: int) -> Attributing:
    """sum over colours of (x - x') mean_t d score / d x at x' + t (x - x'), t the midpoints of `steps` intervals."""
    pixels = Pixels(MEAN, STD)

    def attribute(images: Tensor, targets: Tensor, name: str) -> Tensor:
        gap = images - reference_images(name, images, pixels, 0)
        total = torch.zeros_like(images)
        for step in range(steps):
            point = (images - gap * (1 - (step + 0.5) / steps)).requires_grad_()
            score = model(point).gather(1, targets[:, None]).sum()
            total += torch.autograd.grad(score, point)[0]
        found = gap * total / steps
        with torch.no_grad():
            outputs = [model(x).gather(1, targets[:, None])[:, 0] for x in (images, images - gap)]
        rest = found.sum((1, 2, 3)) - (outputs[0] - outputs[1])
        require("integrated gradients", rest.abs().mean(), found.abs().sum((1, 2, 3)).mean(), 0.05)
        return found.sum(1)

    return attribute


def require(method: str, rest: Tensor, size: Tensor, limit: float) -> None:
    if not bool((rest.abs() <= limit * size).all()):
        raise RuntimeError(f"contributions of {method} miss the score by up to {float((rest.abs() / size).max()):.3g}")


def pooled(maps: Tensor) -> Tensor:
    return functional.avg_pool2d(maps[:, None], CELL)[:, 0]


def ranks(maps: Tensor) -> Tensor:
    """(B, n) ranks of each map's values, equal values at the mean of theirs."""
    rows = maps.flatten(1).contiguous()
    ordered = rows.sort(dim=1).values
    low, high = (torch.searchsorted(ordered, rows, right=right) for right in (False, True))
    return (low + high).double() / 2


def correlations(maps: Maps) -> Tensor:
    """(B, pairs) rank correlations between references, NaN where a map is constant."""
    centred = [one - one.mean(1, keepdim=True) for one in map(ranks, maps)]
    unit = [one / one.norm(dim=1, keepdim=True) for one in centred]
    return torch.stack([(unit[i] * unit[j]).sum(1) for i, j in PAIRS], 1)


def differences(maps: Maps) -> Tensor:
    """(B, pairs) |M_1 - M_2| over the mean of |M_1| and |M_2|."""
    flat = [one.flatten(1).double() for one in maps]
    found = [2 * (flat[i] - flat[j]).norm(dim=1) / (flat[i].norm(dim=1) + flat[j].norm(dim=1)) for i, j in PAIRS]
    return torch.stack(found, 1)


def row(name: str, values: Tensor) -> dict[str, Any]:
    """Mean over images of each image's mean over pairs, and its standard error; each pair's mean over images."""
    constant = values.isnan()
    each = values.nanmean(1)
    each = each[~each.isnan()]
    return {
        "name": name,
        "mean": float(each.mean()),
        "standard_error": float(each.std() / len(each) ** 0.5),
        "n": len(each),
        "constant_pairs": int(constant.sum()),
        "pairs": {
            f"{REFERENCES[i]}, {REFERENCES[j]}": float(v) for (i, j), v in zip(PAIRS, values.nanmean(0), strict=True)
        },
    }


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one of the testbed's models."""
    model = load(name).requires_grad_(False)
    methods: dict[str, Attributing] = {f"a_fmi, {v}": explaining(model, "a_fmi", "input", variant=v) for v in VARIANTS}
    methods |= {f"a_fmi, {v}, signed": explaining(model, "a_fmi", "layer", variant=v, relu=False) for v in VARIANTS}
    methods["deep_lift"] = explaining(model, "deep_lift", "layer")
    methods["integrated gradients"] = integrated_gradients(model, options.steps)
    found: dict[str, list[Tensor]] = {}
    sizes: list[Tensor] = []
    for start in range(0, options.images, BATCH):
        scenes = make_scenes(min(BATCH, options.images - start), split="test", seed=0, start=start)
        images, targets = normalize(scenes.images), scenes.labels[:, 0]
        for method, attribute in methods.items():
            maps = [attribute(images, targets, reference) for reference in REFERENCES]
            found.setdefault(method, []).append(correlations(maps))
            if not method.startswith("a_fmi"):
                found.setdefault(f"{method}, pooled", []).append(correlations([pooled(one) for one in maps]))
            if method == "a_fmi, mean_multiplier, signed":
                sizes.append(differences(maps))
        print(f"{name}: {start + len(images)} images", flush=True)
    rows = [row(f"{name}: {method}", torch.cat(parts)) for method, parts in found.items()]
    label = "size of CAM(x'_1) - CAM(x'_2)" if name == "tiny_resnet" else "size of M_1 - M_2"
    return [*rows, row(f"{name}: {label} relative to the map", torch.cat(sizes))]


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="held-out scenes (default: 200)")
    parser.add_argument("--steps", type=int, default=16, help="points of integrated gradients (default: 16)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [entry for name in MODELS for entry in measure(name, options)]
    harness.table(rows, ["name", "mean", "standard_error", "n", "constant_pairs"])
    means = {entry["name"]: entry["mean"] for entry in rows}
    harness.write(
        "references",
        "cpu",
        rows,
        options.out,
        harness.QUALITY_KEYS,
        measure="Spearman's correlation of heat maps under two references",
        command=f"{COMMAND} --images {options.images} --steps {options.steps}",
        less_sensitive_than_deep_lift={
            name: means[f"{name}: a_fmi, mean_multiplier"] > means[f"{name}: deep_lift"]
            and means[f"{name}: a_fmi, mean_multiplier, signed"] > means[f"{name}: deep_lift, pooled"]
            for name in MODELS
        },
    )


if __name__ == "__main__":
    main()
