"""Draws the growth of costs from the committed result files into docs/images; `--check` fails when a picture is stale.

python -P benchmarks/plots.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastcam
from fastcam.profiling.plots import Panel, Series, growth

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / fastcam.__version__
IMAGES = ROOT / "docs" / "images"

LABELS = {
    "batch": "images a call",
    "side": "side of the image or feature map, pixels",
    "targets": "targets an image",
    "images": "images in all, 4 a call",
    "channels": "channels",
}


def load(suite: str, device: str = "cpu") -> dict[str, Any]:
    """The newest committed result file of a suite."""
    paths = sorted(RESULTS.glob(f"{suite}--*--{device}.json"), key=lambda path: newest(path))
    if not paths:
        raise SystemExit(f"{suite}: not measured yet (python -P benchmarks/growth/bench_{suite}.py)")
    document: dict[str, Any] = json.loads(paths[-1].read_text())
    return document


def newest(path: Path) -> str:
    return str(json.loads(path.read_text())["metadata"]["time"])


def panels(rows: Sequence[dict[str, Any]], kind: str) -> list[Panel]:
    """A panel an axis. Only rows whose results match; methods beside the plain forward pass, ops beside `copy_`."""
    found = []
    rows = [row for row in rows if row["kind"] == kind and row["match"]]
    for axis in dict.fromkeys(row["axis"] for row in rows):
        some = [row for row in rows if row["axis"] == axis]
        series = []
        for subject in dict.fromkeys(row["subject"] for row in some):
            line = [(float(row["value"]), row["median_us"] / 1e3) for row in some if row["subject"] == subject]
            label = "plain forward pass" if subject == "forward" else subject
            series.append(Series(label, line, dashed=subject == "forward"))
        if kind == "op":
            copies = [
                (row["value"], row["median_us"] * row["pct_copy"] / 1e5) for row in some if row["subject"] == "cam_map"
            ]
            series.append(Series("copy_ of cam_map's bytes", copies, dashed=True))
        found.append(Panel(f"over {axis}", LABELS[axis], "ms", series, guide=2 if axis == "side" else 1))
    return found


def drawings() -> dict[Path, str]:
    rows = load("growth")["results"]
    return {
        IMAGES / "growth-methods.svg": growth(panels(rows, "method"), columns=2),
        IMAGES / "growth-ops.svg": growth(panels(rows, "op"), columns=2),
    }


def main() -> None:
    for path, svg in drawings().items():
        if "--check" not in sys.argv[1:]:
            path.write_text(svg)
            print(f"wrote {path}")
        elif not path.is_file() or path.read_text() != svg:
            raise SystemExit(f"{path.name} is stale: run python -P benchmarks/plots.py")


if __name__ == "__main__":
    main()
