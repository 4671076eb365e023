"""A profile as text, JSON, CSV and one self-contained HTML page; all are made from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .instrument import PARTS
from .results import write_json

__all__ = ["COLUMNS", "OP_COLUMNS", "Report", "cells_of", "fastest"]

#: Columns of profile.csv: what a row holds under that name, "stage_trunk_us" and so on from its `stages_us`.
COLUMNS = (
    *("name", "method", "backend", "batch", "precision", "images_per_s", "median_us", "iqr_us", "n", "times_forward"),
    *("speedup_reference", "times_ours", "match", "max_err", "cosine_fp32"),
    *(f"stage_{part}_us" for part in PARTS),
    *("instrument_overhead", "peak_mib", "op_calls", "launches", "flops", "bytes_all_ops", "error"),
)
OP_COLUMNS = ("op", "calls", "us", "bytes", "flops", "gbps", "pct_copy")


@dataclass(frozen=True)
class Report:
    """What `profile` measured.

    document  {"metadata": ..., "results": rows}, as profile.json holds it. A row: `method` ("forward" for the plain
              forward pass), `backend` (or the peer's package), `batch`, `precision`; `match` and `max_err` against the
              reference backend; `median_us`, `iqr_us`, `n`, `images_per_s`, `times_forward`; `stages_us`, which add
              up to `median_us`; `ops`; `peak_mib`, `op_calls`, `launches`, `flops`; or `error`

    `str(report)` is a table for the terminal.
    """

    document: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.document["results"]
        return rows

    @property
    def notes(self) -> list[str]:
        return list(self.document["metadata"]["notes"])

    def row(self, method: str, *, backend: str | None = None, batch: int | None = None) -> dict[str, Any]:
        """The first row of a method, of a backend and batch where given; KeyError where there is none."""
        for one in self.rows:
            if one["method"] == method and backend in (None, one["backend"]) and batch in (None, one["batch"]):
                return one
        raise KeyError(f"no row of method {method!r}, backend {backend!r}, batch {batch!r}")

    def write(self, folder: Path) -> None:
        """profile.json, profile.csv, ops.csv and profile.html in `folder`, which is made."""
        write_json(folder / "profile.json", self.document)
        (folder / "profile.csv").write_text(self.csv())
        (folder / "ops.csv").write_text(self.ops_csv())
        from .html import page  # needs matplotlib; what does not is written by now

        (folder / "profile.html").write_text(page(self.document))

    def csv(self) -> str:
        """A line a row, columns `COLUMNS`."""
        return _csv(COLUMNS, (cells_of(row) for row in self.rows))

    def ops_csv(self) -> str:
        """A line an op of a row: the row's name, then `OP_COLUMNS`."""
        lines = ({"name": row["name"], **op} for row in self.rows for op in row.get("ops", []))
        return _csv(("name", *OP_COLUMNS), lines)

    def __str__(self) -> str:
        head = ("method", "backend", "batch", "prec", "images/s", "ms", "x forward", *PARTS, "MiB", "calls", "max err")
        lines = [head, *(_line(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        left = ("method", "backend", "prec")
        aligned = [
            "  ".join(
                cell.ljust(width) if name in left else cell.rjust(width)
                for name, cell, width in zip(head, line, widths, strict=True)
            ).rstrip()
            for line in lines
        ]
        errors = dict.fromkeys(f"{r['method']}, {r['backend']}: {r['error']}" for r in self.rows if r.get("error"))
        return "\n".join([*aligned, "", *errors, *self.notes]).rstrip()


def fastest(rows: Sequence[dict[str, Any]], method: str, batch: int, precision: str) -> dict[str, Any] | None:
    """Of our rows of a setting that match, the fastest."""
    found = [
        row
        for row in rows
        if (row["method"], row["batch"], row["precision"]) == (method, batch, precision)
        and row["match"]
        and (row.get("stages_us") or method == "forward")
    ]
    return min(found, key=lambda row: row["median_us"], default=None)


def cells_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row, flat, by the names of `COLUMNS`."""
    flat = {name: row.get(name) for name in COLUMNS}
    flat["speedup_reference"] = (row.get("speedup") or {}).get("reference")
    for part, value in (row.get("stages_us") or {}).items():
        flat[f"stage_{part}_us"] = value
    return flat


def _csv(columns: Sequence[str], lines: Any) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    if row["median_us"] is None:
        figures = ["failed" if row.get("error") else "MISMATCH", *[""] * (len(PARTS) + 4)]
    else:
        stages = row.get("stages_us") or {}
        shares = [f"{100 * stages[part] / row['median_us']:.0f}%" if stages else "" for part in PARTS]
        figures = [
            *(f"{row['images_per_s']:.1f}", f"{row['median_us'] / 1e3:.2f}", f"{row['times_forward']:.2f}"),
            *(*shares, f"{row['peak_mib']:.1f}", str(row["launches"] or row["op_calls"])),
        ]
    error = "" if row["max_err"] is None or row["method"] == "forward" else f"{row['max_err']:.1e}"
    return (row["method"], row["backend"], str(row["batch"]), row["precision"], *figures, error)
