"""Plots: the same bytes for the same numbers, every label there, and the committed pictures fresh."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib")

from fastcam.profiling.plots import Panel, Point, Series, growth, roofline  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def test_roofline_numbers_points_and_shows_the_roofs():
    points = [
        Point("forward", 10.0, 20.0, "network"),
        Point("cam_map", 0.5, 4.0, "op"),
        Point("twin", 0.5, 4.0, "op"),
        Point("near", 0.55, 4.4, "op"),  # numbers side by side would run into one another
        Point("apart", 0.5, 6.0, "op"),
        Point("nothing", 0.0, 0.0, "op"),  # has no place on a log scale
    ]
    svg = roofline(points, bandwidth=8.0, peaks={"fp32": 32.0})
    assert svg == roofline(points, bandwidth=8.0, peaks={"fp32": 32.0})
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    for text in (
        "1 forward: 20",
        "2 cam_map: 4",
        "3 twin: 4",
        "4 near: 4.4",
        "2, 3, 4",
        "5",
        "copy, 8 GB/s",
        "fp32 matrix product, 32 GFLOP/s",
    ):
        assert text in [" ".join(one.split()) for one in texts], texts
    assert "nothing" not in svg


def test_growth_has_one_legend_and_a_colour_a_subject():
    plain = Series("plain", [(1, 1.0), (2, 2.0)], dashed=True)
    a, b = Series("a", [(1, 5.0), (2, 7.0)]), Series("b", [(1, 3.0), (2, 3.0)])
    panels = [
        Panel("time", "batch", "ms", [plain, b]),
        Panel("memory", "batch", "MiB", [a, b], guide=1),
    ]
    svg = growth(panels)
    assert svg == growth(panels)
    assert "<!--" not in svg[:5]
    texts = [" ".join(one.split()) for one in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    for label in ("plain", "a", "b", "in proportion"):
        assert texts.count(label) == 1
    assert {"time", "memory", "ms", "MiB"} <= set(texts)


@pytest.mark.parametrize(
    "draw", [lambda: roofline([], 8.0, {"fp32": 32.0}), lambda: growth([Panel("a", "b", "c", [])])]
)
def test_without_matplotlib_the_cure_is_named(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib .*pip install 'fastcam\[viz\]'$"):
        draw()


def test_committed_pictures_are_those_of_the_committed_results():
    wanted = re.search(r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    if matplotlib.__version__ != wanted:
        pytest.skip(f"drawn with matplotlib {wanted}")
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "plots.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
