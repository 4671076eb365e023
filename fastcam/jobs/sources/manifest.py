"""Image files named by a table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ._decode import MAX_PIXELS, ItemError, decode, read_file
from ._source import Item, Names, digest_of, printable, unique
from ._table import as_label, columns, rows_by_id

__all__ = ["ManifestSource"]


class ManifestSource:
    """The rows of a .csv, .tsv or .parquet file: column `path`, and where they exist `label` and `id`.

    Relative paths count from the manifest's folder; any path may be named, it is the user's own list. Without the
    column `id` the path is the item's id, with `#2`, `#3`, ... behind where it is listed again. An empty label is no
    label. A file that cannot be read and a label that is no class are errors of their item.
    Raises ValueError for a table that cannot be read, lacks `path`, gives an id twice, or has labels of which not one
    is an integer.
    """

    classes: tuple[str, ...] | None = None

    def __init__(self, path: str | Path, *, max_pixels: int = MAX_PIXELS):
        self.where = os.path.abspath(path)
        self.max_pixels = max_pixels
        table = columns(self.where, "path", ("label", "id"))
        paths = table["path"]
        self._paths = Names(paths)
        ids = table.get("id")
        if ids is not None:
            rows_by_id(ids, self.where)
        self._keys = Names(ids if ids is not None else unique(printable(path) for path in paths))
        self._wrong: dict[int, str] = {}
        self._labels: np.ndarray | None = None
        if "label" in table:
            self._labels = np.full(len(paths), -1, np.int32)
            for row, text in enumerate(table["label"]):
                label, wrong = as_label(text, f"in row {row + 1} of the manifest")
                if wrong is not None:
                    self._wrong[row] = wrong
                elif label is not None:
                    self._labels[row] = label
            if len(self._wrong) == len(paths):
                raise ValueError(f"{path}: {self._wrong[0]}, and so for every row; number the classes from 0")

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return self._keys[index]

    def label(self, index: int) -> int | None:
        label = -1 if self._labels is None else int(self._labels[index])
        return None if label < 0 else label

    def load(self, index: int) -> Item:
        path = self._paths[index]
        if index in self._wrong:
            raise ItemError(self._wrong[index])
        if not path.strip():
            raise ItemError(f"row {index + 1} of the manifest names no path")
        data = read_file(os.path.join(os.path.dirname(self.where), path))
        return Item(decode(data, max_pixels=self.max_pixels), digest_of(data))

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "manifest",
            "where": printable(self.where),
            "items": len(self),
            "ids_hash": self._keys.digest(),
            "paths_hash": self._paths.digest(),
            "labels_hash": None if self._labels is None else digest_of(self._labels.tobytes()),
            "classes": None,
        }
