"""A data set that Hugging Face `datasets` has saved to disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ._decode import MAX_PIXELS, ItemError, decode, read_file
from ._source import Item, digest_of

__all__ = ["DatasetSource"]


class DatasetSource:
    """Rows of a folder written by `Dataset.save_to_disk`; ids are row numbers.

    The images are its one column of feature `Image` (or the one called `image`), the labels its one column of feature
    `ClassLabel`, or else integers in a column called `label`.
    Raises ImportError with the command that installs datasets, ValueError for a data set without such a column.
    """

    def __init__(self, path: str | Path, *, max_pixels: int = MAX_PIXELS):
        self.where = os.path.abspath(path)
        self.max_pixels = max_pixels
        self.classes: tuple[str, ...] | None = None
        self._open()

    def _open(self) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("data sets of Hugging Face need datasets: pip install datasets") from error
        try:
            rows = datasets.load_from_disk(self.where)
        except Exception as error:
            raise ValueError(f"{self.where} cannot be read as a data set: {error}") from error
        features = rows.features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        images = ["image"] if "image" in images else images
        if len(images) != 1:
            listed = ", ".join(f"{name}: {type(kind).__name__}" for name, kind in features.items())
            raise ValueError(f"{self.where} needs one column of feature Image, or one called 'image'; it has {listed}")
        self._image = images[0]
        classed = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        whole = [
            name for name in ("label",) if str(getattr(features.get(name), "dtype", "")).startswith(("int", "uint"))
        ]
        label = classed[0] if len(classed) == 1 else next(iter(whole), None)
        if label in classed:
            self.classes = tuple(features[label].names)
        self._labels = None if label is None else rows.with_format("numpy")[label][:]
        self._fingerprint = rows._fingerprint
        # Undecoded: files are decoded here as everywhere else, and nothing is decoded for a label.
        self._rows = rows.cast_column(self._image, datasets.Image(decode=False)).select_columns([self._image])

    def __getstate__(self) -> dict[str, Any]:
        return {"where": self.where, "max_pixels": self.max_pixels, "classes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return str(index)

    def label(self, index: int) -> int | None:
        label = -1 if self._labels is None else int(self._labels[index])
        return None if label < 0 else label

    def load(self, index: int) -> Item:
        cell = self._rows[index][self._image]
        if cell is None:
            raise ItemError("the row has no image")
        data = cell["bytes"] if cell["bytes"] is not None else read_file(cell["path"])
        return Item(decode(data, max_pixels=self.max_pixels), digest_of(data))

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "datasets",
            "where": self.where,
            "items": len(self),
            "ids_hash": digest_of(f"{len(self)} rows".encode()),
            "classes": None if self.classes is None else list(self.classes),
            "rows_hash": self._fingerprint,
        }
