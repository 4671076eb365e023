"""Columns of a CSV, TSV or Parquet file as text."""

from __future__ import annotations

import csv
import difflib
from pathlib import Path

__all__ = ["as_label", "columns", "rows_by_id"]


def columns(path: str | Path, needed: str, optional: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """The columns `needed` and those of `optional` that exist, as strings; an empty cell is "".

    The first line of a CSV or TSV (UTF-8, with or without a byte order mark) names the columns.
    Raises ValueError for a file that cannot be read, has no rows, or lacks the needed column; ImportError for Parquet
    without pyarrow.
    """
    path = Path(path)
    try:
        table = _parquet(path, (needed, *optional)) if path.suffix.lower() == ".parquet" else _csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if needed not in table:
        close = difflib.get_close_matches(needed, table, 1, 0.5)
        hint = f"; rename {close[0]!r}?" if close else ""
        raise ValueError(f"{path} has no column {needed!r}: its columns are {', '.join(map(repr, table))}{hint}")
    if not table[needed]:
        raise ValueError(f"{path} has no rows")
    return {name: table[name] for name in (needed, *optional) if name in table}


def as_label(text: str, place: str) -> tuple[int | None, str | None]:
    """(label, None), (None, None) for an empty cell, or (None, what is wrong with it)."""
    text = text.strip()
    if not text:
        return None, None
    try:
        number = int(text)
    except ValueError:
        try:
            number, whole = int(float(text)), float(text)
        except (ValueError, OverflowError):
            return None, f"label {text!r} {place} is no integer"
        if number != whole:
            return None, f"label {text!r} {place} is no integer"
    if not 0 <= number < 2**31:
        return None, f"label {text} {place} is out of range: classes count from 0"
    return number, None


def rows_by_id(ids: list[str], path: str) -> dict[str, int]:
    """id -> row; ValueError for an id that is empty or stands twice."""
    rows: dict[str, int] = {}
    for row, name in enumerate(ids):
        if not name:
            raise ValueError(f"{path}: row {row + 1} has no id")
        if rows.setdefault(name, row) != row:
            raise ValueError(f"{path} gives the id {name!r} twice, in rows {rows[name] + 1} and {row + 1}")
    return rows


def _csv(path: Path) -> dict[str, list[str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        head = [name.strip() for name in next(rows, [])]
        if len(set(head)) != len(head):
            raise csv.Error(f"its first line names a column twice: {', '.join(head)}")
        table: dict[str, list[str]] = {name: [] for name in head}
        for cells in rows:
            if not cells:
                continue
            if len(cells) != len(head):
                raise csv.Error(f"line {rows.line_num} has {len(cells)} cells for {len(head)} columns")
            for name, cell in zip(head, cells, strict=True):
                table[name].append(cell)
    return table


def _parquet(path: Path, wanted: tuple[str, ...]) -> dict[str, list[str]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow") from error
    try:
        names = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in names if name in wanted])
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    found = {name: ["" if v is None else str(v) for v in table[name].to_pylist()] for name in table.column_names}
    return found if wanted[0] in found else found | {name: [] for name in names}
