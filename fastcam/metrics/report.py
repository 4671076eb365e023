"""An evaluation as JSON, CSV, markdown and a picture of its curves."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from .evaluate import Evaluation

__all__ = ["as_csv", "as_json", "as_markdown", "draw_curves", "write"]

_ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}


def write(found: Evaluation, folder: str | Path) -> list[Path]:
    """Writes evaluation.json, .csv and .md into `folder`, and curves.png where there are curves; returns the paths.

    Raises ImportError with the command that installs matplotlib where curves are to be drawn without it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, text in (("json", as_json(found)), ("csv", as_csv(found)), ("md", as_markdown(found))):
        paths.append(folder / f"evaluation.{suffix}")
        paths[-1].write_text(text, encoding="utf-8")
    picture = folder / "curves.png"
    if found.curves:
        paths.append(draw_curves(found, picture))
    else:
        picture.unlink(missing_ok=True)  # an earlier evaluation's
    return paths


def as_json(found: Evaluation) -> str:
    """Everything: rows, curves, settings, facts, and the values of every item. What is not finite is null."""
    curves = {
        name: {"fractions": fractions, "mean": mean.mean.tolist(), "standard_error": mean.standard_error.tolist()}
        for name, (fractions, mean) in found.curves.items()
    }
    document = {
        "facts": found.facts,
        "settings": found.settings,
        "results": found.rows(),
        "curves": curves,
        "items": {"ids": found.ids, "values": found.values},
    }
    return json.dumps(_storable(document), indent=1, default=str, ensure_ascii=False) + "\n"


def as_csv(found: Evaluation) -> str:
    """The rows; a header line first, numbers at full precision, "nan" and "inf" as such."""
    rows = found.rows()
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(found: Evaluation) -> str:
    """The rows as a table; an arrow says which direction is better."""
    lines = ["| metric | mean ± standard error | median | n | left out |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in found.rows():
        name = f"{row['metric']} {_ARROWS[row['better']]}".strip()
        lines.append(
            f"| {name} | {row['mean']:.4f} ± {row['standard_error']:.4f} | {row['median']:.4f} | {row['n']} "
            f"| {row['left_out']} |"
        )
    return "\n".join(lines) + "\n"


def draw_curves(found: Evaluation, path: str | Path) -> Path:
    """Mean curves with their 95 % band, a panel each; needs the extra `viz`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves are drawn by matplotlib: pip install 'fastcam[viz]'") from error
    figure = Figure(figsize=(3.6 * len(found.curves), 3), layout="constrained")
    axes = list(figure.subplots(1, len(found.curves), sharey=True, squeeze=False).flat)
    for axis, (name, (fractions, mean)) in zip(axes, found.curves.items(), strict=True):
        low, high = (end.tolist() for end in mean.interval)
        axis.plot(fractions, mean.mean.tolist(), color="tab:blue")
        axis.fill_between(fractions, low, high, color="tab:blue", alpha=0.25, linewidth=0)
        axis.set(title=name, xlabel="share of the pixels")
    axes[0].set_ylabel("score")
    figure.savefig(path, dpi=130)
    return Path(path)


def _storable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
