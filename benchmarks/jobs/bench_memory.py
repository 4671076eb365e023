"""Resident memory of a job over 20,000 JPEG files: what it grows by after the first 1,000.

    python -P benchmarks/jobs/bench_memory.py [--images 20000]

A small network (the testbed's, 64 x 64 pixels), so that the figure is the pipeline's and the store's own. The files are
names of 500 pictures. `growth_mib` is the most that was resident later over what was when item 1,000 was durable.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness
from PIL import Image

from fastcam.jobs import job as running
from fastcam.jobs.options import Options
from fastcam.testbed.models import load

KEYS = ("name", "images", "growth_mib", "at_1000_mib", "largest_mib")
PICTURES = 500


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def pictures(folder: Path, count: int) -> None:
    chance = torch.Generator().manual_seed(0)
    for index in range(PICTURES):
        small = torch.randint(0, 256, (8, 8, 3), generator=chance, dtype=torch.uint8)
        Image.fromarray(small.numpy()).resize((80, 80)).save(folder / f"{index:05d}.jpg")
    for index in range(PICTURES, count):
        os.link(folder / f"{index % PICTURES:05d}.jpg", folder / f"{index:05d}.jpg")


def measure(count: int, folder: Path) -> dict[str, Any]:
    photos = folder / "photos"
    photos.mkdir()
    pictures(photos, count)
    options = Options(
        load("tiny_resnet"), photos, folder / "a.zarr", image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3, workers=2
    )
    samples: list[tuple[int, float]] = []

    class Watched(running.Meter):
        def add(self, done: int, failed: int) -> None:
            super().add(done, failed)
            samples.append((self.processed, resident_mib()))

    running.Meter = Watched  # type: ignore[misc]
    with running.Job(options) as job:
        summary = running.execute(job)
    first = next(size for processed, size in samples if processed >= 1000)
    largest = max(size for processed, size in samples if processed >= 1000)
    assert summary.done == count, summary
    return {
        "name": "jpeg files",
        "images": count,
        "growth_mib": largest - first,
        "at_1000_mib": first,
        "largest_mib": largest,
    }


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="images (default: 20000)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.images, Path(folder))
    print(f"{found['images']} images: {found['growth_mib']:.1f} MiB beyond the first 1,000")
    harness.write("jobs_memory", "cpu", [found], options.out, KEYS)


if __name__ == "__main__":
    main()
