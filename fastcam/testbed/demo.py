"""The demo: every method on both testbed models, as a table of pointing accuracy and cost, and as a picture.

The maps of the table are made by a job for each method, whose stores stay in the output folder: a second run finds them
there and explains nothing again."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastcam
from fastcam import jobs, render
from fastcam.jobs.sources import Item

from .models import MODELS, load, normalize
from .pointing import pointing_accuracy
from .scenes import GENERATOR_VERSION, Scenes, make_scenes

__all__ = ["Report", "Row", "draw", "measure", "run", "table"]

TIMED_IMAGES = 16
PICTURE_SCENES = {"tiny_resnet": (4, 44), "tiny_vgg": (54, 33)}
"""Test scenes in the picture, chosen by looks before any map was seen, on photographs in the public domain or CC0."""

PICTURE_METHODS = (
    *("lift_cam", "a_fmi", "cam", "grad_cam", "layer_cam"),
    *("relevance_cam", "attribution_equilibrium", "lrp", "deep_lift"),
)

ON_REQUEST = ("score_cam", "ss_cam", "is_cam")
"""Methods that run the whole network for every feature map: minutes here, so only where they are named."""


@dataclass(frozen=True)
class Row:
    """A method on a model; pointing in [0,1], milliseconds an image, multiple of the plain forward pass.

    reason says why the method does not apply to the model; the figures are then NaN. explained counts the images whose
    maps were not there yet.
    """

    model: str
    method: str
    pointing: float
    milliseconds: float
    multiple: float
    backend: str
    reason: str = ""
    explained: int = 0


@dataclass(frozen=True)
class SceneSource:
    """Scenes as a job's images, with both digits of each as its labels."""

    scenes: Scenes
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.scenes)

    def key(self, index: int) -> str:
        return f"scene-{index}"

    def label(self, index: int) -> list[int]:
        digits: list[int] = self.scenes.labels[index].tolist()
        return digits

    def load(self, index: int) -> Item:
        image = normalize(self.scenes.images[index])
        return Item(image, hashlib.sha256(image.numpy()).hexdigest()[:32])

    def describe(self) -> dict[str, Any]:
        return {"kind": "testbed scenes", "generator": GENERATOR_VERSION, "items": len(self.scenes)}


@dataclass(frozen=True)
class Report:
    """The demo's outcome: table as text, its rows, and the picture's path."""

    text: str
    rows: list[Row]
    picture: Path


def run(
    *, images: int = 200, out: str | Path = "fastcam-demo", model: str = "both", methods: Sequence[str] | None = None
) -> Report:
    """Measures `methods` (by default all but ON_REQUEST) on held-out scenes, draws the picture into `out`.

    Errors: ValueError for an unknown model or method or fewer than one image; ImportError with the command that
    installs what the testbed, the stores or the picture need; JobError where a store in `out` is another's or the disk
    is full. Cost: on two cores one to two minutes for all methods.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    names = list(MODELS) if model == "both" else [model]
    usual = [
        name for name, facts in fastcam.methods().items() if facts["explains"] == "images" and name not in ON_REQUEST
    ]
    chosen = usual if methods is None else list(methods)
    models = {name: load(name) for name in names}
    scenes = make_scenes(images)
    stores = Path(out) / f"maps-{images}"
    rows = [row for name in names for row in measure(name, models[name], scenes, chosen, stores)]
    picture = draw(models, [name for name in PICTURE_METHODS if name in chosen] or chosen[:8], Path(out) / "demo.png")
    text = f"{table(rows, scenes)}\nmaps: {stores}/, {sum(row.explained for row in rows)} explained in this run"
    return Report(text, rows, picture)


def measure(name: str, model: nn.Module, scenes: Scenes, methods: Sequence[str], stores: Path) -> list[Row]:
    """A row a method: pointing accuracy over every (image, digit), from the method's store in the folder `stores`; then
    times for both digits' maps at image size.
    """
    inputs = normalize(scenes.images)
    part, targets = inputs[:TIMED_IMAGES], scenes.labels[:TIMED_IMAGES]

    def forward() -> None:
        with torch.inference_mode():
            model(part)

    with torch.inference_mode():
        expected = model(inputs)
    nan, backend = float("nan"), _backend()
    rows = []
    for method in methods:
        out = stores / f"{name}-{method}.zarr"
        try:
            job = _explained(model, scenes, method, out)
        except jobs.JobError as error:
            if out.exists() or not error.usage:
                raise
            rows.append(Row(name, method, nan, nan, nan, "", str(error)))
            continue
        store, explainer = jobs.Store(out), fastcam.Explainer(model, method)
        torch.testing.assert_close(torch.from_numpy(store.scores), expected, rtol=1e-3, atol=1e-3)
        seconds, multiple = _alternate(forward, lambda explainer=explainer: explainer(part, targets))  # type: ignore[misc]
        pointing = pointing_accuracy(store.maps(0, len(store), "input"), scenes.masks)
        figures = (pointing, 1e3 * seconds / len(part), multiple, backend)
        rows.append(Row(name, method, *figures, explained=job.processed))
    return rows


def _explained(model: nn.Module, scenes: Scenes, method: str, out: Path) -> jobs.Summary:
    """The method's maps in the store `out`, gone on with; one of the demo's own that no longer fits is replaced."""
    given: dict[str, Any] = {"method": method, "targets": "labels", "workers": 1, "resume": True}
    source = SceneSource(scenes)
    try:
        return jobs.run(model, source, out, **given)
    except jobs.JobError as error:
        own = (
            error.usage
            and out.exists()
            and jobs.Store(out).provenance["source"].get("kind") == source.describe()["kind"]
        )
        if not own:
            raise
    shutil.rmtree(out)
    return jobs.run(model, source, out, **given)


def table(rows: Sequence[Row], scenes: Scenes) -> str:
    """The rows as text, below them what a random pixel would score and why a method did not apply."""
    lines = [f"{'model':<12} {'method':<23} {'pointing':>8} {'ms/image':>9} {'x forward':>10}  backend"]
    reasons = list(dict.fromkeys(row.reason for row in rows if row.reason))
    for row in rows:
        if row.reason:
            figures = f"{'-':>8} {'-':>9} {'-':>10}  ({reasons.index(row.reason) + 1})"
        else:
            figures = f"{row.pointing:8.3f} {row.milliseconds:9.2f} {row.multiple:10.2f}  {row.backend}"
        lines.append(f"{row.model:<12} {row.method:<23} {figures}")
    chance = scenes.masks.double().mean().item()
    lines += [
        "",
        f"pointing: fraction of {2 * len(scenes)} (image, digit) pairs whose map peaks on the digit; "
        f"a random pixel gets {chance:.3f}",
        f"cost: both digits' maps at image size, {min(TIMED_IMAGES, len(scenes))} images a batch, "
        f"{torch.get_num_threads()} threads, medians, alternating with the plain forward pass",
    ]
    lines += [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines)


def draw(models: dict[str, nn.Module], methods: Sequence[str], path: Path, *, cell: int = 100) -> Path:
    """The panel: scenes, their masks, and each method's map for each digit, with a ring at the map's peak."""
    groups = [
        _group(name, model, index, methods, cell) for name, model in models.items() for index in PICTURE_SCENES[name]
    ]
    note = "p: the model's probability of the digit. Ring: the map's peak, white on the digit, magenta beside it."
    return render.panel(groups, path, columns=["mask", *methods], note=note, cell=cell)


def _group(name: str, model: nn.Module, index: int, methods: Sequence[str], cell: int) -> render.Group:
    scenes = make_scenes(1, start=index)
    image = functional.interpolate(scenes.images, (cell, cell), mode="bicubic", antialias=True).clamp(0, 1)
    masks = functional.interpolate(scenes.masks.float(), (cell, cell), mode="bilinear")[0] > 0.5
    pixels = render.to_pixels(image)[0]
    inputs = normalize(scenes.images)
    cells: list[list[Tensor | str]] = [[render.outline(pixels, mask)] for mask in masks]
    for method in methods:
        try:
            maps = fastcam.attribute(model, inputs, method, targets=scenes.labels, size=(cell, cell)).maps[0]
        except ValueError:
            for row in cells:
                row.append("not for\nthis head")
            continue
        for row, attribution, mask in zip(cells, maps, masks, strict=True):
            row.append(_cell(image[0], attribution, mask))
    with torch.inference_mode():
        probabilities = model(inputs)[0].sigmoid()[scenes.labels[0]].tolist()
    labels = [f"{digit}\np {p:.2f}" for digit, p in zip(scenes.labels[0].tolist(), probabilities, strict=True)]
    return render.Group(render.to_pixels(scenes.images[0]), name, list(zip(labels, cells, strict=True)))


def _cell(image: Tensor, attribution: Tensor, mask: Tensor) -> Tensor:
    signed = bool(attribution.min() < 0)
    pixels = render.overlay(image, attribution, "coolwarm" if signed else "turbo")
    row, column = divmod(int(attribution.argmax()), attribution.shape[1])
    return render.ring(pixels, row, column, colour=(255, 255, 255) if mask[row, column] else (255, 0, 200))


def _alternate(plain: Callable[[], object], full: Callable[[], object], *, budget: float = 0.5) -> tuple[float, float]:
    """Median seconds of `full`, and median over rounds of full / plain, each round one call of both after a warm-up.

    At least 3 rounds, at most 25, about `budget` seconds.
    """
    plain(), full()
    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(times) < 3 or (len(times) < 25 and time.perf_counter() - begin < budget):
        start = time.perf_counter()
        plain()
        between = time.perf_counter()
        full()
        times.append((between - start, time.perf_counter() - between))
    return median(second for _, second in times), median(second / first for first, second in times)


def _backend() -> str:
    """The backend in force for the maps of CPU images."""
    facts = fastcam.backends()
    return str(facts["ops"]["cam_map"]["cpu"]["auto"] if facts["chosen"] == "auto" else facts["chosen"])
