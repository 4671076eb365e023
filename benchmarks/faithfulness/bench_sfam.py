"""Where two images are alike: SFAM beside other maps of similarity, on pairs of scenes that share one digit.

    python -P benchmarks/faithfulness/bench_sfam.py [--pairs 500] [--picture docs/images/sfam.png]

Pairs of held-out scenes of the testbed with exactly one digit in common, embedded by `tiny_embed` (80 averaged feature
maps). Every row makes a map of both scenes at image size:

  sfam ...              by metric and weighting of the channels
  grad_cam              Grad-CAM of the cosine: channels weighted by their mean gradient, norms included
  similarity map        sum_k A_k[i,j] y_k, each place against the other embedding (Stylianou et al., Zhu et al.)
  activations           the plain sum of the feature maps
  random                a random place

  hit                   the highest pixel lies on the shared digit, `hit_a` and `hit_b` by image
  energy                share of the map's mass on the shared digit
  other                 the highest pixel lies on the digit that is not shared

Deletion: embedding channels are set to zero in both scenes, in the order of a row's channel weights; `deletion` is the
mean cosine over the 81 steps, lower where the important channels went first. The similarity map's order is that of what
a channel adds to it, summed over all places of both scenes, sum_ij A_k[i,j] y_k (in exact arithmetic the contributions
of `sfam, cosine`); `deletion_at_peak` is by what it adds at the map's highest place, the pair of points that look most
alike.

Correctness first: SFAM's contributions must add up to the cosine within 1e-6 and its maps equal a computation in
float64 within 1e-5. No times are measured, so load on the machine does not matter.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam import render
from fastcam.testbed import load, make_scenes, metadata, normalize
from fastcam.testbed.scenes import Scenes

COMMAND = "python -P benchmarks/faithfulness/bench_sfam.py"
SFAM: dict[str, dict[str, Any]] = {
    "sfam, cosine": {},
    "sfam, cosine, raw": {"weighting": "raw"},
    "sfam, euclidean": {"metric": "euclidean"},
    "sfam, euclidean, cross": {"metric": "euclidean", "euclidean_term": "cross"},
}
AT_PEAK = "similarity map at its peak"
FIGURES = ("hit", "hit_a", "hit_b", "energy", "other")


def pairs_of(count: int) -> tuple[Scenes, Tensor, Tensor]:
    """Scenes, (count, 2) scene numbers, and (count, 2) slots of the shared digit; each scene is in one pair at most."""
    scenes = make_scenes(4 * count + 50)
    free = list(range(len(scenes)))
    labels = [set(pair) for pair in scenes.labels.tolist()]
    rows, slots = [], []
    while free and len(rows) < count:
        first = free.pop(0)
        for second in free:
            shared = labels[first] & labels[second]
            if len(shared) == 1:
                free.remove(second)
                digit = shared.pop()
                rows.append((first, second))
                slots.append(tuple(scenes.labels[i].tolist().index(digit) for i in (first, second)))
                break
    if len(rows) < count:
        raise SystemExit(f"only {len(rows)} pairs found")
    return scenes, torch.tensor(rows), torch.tensor(slots)


def maps_of(features: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [fastcam.ops.cam_map(each, weight, size=(96, 96)) for each, weight in zip(features, weights, strict=True)]


def alternatives(features: list[Tensor]) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Maps of both images by name, and channel weights (B, K) for deletion."""
    leaves = [each.mean((2, 3)).requires_grad_() for each in features]
    cosine = functional.cosine_similarity(*leaves)
    slopes = list(torch.autograd.grad(cosine.sum(), leaves))
    other = [leaves[1].detach(), leaves[0].detach()]
    ones = [torch.ones_like(each) for each in other]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand((len(each), 96, 96), generator=generator) for each in features]
    maps = {
        "grad_cam": maps_of(features, slopes),
        "similarity map": maps_of(features, other),
        "activations": maps_of(features, ones),
        "random": noise,
    }
    added = [each.flatten(2) * vector.unsqueeze(2) for each, vector in zip(features, other, strict=True)]
    peaks = [each.gather(2, each.sum(1).argmax(1).view(-1, 1, 1).expand(-1, each.shape[1], 1)) for each in added]
    weights = {
        "grad_cam": slopes[0] + slopes[1],
        "similarity map": sum(each.sum(2) for each in added),
        AT_PEAK: sum(each.squeeze(2) for each in peaks),
        "activations": other[0] + other[1],
        "random": torch.rand(other[0].shape, generator=generator),
    }
    return maps, weights


def deletion(embeddings: list[Tensor], weights: Tensor) -> Tensor:
    """(B,) mean cosine while channels go, the heaviest first."""
    order = weights.argsort(1, descending=True)
    keep = torch.ones_like(weights)
    found = []
    for step in range(weights.shape[1] + 1):
        found.append(functional.cosine_similarity(embeddings[0] * keep, embeddings[1] * keep))
        if step < weights.shape[1]:
            keep.scatter_(1, order[:, step : step + 1], 0)
    return torch.stack(found, 1).mean(1)


def figures(maps: list[Tensor], masks: list[Tensor], others: list[Tensor]) -> dict[str, Tensor]:
    hits, energy, wrong = [], [], []
    for each, mask, other in zip(maps, masks, others, strict=True):
        peak = each.flatten(1).argmax(1, keepdim=True)
        hits.append(mask.flatten(1).gather(1, peak).squeeze(1).double())
        wrong.append(other.flatten(1).gather(1, peak).squeeze(1).double())
        mass = each.double().flatten(1)
        energy.append((mass * mask.flatten(1)).sum(1) / mass.sum(1).clamp(min=1e-12))
    both = {"hit": (hits[0] + hits[1]) / 2, "hit_a": hits[0], "hit_b": hits[1]}
    return both | {"energy": (energy[0] + energy[1]) / 2, "other": (wrong[0] + wrong[1]) / 2}


def check(model: torch.nn.Module, images: list[Tensor], result: fastcam.PairAttribution) -> None:
    wide = model.double()
    layers = [functional.relu(wide.norm(wide.stem(x.double()))) for x in images]
    layers = [wide.layer3(wide.layer2(wide.layer1(x))).detach() for x in layers]
    model.float()
    u, v = (x.mean((2, 3)) for x in layers)
    c = u * v / (u.norm(dim=1) * v.norm(dim=1)).unsqueeze(1)
    torch.testing.assert_close(result.contributions.sum(1).double(), c.sum(1), rtol=0, atol=1e-6)
    low, high = c.amin(1, keepdim=True), c.amax(1, keepdim=True)
    m = torch.einsum("bk,bkhw->bhw", (c - low) / (high - low), layers[0])
    m = functional.interpolate(m.unsqueeze(1), (96, 96), mode="bilinear", align_corners=False).squeeze(1)
    low, high = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
    torch.testing.assert_close(result.maps_a.double(), (m - low) / (high - low), rtol=0, atol=1e-5)


def measure(count: int) -> list[dict[str, Any]]:
    model = load("tiny_embed")
    scenes, rows, slots = pairs_of(count)
    inputs = normalize(scenes.images)
    images = [inputs[rows[:, side]] for side in (0, 1)]
    index = torch.arange(count)
    masks = [scenes.masks[rows[:, side], slots[:, side]] for side in (0, 1)]
    others = [scenes.masks[rows[:, side], 1 - slots[:, side]] for side in (0, 1)]
    maps: dict[str, list[Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for name, options in SFAM.items():
        result = fastcam.attribute_pair(model, *images, **options)
        if name == "sfam, cosine":
            check(model, [x[:8] for x in images], fastcam.attribute_pair(model, *(x[:8] for x in images)))
        maps[name], weights[name] = [result.maps_a, result.maps_b], result.weights
    features = [fastcam.PairExplainer(model).gallery(x).features for x in images]
    more, orders = alternatives(features)
    maps, weights = maps | more, weights | orders
    embeddings = [x.mean((2, 3)) for x in features]
    found = []
    for name, both in maps.items():
        values = figures(both, masks, others)
        hit = values["hit"]
        row = {"name": name, "mean": float(hit.mean()), "standard_error": float(hit.std() / len(index) ** 0.5)}
        row |= {"n": count} | {key: float(value.mean()) for key, value in values.items()}
        if name in weights:
            curve = deletion(embeddings, weights[name])
            row |= {"deletion": float(curve.mean()), "deletion_error": float(curve.std() / count**0.5)}
        if name == "similarity map":
            curve = deletion(embeddings, weights[AT_PEAK])
            row |= {"deletion_at_peak": float(curve.mean()), "deletion_at_peak_error": float(curve.std() / count**0.5)}
        found.append(row)
    return found


def draw(path: Path, cell: int = 100) -> None:
    model = load("tiny_embed")
    scenes, rows, slots = pairs_of(40)
    columns = ["shared digit", "sfam", "sfam, raw", "grad_cam", "similarity map", "activations"]
    groups = []
    for number in (2, 5, 12):  # on photographs in the public domain or CC0, chosen before any map was seen
        pair = rows[number]
        pixels = scenes.images[pair]
        images = normalize(pixels)
        first, second = images[:1], images[1:]
        features = [fastcam.PairExplainer(model).gallery(x).features for x in (first, second)]
        other, _ = alternatives(features)
        plain = fastcam.attribute_pair(model, first, second)
        raw = fastcam.attribute_pair(model, first, second, weighting="raw")
        for side in (0, 1):
            mask = scenes.masks[pair[side], slots[number, side]]
            cells = [render.outline(render.to_pixels(pixels[side]), mask)]
            chosen = [(plain.maps_a, plain.maps_b), (raw.maps_a, raw.maps_b)]
            chosen += [tuple(other[name]) for name in ("grad_cam", "similarity map", "activations")]
            for maps in chosen:
                attribution = maps[side][0]
                row, column = divmod(int(attribution.argmax()), attribution.shape[1])
                colour = (255, 255, 255) if mask[row, column] else (255, 0, 200)
                cells.append(render.ring(render.overlay(pixels[side], attribution), row, column, colour=colour))
            digit = int(scenes.labels[pair[side], slots[number, side]])
            caption = f"cosine {float(plain.score):.2f}"
            groups.append(render.Group(render.to_pixels(pixels[side]), caption, [(str(digit), cells)]))
    note = "Pairs of scenes, one above the other, that share a digit. Ring: the map's peak, white on that digit."
    print(render.panel(groups, path, columns=columns, note=note, cell=cell))


def main() -> None:
    parser = harness.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--picture", type=Path, help="draw the picture too, to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.pairs)
    harness.table(rows, ["name", *FIGURES, "standard_error", "deletion", "deletion_at_peak"])
    facts = metadata("tiny_embed")
    harness.write(
        "sfam",
        "cpu",
        rows,
        options.out,
        harness.QUALITY_KEYS,
        measure="share of maps that peak on the shared digit (mean), mean cosine while channels go (deletion)",
        command=f"{COMMAND} --pairs {options.pairs}",
        model={key: float(facts[key]) for key in ("recall1", "chance", "mean_ap", "test_scenes")},
    )
    if options.picture:
        draw(options.picture)


if __name__ == "__main__":
    main()
