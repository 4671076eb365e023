"""Plots of a profile as SVG: roofline, and growth of cost. Needs matplotlib (extra `viz`).

The same input gives the same bytes: no dates, fixed identifiers, text as text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "Panel", "Point", "Series", "growth", "roofline"]

COLOURS = ("#2563a8", "#d1662a", "#2f8f5b", "#8b4bab", "#b8892b", "#b23a5b", "#3a9aa8", "#6b6b6b")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastcam",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Point:
    """Work done at an intensity: label, FLOPs a byte, GFLOP/s, and what kind of thing it is (one marker a kind)."""

    label: str
    intensity: float
    gflops: float
    kind: str


@dataclass(frozen=True)
class Series:
    """A line: label and (x, y) pairs in order of x; `dashed` for what others are held against."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot; `guide` adds a grey line that grows as x to that power, 0 none."""

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    guide: int = 0


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(f"the report's plots need matplotlib ({error}): pip install 'fastcam[viz]'") from error
    return mpl


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    return re.sub(r"[ \t]+$", "", svg[svg.index("<svg") :], flags=re.MULTILINE)


def roofline(points: Sequence[Point], bandwidth: float, peaks: Mapping[str, float]) -> str:
    """GFLOP/s over FLOPs a byte, below min(peak, bandwidth x intensity).

    bandwidth  measured, GB/s;  peaks  GFLOP/s of matrix products by precision, measured
    """
    with _matplotlib().rc_context(_STYLE):
        shown = [p for p in points if p.intensity > 0 and p.gflops > 0]
        lines = max(20, len(shown))
        figure = _figure(10.4, 0.8 + 0.2 * lines)
        axes = figure.subplots()
        low = min([p.intensity for p in shown] + [0.1]) / 2
        high = max([p.intensity for p in shown] + [max(peaks.values()) / bandwidth]) * 3
        for number, (name, peak) in enumerate(peaks.items()):
            knee = peak / bandwidth
            style: Any = {"color": "#444", "linewidth": 1.4, "linestyle": ("-", "--", ":")[number % 3]}
            axes.plot([low, knee, high], [low * bandwidth, peak, peak], **style)
            axes.annotate(
                f"{name} matrix product, {peak:.0f} GFLOP/s", (high, peak), (0, 4), textcoords="offset points",
                ha="right", color="#444", fontsize=8,
            )  # fmt: skip
        axes.annotate(
            f"copy, {bandwidth:.0f} GB/s", (low * 1.3, low * 1.3 * bandwidth), (0, 10), textcoords="offset points",
            color="#444", fontsize=8, rotation=28,
        )  # fmt: skip
        kinds = list(dict.fromkeys(p.kind for p in shown))
        for kind in kinds:
            some = [p for p in shown if p.kind == kind]
            look: Any = {"marker": _MARKERS[kinds.index(kind) % len(_MARKERS)], "color": COLOURS[kinds.index(kind) % 8]}
            axes.scatter([p.intensity for p in some], [p.gflops for p in some], s=34, label=kind, zorder=3, **look)
        ordered = [point for kind in kinds for point in shown if point.kind == kind]
        for numbers, point in _gathered(ordered):
            axes.annotate(
                numbers, (point.intensity, point.gflops), (5, 3), textcoords="offset points", fontsize=8, color="#222"
            )
        axes.text(1.03, 1.01, "GFLOP/s reached", color="#444", fontsize=8, transform=axes.transAxes)
        for number, point in enumerate(ordered, 1):
            colour = COLOURS[kinds.index(point.kind) % 8]
            text = f"{number}  {point.label}: {point.gflops:.3g}"
            axes.text(1.03, 1 - (number - 0.5) / lines, text, color=colour, fontsize=8, transform=axes.transAxes)
        axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte moved", ylabel="GFLOP/s", xlim=(low, high))
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        return _svg(figure)


def _gathered(points: Sequence[Point]) -> list[tuple[str, Point]]:
    """Numbers of points, from 1, those that would lie on one another together."""
    found: list[tuple[list[int], Point]] = []
    for number, point in enumerate(points, 1):
        for numbers, first in found:
            if all(abs(math.log10(a / b)) < 0.08 for a, b in zip(_place(point), _place(first), strict=True)):
                numbers.append(number)
                break
        else:
            found.append(([number], point))
    return [(", ".join(map(str, numbers)), first) for numbers, first in found]


def _place(point: Point) -> tuple[float, float]:
    return point.intensity, point.gflops


def growth(panels: Sequence[Panel], columns: int | None = None) -> str:
    """Panels of lines, log-log, side by side in `columns` (None: one row), with one legend below."""
    across = columns or len(panels)
    down = -(-len(panels) // across)
    with _matplotlib().rc_context(_STYLE):
        figure = _figure(max(4.3, 3.9 * across), 0.5 + 2.9 * down)
        grid = figure.subplots(down, across, squeeze=False).flat
        names = list(dict.fromkeys(line.label for panel in panels for line in panel.series if not line.dashed))
        labels: dict[str, Any] = {}
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel, names)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                labels.setdefault(label, handle)
        for axes in list(grid)[len(panels) :]:
            axes.remove()
        place: Any = {"loc": "outside lower center", "ncols": min(2 * across, len(labels))}
        figure.legend(list(labels.values()), list(labels), frameon=False, fontsize=8, **place)
        return _svg(figure)


def _draw(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator

    ticks = sorted({x for line in panel.series for x, _ in line.points})
    for line in panel.series:
        look: dict[str, Any] = {"color": "#222", "linestyle": "--"}
        if not line.dashed:
            number = names.index(line.label)
            look = {"color": COLOURS[number % 8], "marker": _MARKERS[number % 8], "markersize": 4}
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        axes.plot(xs, ys, label=line.label, linewidth=1.5, **look)
    if panel.guide and len(ticks) > 1:
        start = min(line.points[0][1] for line in panel.series if line.points) * 0.6
        end = start * (ticks[-1] / ticks[0]) ** panel.guide
        axes.plot([ticks[0], ticks[-1]], [start, end], color="#bbb", linewidth=1, label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
