"""Classes from a file, over any source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._decode import ItemError
from ._source import Item, Source, digest_of
from ._table import as_label, columns, rows_by_id
from .folder import FolderSource

__all__ = ["Labelled", "for_model"]


def for_model(source: Source, classes: int | None, names: Sequence[str] | None) -> Source:
    """The source, its labels being a model's classes: what stands in files and data sets is taken as it is, class
    folders only where they can be the model's.

    classes  how many the model has; None: unknown
    names    theirs, in order; None: unknown

    Folders that all bear names of classes are these, whatever their order and number; as many folders as classes are
    classes in alphabetical order; others are no labels (`classes` is None then).
    """
    if not isinstance(source, FolderSource) or source.classes is None:
        return source
    given = Counter(names or ())
    place = {name: number for number, name in enumerate(names or ()) if given[name] == 1}
    if names and all(folder in place for folder in source.classes):
        return source.relabelled([place[folder] for folder in source.classes], names)
    return source if len(source.classes) == classes else source.relabelled(None, None)


class Labelled:
    """A source whose labels stand in a file.

    .csv, .tsv, .parquet: column `label`, and `id` to match by; ids the source lacks are passed over, items the file
    lacks have no label. Without `id`, or as an .npy of integers: one row an item, in order. A label that is no class
    makes `load` of its item fail with the reason.
    Raises ValueError for a file that cannot be read, another number of rows, an id listed twice, or no usable label.
    """

    classes: tuple[str, ...] | None = None

    def __init__(self, source: Source, path: str | Path):
        self._source = source
        self.path = os.path.abspath(path)
        self._wrong: dict[int, str] = {}
        self._labels = self._read()
        if len(self._wrong) == len(source) or not (self._labels >= 0).any():
            reason = next(iter(self._wrong.values()), "none of its rows is an item's")
            raise ValueError(f"{path} labels none of the {len(source)} items: {reason}")

    def __len__(self) -> int:
        return len(self._source)

    def key(self, index: int) -> str:
        return self._source.key(index)

    def label(self, index: int) -> int | None:
        label = int(self._labels[index])
        return None if label < 0 else label

    def load(self, index: int) -> Item:
        if index in self._wrong:
            raise ItemError(self._wrong[index])
        return self._source.load(index)

    def describe(self) -> dict[str, Any]:
        given = {"labels": self.path, "labels_hash": digest_of(self._labels.tobytes()), "classes": None}
        return self._source.describe() | given

    def _read(self) -> np.ndarray:
        texts, ids = self._cells()
        if ids is None:
            if len(texts) != len(self):
                raise ValueError(
                    f"{self.path} has {len(texts)} labels for {len(self)} items and no column 'id' to match by"
                )
            places = list(range(len(self)))
        else:
            rows = rows_by_id(ids, self.path)
            places = [rows.get(self.key(index), -1) for index in range(len(self))]
        labels: np.ndarray = np.full(len(self), -1, np.int32)
        for index, row in enumerate(places):
            if row >= 0:
                label, wrong = as_label(texts[row], f"in row {row + 1} of {os.path.basename(self.path)}")
                if wrong is not None:
                    self._wrong[index] = wrong
                elif label is not None:
                    labels[index] = label
        return labels

    def _cells(self) -> tuple[list[str], list[str] | None]:
        if self.path.lower().endswith(".npy"):
            try:
                numbers = np.load(self.path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{self.path} cannot be read as a NumPy file: {error}") from error
            if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
                raise ValueError(f"{self.path} must hold (N,) integers; got {numbers.dtype} {numbers.shape}")
            return [str(number) for number in numbers], None
        table = columns(self.path, "label", ("id",))
        return table["label"], table.get("id")
