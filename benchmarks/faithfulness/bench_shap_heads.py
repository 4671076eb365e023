"""Which heads LIFT-CAM is nearest to SHAP for: the same 12 maps under heads trained with and without dropout.

    python -P benchmarks/faithfulness/bench_shap_heads.py [--images 100] [--scenes 12800] [--seeds 3] [--block NAME]

Maps, yardstick and coefficients are those of bench_shap.py: the 12 maps of the testbed's `tiny_vgg`, all 4096
coalitions. The trunk stays as it is; heads are trained here, from seeds 0, 1, ..., on the maps of the training scenes
that follow those the network itself was trained on, each seen four times: 51,200 images, where the network had 44,800.
Loss, optimiser, weight decay and schedule are those of `fastcam/testbed/train.py`, at a batch of 128. Blocks:

  shipped                        the network's own head: one hidden layer of 64, trained without dropout
  shipped, a digit that is there, shipped, second logit    the same head, another logit than the highest
  64, 64-64, 256-256             one hidden layer of 64; two of 64 or 256, as VGG's classifier has two, wider than the
                                 classes are many
  dropout                        of 0.5 behind every hidden layer, as VGG's classifier is trained
  max-pool                       of 2 x 2 before the head, as VGG has one and tiny_vgg has not
  4 x as long                    each scene seen 16 times

Means run over the images under all seeds' heads; standard errors take each pair of an image and a head for independent,
which pairs of one image are not quite. `top2` in the metadata: share of the images whose two highest logits are their
two digits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import _harness as harness
import bench_shap as shap

from fastcam.testbed import load, make_scenes, normalize
from fastcam.testbed.train import Recipe

MAPS, SIDE, CLASSES = 12, 12, 10
BATCH = 128
RATE = 2e-3


class Kind(NamedTuple):
    """A head: widths of its hidden layers, dropout behind each, whether a max-pool comes first, passes in training."""

    widths: tuple[int, ...]
    dropout: float = 0.0
    pool: bool = False
    epochs: int = 4


KINDS = {
    "64, dropout": Kind((64,), 0.5),
    "64-64, dropout": Kind((64, 64), 0.5),
    "256-256": Kind((256, 256)),
    "256-256, dropout": Kind((256, 256), 0.5),
    "max-pool, 256-256": Kind((256, 256), pool=True),
    "max-pool, 256-256, dropout": Kind((256, 256), 0.5, pool=True),
    "256-256, dropout, 4 x as long": Kind((256, 256), 0.5, epochs=16),
}


def maps_of(count: int, split: str, start: int) -> tuple[Tensor, Tensor]:
    """Maps (n, 12, 12, 12) of scenes by tiny_vgg, and which digits are there (n, 2)."""
    trunk = load("tiny_vgg").features.to(memory_format=torch.channels_last)
    maps, labels = [], []
    for first in range(start, start + count, BATCH):
        scenes = make_scenes(min(BATCH, start + count - first), split=split, seed=0, start=first, region="strokes")
        with torch.no_grad():
            maps.append(trunk(normalize(scenes.images)).contiguous())
        labels.append(scenes.labels)
    return torch.cat(maps), torch.cat(labels)


def build(kind: Kind) -> nn.Sequential:
    """`features`, which passes maps on, and the head behind it."""
    inputs = MAPS * (SIDE // 2 if kind.pool else SIDE) ** 2
    layers: list[nn.Module] = [*([nn.MaxPool2d(2)] if kind.pool else []), nn.Flatten()]
    for width in kind.widths:
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(kind.dropout)]
        inputs = width
    model = nn.Sequential()
    model.add_module("features", nn.ReLU())
    model.add_module("head", nn.Sequential(*layers, nn.Linear(inputs, CLASSES)))
    return model


def trained(kind: Kind, maps: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    """A head in eval mode, trained on maps (n, 12, 12, 12) to tell which digits (n, 2) are there."""
    truth = torch.zeros(len(labels), CLASSES).scatter_(1, labels, 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(kind)
        steps = kind.epochs * (len(maps) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=Recipe.decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
        for _ in range(kind.epochs):
            for some in torch.randperm(len(maps)).split(BATCH)[: len(maps) // BATCH]:
                loss = functional.binary_cross_entropy_with_logits(model(maps[some]), truth[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def shipped() -> nn.Sequential:
    network = load("tiny_vgg")
    model = build(Kind((64,)))
    state = {"head.1.weight": network.fc1.weight, "head.1.bias": network.fc1.bias}
    model.load_state_dict(state | {"head.4.weight": network.fc2.weight, "head.4.bias": network.fc2.bias})
    return model.eval()


def top2(model: nn.Module, maps: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        best = model(maps).topk(2).indices.sort().values
    return float((best == labels.sort().values).all(1).double().mean())


def drawn(model: nn.Module, maps: Tensor, targets: Tensor | None = None) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """SHAP values and other coefficients of a head on maps, a batch at a time."""
    for some in torch.arange(len(maps)).split(shap.BATCH):
        chosen = None if targets is None else targets[some]
        found = shap.Coefficients(model, "features", targets=lambda _, chosen=chosen: chosen)
        yield found.shap(maps[some]), found.others(maps[some])


def block(name: str, models: list[nn.Module], maps: Tensor, targets: Tensor | None = None) -> list[dict[str, Any]]:
    """Rows of one block, the last the paired difference of LIFT-CAM's and Ablation-CAM's cosines."""
    parts = [shap.cosines(drawn(model, maps, targets)) for model in models]
    values = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    gap = "lift_cam less ablation drop"
    found = {**values, gap: values["lift_cam"] - values["ablation drop"]}
    print(name, {key: round(float(value.mean()), 4) for key, value in found.items()}, flush=True)
    return [shap.row(f"{name}: {key}", value) for key, value in found.items()]


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="held-out scenes (default: 100)")
    parser.add_argument("--scenes", type=int, default=12_800, help="training scenes (default: 12800)")
    parser.add_argument("--seeds", type=int, default=3, help="heads of each kind (default: 3)")
    parser.add_argument(
        "--block", choices=["shipped", *KINDS], action="append", help="these blocks alone; may be repeated"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = options.block or ["shipped", *KINDS]
    images, labels = maps_of(options.images, "test", 0)
    models: dict[str, list[nn.Module]] = {"shipped": [shipped()]} if "shipped" in wanted else {}
    kinds = {name: kind for name, kind in KINDS.items() if name in wanted}
    if kinds:
        maps, digits = maps_of(options.scenes, "train", Recipe.close_ups + Recipe.scenes)
        for name, kind in kinds.items():
            models[name] = [trained(kind, maps, digits, seed) for seed in range(options.seeds)]
    found = {name: block(name, heads, images) for name, heads in models.items()}
    if "shipped" in models:
        (own,) = models["shipped"]
        with torch.no_grad():
            second = own(images).topk(2).indices[:, 1]
        for name, targets in (("a digit that is there", labels[:, 0]), ("second logit", second)):
            found[f"shipped, {name}"] = block(f"shipped, {name}", [own], images, targets)
    everything = [row for part in found.values() for row in part]
    harness.table(everything, ["name", "mean", "standard_error", "lowest", "n"])
    path = harness.write(
        "shap_heads",
        "cpu",
        everything,
        options.out,
        harness.QUALITY_KEYS,
        parts=options.block is not None,
        measure="cosine to SHAP values",
        command=f"python -P benchmarks/faithfulness/bench_shap_heads.py --images {options.images} --scenes "
        f"{options.scenes} --seeds {options.seeds}",
        **{f"top2, {name}": [top2(model, images, labels) for model in heads] for name, heads in models.items()},
    )
    print({name: shap.ordered(name, part) for name, part in found.items()}, path)


if __name__ == "__main__":
    main()
