"""How near a job comes to the rate of the slowest thing in it: ResNet-18, lift_cam, 224 x 224, one store a run.

    python -P benchmarks/jobs/bench_throughput.py [--rounds 5] [--images 256] [--only "jpeg 3000"]

Row `decoded`: inputs in memory. `ratio` is the job's images/s over those of a bare loop `model(batch)` under
`inference_mode` in batches of 32, all threads, one decode thread beside them.
Rows `jpeg W x H`: JPEG files of that size, prepared as ImageNet networks take them (shorter side to 256, crop 224);
small ones, where the network is the slower part, and those of a camera, where decoding is. `ratio` is the job's rate
over that of the slower of: decoding alone with the same number of workers, and the forward loop alone with the same
threads. Cores are shared out: one decodes, the others compute. Goal 0.9.

The rate of a job runs from its first image to its last shard on the disk, syncs included; tracing the network before
that is not in it. Rows hold the median over rounds in which the loops take turns. Correctness first: stored maps equal
`fastcam.attribute`'s to float16's rounding, or there is no ratio. Runs with `--only` at one commit add to the file.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam import jobs
from fastcam._testing.models import torchvision_models
from fastcam.jobs.sources import open_source
from fastcam.models import load_model

KEYS = ("name", "ratio", "ratios", "rates", "workers", "threads", "images", "batch", "match")
BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision_models().resnet18(weights=None).eval()


#: Row -> (width, height of the files, batch). Batches are small where decoding is slow: what the network does with the
#: last one overlaps with nothing, which a run of a few seconds shows and one of hours does not.
JPEGS = {"jpeg 500 x 375": (500, 375, BATCH), "jpeg 3000 x 2250": (3000, 2250, 16)}
DIFFERENT = 16


def photographs(folder: Path, count: int, width: int, height: int) -> None:
    """Crops of the two photographs of scikit-learn with a sensor's noise; names of DIFFERENT pictures."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    chance = np.random.default_rng(0)
    for index in range(min(count, DIFFERENT)):
        top, left = chance.integers(427 - 375), chance.integers(640 - 500)
        crop = Image.fromarray(pictures[index % len(pictures)][top : top + 375, left : left + 500])
        pixels = np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))
        noisy = pixels + chance.normal(0, 3, pixels.shape).astype(np.float32)
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(folder / f"{index:05d}.jpg", quality=90)
    for index in range(DIFFERENT, count):
        os.link(folder / f"{index % DIFFERENT:05d}.jpg", folder / f"{index:05d}.jpg")


def forward(model: torch.nn.Module, images: Tensor) -> Callable[[], float]:
    def rate() -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            for batch in images.split(BATCH):
                model(batch)
        return len(images) / (time.perf_counter() - begin)

    return rate


def decoding(source: Any, prepare: Any, workers: int) -> Callable[[], float]:
    def load(index: int) -> None:
        prepare(source.load(index).image)

    def rate() -> float:
        with ThreadPoolExecutor(workers) as pool:
            begin = time.perf_counter()
            list(pool.map(load, range(len(source))))
            return len(source) / (time.perf_counter() - begin)

    return rate


def job(
    model: torch.nn.Module, images: Any, folder: Path, workers: int, batch: int, **options: Any
) -> Callable[[], float]:
    number = iter(range(1000))

    def rate() -> float:
        out = folder / f"{next(number)}.zarr"
        return jobs.run(model, images, out, workers=workers, batch_size=batch, **options).rate

    return rate


def turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    for name, call in calls.items():
        if name != "job":  # which has run for the check
            call()
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            rates[name].append(call())
    return rates


def row(name: str, rates: dict[str, list[float]], match: bool, **more: Any) -> dict[str, Any]:
    """`ratio` is the median over rounds of the job's rate over that of the slower part (`of`) in the same round."""
    slower = min((part for part in rates if part != "job"), key=lambda part: median(rates[part]))
    ratios = [mine / other for mine, other in zip(rates["job"], rates[slower], strict=True)]
    middle = {key: median(values) for key, values in rates.items()}
    print(
        f"{name}: {median(ratios):.3f} of {slower} ({', '.join(f'{k} {v:.1f}/s' for k, v in middle.items())})",
        flush=True,
    )
    low, _, high = quantiles(ratios, n=4)
    return {
        "name": name,
        "ratio": median(ratios) if match else None,
        "iqr": high - low,
        "of": slower,
        "ratios": ratios if match else None,
        "rates": middle,
        "match": match,
        **more,
    }


def check(store: Path, model: torch.nn.Module, images: Tensor) -> bool:
    raw = fastcam.attribute(model, images[:16], size="layer").raw
    held = jobs.Store(store)
    worst = max(float((held.raw(i) - raw[i]).abs().max() / raw[i].abs().max()) for i in range(16))
    return worst <= 2.0**-11 * 1.01


def decoded(count: int, rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model, images = network(), torch.randn((count, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    calls = {"job": job(model, images, folder, 1, BATCH), "forward": forward(model, images)}
    calls["job"]()
    match = check(folder / "0.zarr", model, images)
    return row("decoded", turns(calls, rounds), match, workers=1, threads=threads, images=count, batch=BATCH)


def jpeg(name: str, count: int, rounds: int, cores: int, folder: Path) -> dict[str, Any]:
    width, height, batch = JPEGS[name]
    threads, workers = max(1, cores - 1), 1
    torch.set_num_threads(threads)
    (folder / "photos").mkdir()
    photographs(folder / "photos", count, width, height)
    options = {"image_size": 224, "crop": 0.875, "mean": MEAN, "std": STD}
    model = network()
    loaded, source = load_model(model, **options), open_source(folder / "photos")
    prepared = torch.stack([loaded.prepare(source.load(index % DIFFERENT).image) for index in range(count)])
    calls = {
        "job": job(model, folder / "photos", folder, workers, batch, **options),
        "decode": decoding(source, loaded.prepare, workers),
        "forward": forward(model, prepared),
    }
    calls["job"]()
    match = check(folder / "0.zarr", model, prepared)
    return row(name, turns(calls, rounds), match, workers=workers, threads=threads, images=count, batch=batch)


def main() -> None:
    harness.keep_heap()
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=5)
    parser.add_argument("--images", type=int, default=256, help="images a run (default: 256)")
    options = parser.parse_args()
    rows = []
    suite = {"decoded": decoded} | {name: partial(jpeg, name) for name in JPEGS}
    for name, measure in suite.items():
        if options.only in name:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(options.images, options.rounds, options.threads, Path(folder)))
    torch.set_num_threads(options.threads)
    command = f"python -P benchmarks/jobs/bench_throughput.py --rounds {options.rounds} --images {options.images}"
    harness.write("jobs", "cpu", rows, options.out, KEYS, parts=True, command=command)


if __name__ == "__main__":
    main()
