"""LFI-CAM beside an attention branch network and Grad-CAM: accuracy, stability and pointing, from scratch.

    python -P benchmarks/faithfulness/bench_lfi_cam.py [--work runs] [--images 4000] [--epochs 12] [--picture FILE]

Task: close-ups of the testbed's digits, 32 x 32 pixels, ten classes. Three networks with the same ResNet-8 backbone
(64 maps of 8 x 8), each trained five times: seeds 0, 1, 2; half the rate; five times the weight decay. A run in FOLDER
is gone on with.

  plain    backbone, average pool, linear; its maps are Grad-CAM's
  lfi_cam  fastcam.nn.LFICAM; its maps are its attention, or Grad-CAM's
  abn      attention branch network (Fukui et al. 2019) of equal size: a branch of four 3 x 3 convolutions with its own
           classification loss gives a sigmoid attention map, which multiplies the features as 1 + A

Rows, on 2000 held-out close-ups: accuracy of each network (mean over the three seeds, and its standard error);
stability of each kind of map, the intersection over union of {map > 100/255} between models, averaged over images and
the ten pairs of the five settings (and by the released script's formula); pointing, the share of maps whose highest
pixel lies on the digit (mean over the three seeds).

Correctness first: LFICAM's outputs must equal the formulas in float64 within 1e-10. No times are measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam import render
from fastcam.metrics import map_stability
from fastcam.nn import LFICAM, resnet
from fastcam.nn.data import digits
from fastcam.nn.train import Recipe, evaluate, train
from fastcam.testbed import MEAN, STD, pointing_hits

COMMAND = "python -P benchmarks/faithfulness/bench_lfi_cam.py --work runs"
SETTINGS: dict[str, dict[str, Any]] = {
    "seed 0": {"seed": 0},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "half the rate": {"seed": 3, "rate": 0.05},
    "five times the decay": {"seed": 4, "decay": 5e-4},
}
SEEDS = 3


class BranchOutput(NamedTuple):
    logits: Tensor
    attention: Tensor
    branch: Tensor


class AttentionBranchNetwork(nn.Module):
    """Fukui et al., CVPR 2019, with a branch as large as LFI-CAM's on the last feature maps."""

    def __init__(self, backbone: nn.Module, channels: int, classes: int):
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        self.branch = nn.Sequential(
            *layers, nn.Conv2d(channels, classes, 1, bias=False), nn.BatchNorm2d(classes), nn.ReLU()
        )
        self.to_scores = nn.Conv2d(classes, classes, 1)
        self.to_map = nn.Sequential(nn.Conv2d(classes, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.Sigmoid())
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> BranchOutput:
        features = self.backbone(images)
        classes = self.branch(features)
        attention = self.to_map(classes)
        logits = self.fc(((1 + attention) * features).mean((2, 3)))
        return BranchOutput(logits, attention, self.to_scores(classes).mean((2, 3)))


class Plain(nn.Module):
    def __init__(self, backbone: nn.Module, channels: int, classes: int):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images).mean((2, 3)))


NETWORKS = {
    "plain": lambda: Plain(resnet(8), 64, 10),
    "lfi_cam": lambda: LFICAM(resnet(8), 10, channels=64),
    "abn": lambda: AttentionBranchNetwork(resnet(8), 64, 10),
}


def both_losses(output: BranchOutput, labels: Tensor) -> Tensor:
    return functional.cross_entropy(output.logits, labels) + functional.cross_entropy(output.branch, labels)


def recipe_of(epochs: int, **changes: Any) -> Recipe:
    drops = (round(epochs * 0.6), round(epochs * 0.85))
    return Recipe(epochs=epochs, batch=64, drops=drops, augment="crop", mean=MEAN, std=STD, **changes)


def check() -> None:
    torch.manual_seed(0)
    model = LFICAM(resnet(8), 10, channels=64).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    f = model.backbone(images)
    g = functional.interpolate(images.mean(1, keepdim=True), (8, 8), mode="bilinear")
    low, high = f.amin((2, 3), keepdim=True), f.amax((2, 3), keepdim=True)
    n = torch.where(f == 0, 0, torch.where(high > low, (f - low) / (high - low), 1))
    s = model.fin.layers(n * g).mean((2, 3)).softmax(1)
    p = torch.einsum("bk,bkhw->bhw", s, f).relu().unsqueeze(1)
    low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
    a = (p - low) / (high - low)
    logits, attention, _ = model(images)
    torch.testing.assert_close(attention, a, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits, model.fc(((1 + a) * f).mean((2, 3))), rtol=0, atol=1e-10)


def trained(kind: str, setting: str, epochs: int, count: int, work: Path) -> tuple[nn.Module, Recipe]:
    recipe = recipe_of(epochs, **SETTINGS[setting])
    images, _ = digits(count, seed=recipe.seed)
    torch.manual_seed(recipe.seed)
    model = NETWORKS[kind]()
    folder = work / f"{kind}, {setting}"
    train(model, images, recipe, folder, resume=True, loss=both_losses if kind == "abn" else None, note=print)
    return model.eval(), recipe


def maps_of(kind: str, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """(N, 32, 32) maps in [0, 1] by name."""
    found = {}
    if kind != "plain":
        with torch.inference_mode():
            attention = torch.cat([model(part).attention for part in inputs.split(250)]).clone()
        found[kind] = fastcam.ops.cam_map(attention, torch.ones(len(attention), 1), relu=False, size=(32, 32))
    if kind != "abn":
        explainer = fastcam.Explainer(model, "grad_cam", layer="backbone")
        name = "grad_cam" if kind == "plain" else "grad_cam of lfi_cam"
        found[name] = torch.cat([explainer(part).maps for part in inputs.split(250)])
    return found


def entry(name: str, values: list[float], count: int, **more: Any) -> dict[str, Any]:
    each = torch.tensor(values, dtype=torch.float64)
    error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else 0.0
    return {"name": name, "mean": float(each.mean()), "standard_error": error, "n": count, **more}


def measure(work: Path, epochs: int, count: int) -> tuple[list[dict[str, Any]], dict[str, nn.Module]]:
    held, masks = digits(2000, split="test")
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    inputs = (held.images - mean) / std
    rows, first = [], {}
    maps: dict[str, list[Tensor]] = {}
    for kind in NETWORKS:
        scores = []
        for setting in SETTINGS:
            model, recipe = trained(kind, setting, epochs, count, work)
            scores.append(evaluate(model, held, recipe))
            first.setdefault(kind, model)
            for name, found in maps_of(kind, model, inputs).items():
                maps.setdefault(name, []).append(found)
        size = sum(p.numel() for p in first[kind].parameters())
        rows.append(entry(f"accuracy, {kind}", scores[:SEEDS], SEEDS, each=scores, parameters=size))
    for name, found in maps.items():
        stable, spread, left_out = map_stability(torch.stack(found))
        released, _, _ = map_stability(torch.stack(found), mode="released")
        more = {"released": released, "left_out": left_out}
        rows.append({"name": f"stability, {name}", "mean": stable, "standard_error": spread / 10**0.5, "n": 10, **more})
    for name, found in maps.items():
        hits = [float(pointing_hits(each, masks).double().mean()) for each in found]
        rows.append(entry(f"pointing, {name}", hits[:SEEDS], SEEDS, each=hits))
    chance = float(masks.double().mean())
    rows.append(entry("pointing, random", [chance], 1))
    return rows, first


def draw(path: Path, models: dict[str, nn.Module], cell: int = 96) -> None:
    held, masks = digits(12, split="test")
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    inputs = (held.images - mean) / std
    maps: dict[str, Tensor] = {}
    for kind, model in models.items():
        maps |= maps_of(kind, model, inputs)
    groups = []
    for row in range(12):
        pixels = functional.interpolate(held.images[row : row + 1], (cell, cell), mode="bicubic").clamp(0, 1)[0]
        mask = functional.interpolate(masks[row : row + 1, None].float(), (cell, cell), mode="bilinear")[0, 0] > 0.5
        cells = []
        for found in maps.values():
            wide = functional.interpolate(found[row : row + 1, None], (cell, cell), mode="bilinear")[0, 0].clamp(0, 1)
            peak = divmod(int(wide.argmax()), cell)
            colour = (255, 255, 255) if mask[peak] else (255, 0, 200)
            cells.append(render.ring(render.overlay(pixels, wide), *peak, colour=colour))
        groups.append(render.Group(render.to_pixels(pixels), "", [(str(int(held.labels[row])), cells)]))
    note = "Held-out close-ups, networks of seed 0.\nRing: the map's peak, white on the digit, magenta beside it."
    print(render.panel(groups[:6], path, columns=list(maps), note=note, cell=cell))


def main() -> None:
    parser = harness.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--train", default="", help="only train these networks, e.g. lfi_cam,abn")
    parser.add_argument("--weights", type=Path, help="write the first LFI-CAM network here, as safetensors")
    parser.add_argument("--picture", type=Path, help="draw the picture too, to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check()
    if options.train:
        for kind in options.train.split(","):
            for setting in SETTINGS:
                trained(kind, setting, options.epochs, options.images, options.work)
        return
    rows, models = measure(options.work, options.epochs, options.images)
    harness.table(rows, ["name", "mean", "standard_error", "n", "released", "parameters"])
    harness.write(
        "lfi_cam",
        "cpu",
        rows,
        options.out,
        harness.QUALITY_KEYS,
        measure="accuracy, intersection over union between models, share of maps that peak on the digit",
        command=f"{COMMAND} --images {options.images} --epochs {options.epochs}",
    )
    if options.weights:
        from safetensors.torch import save_file

        facts = {
            row["name"]: f"{row['each'][0]:.4f}"
            for row in rows
            if row["name"] in ("accuracy, lfi_cam", "pointing, lfi_cam")
        }
        state = {name: value.contiguous() for name, value in models["lfi_cam"].state_dict().items()}
        save_file(state, options.weights, facts | {"network": "LFICAM(resnet(8), 10)", "command": COMMAND})
    if options.picture:
        draw(options.picture, models)


if __name__ == "__main__":
    main()
