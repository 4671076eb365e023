"""Reading a store: item -> map, at any size, as `fastcam.attribute` would have given it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcam.methods._maps import finish
from fastcam.methods._method import Evidence

from .layout import DONE, Layout, durable_store, need_zarr
from .writer import facts_of

__all__ = ["Store", "StoredItem"]


@dataclass(frozen=True, eq=False)
class StoredItem:
    """One item of a store; raw (h, w) or (T, h, w) float32, None unless the item is done."""

    index: int
    id: str
    status: int
    error: str
    raw: Tensor | None
    scores: np.ndarray
    targets: np.ndarray


class Store:
    """The results of a job, one row an item, in input order; reads only what is asked for.

        store = fastcam.jobs.Store("maps.zarr")
        heat = store.map(7, size="input")            # as attribute(..., size="input").maps[7]

    ids         names of the items: relative paths, keys, or row numbers
    digests     hash of each item's content, "" where it could not be read
    status      (N,) uint8: 0 pending, 1 done, 2 failed
    errors      why an item failed, "" otherwise
    scores      (N, C) the model's output, or the scores explained, by the job's option; NaN without a result
    targets     (N,) or (N, T) int64 classes explained; -1 without a result
    provenance  the model, method, options, source and versions the maps come from
    input_size  spatial size of the model's input

    Raises FileNotFoundError where there is no store, JobError where `path` is something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        found = facts_of(self.path) if self.path.is_dir() else None
        if found is None:
            raise FileNotFoundError(f"{path} holds no store; fastcam run --out {path} makes one")
        self.provenance: dict[str, Any] = found
        self.layout = Layout.from_json(found["layout"])
        self.input_size = tuple(found["input_size"])
        self._group = need_zarr().open_group(durable_store(self.path, read_only=True), mode="r", zarr_format=3)
        self._arrays: dict[str, Any] = {name: self._group[name] for name in ("ids", *self.layout.columns())}

    def __len__(self) -> int:
        return self.layout.rows

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {int((self.status == DONE).sum())} of {len(self)} done)"

    def column(self, name: str) -> Any:
        """One of the store's arrays, by its name on the disk; rows are read when it is indexed."""
        return self._arrays[name]

    @cached_property
    def ids(self) -> list[str]:
        return [str(text) for text in self._arrays["ids"][:]]

    @cached_property
    def digests(self) -> list[str]:
        return [str(text) for text in self._arrays["digest"][:]]

    @cached_property
    def errors(self) -> list[str]:
        return [str(text) for text in self._arrays["error"][:]]

    @cached_property
    def status(self) -> np.ndarray:
        return np.asarray(self._arrays["status"][:])

    @cached_property
    def scores(self) -> np.ndarray:
        return np.asarray(self._arrays["scores"][:])

    @cached_property
    def targets(self) -> np.ndarray:
        return np.asarray(self._arrays["targets"][:])

    def index(self, item: int | str) -> int:
        """Row of an item given by number or id; KeyError or IndexError for one that is not there."""
        if isinstance(item, str):
            if item not in self._rows:
                raise KeyError(f"{self.path} has no item {item!r}")
            return self._rows[item]
        if not -len(self) <= item < len(self):
            raise IndexError(f"{self.path} has items 0 to {len(self) - 1}, not {item}")
        return item % len(self)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    def raw(self, item: int | str) -> Tensor:
        """The stored map, not normalised: (h, w) or (T, h, w) float32. ValueError for an item that is not done."""
        row = self.index(item)
        status = int(self._arrays["status"][row])
        if status != DONE:
            reason = f"failed: {self._arrays['error'][row]}" if status else "is not done yet; run with --resume"
            raise ValueError(f"item {row} ({self._arrays['ids'][row]}) {reason}")
        return self._restored(slice(row, row + 1))[0]

    def map(
        self, item: int | str, size: str | Sequence[int] | None = None, *, normalize: bool = True
    ) -> Tensor:  # fmt: skip
        """An item's map, (H, W) or (T, H, W) float32 on the CPU, resized and scaled as `fastcam.attribute` does.

        size       None: as stored · "input": the model's input · (H, W)
        normalize  min-max to [0, 1], or for signed maps of pixel methods to [-1, 1]

        Errors: ValueError for an item without a map; IndexError or KeyError for one that does not exist.
        """
        return self._finished(self.raw(item).unsqueeze(0), size, normalize)[0]

    def maps(self, start: int, stop: int, size: str | Sequence[int] | None = None, *, normalize: bool = True) -> Tensor:
        """Maps of rows [start, stop) as `map` gives them, in one tensor; of items that are not done, zeros."""
        rows = slice(start, min(stop, len(self)))
        raw = self._restored(rows)
        raw[torch.from_numpy(np.asarray(self._arrays["status"][rows]) != DONE)] = 0
        return self._finished(raw, size, normalize)

    def _finished(self, raw: Tensor, size: str | Sequence[int] | None, normalize: bool) -> Tensor:
        wanted = self.input_size if size == "input" else None if size is None else tuple(int(n) for n in size)
        # `finish` reads of the features only how many spatial dimensions they have.
        like = raw[:, :1] if self.layout.several else raw.unsqueeze(1)
        evidence = Evidence(projection=raw)
        return finish(like, evidence, False, normalize, wanted, self.provenance["signed"])[0]

    def _restored(self, rows: slice) -> Tensor:
        maps, scale, offset = (np.asarray(self._arrays[name][rows]) for name in ("maps", "scale", "offset"))
        shape = (*scale.shape, *(1,) * (maps.ndim - scale.ndim))
        return torch.from_numpy(maps.astype(np.float32) * scale.reshape(shape) + offset.reshape(shape))

    def batches(self, rows: int = 256) -> Iterator[tuple[int, Tensor, np.ndarray]]:
        """(first row, raw maps, status) of `rows` items at a time; maps of items that are not done are arbitrary."""
        for start in range(0, len(self), rows):
            part = slice(start, min(start + rows, len(self)))
            yield start, self._restored(part), np.asarray(self._arrays["status"][part])

    def __iter__(self) -> Iterator[StoredItem]:
        for start, maps, status in self.batches():
            part = slice(start, start + len(status))
            columns = [self._arrays[name][part] for name in ("ids", "error", "scores", "targets")]
            for row, (name, error, scores, targets) in enumerate(zip(*columns, strict=True)):
                raw = maps[row] if status[row] == DONE else None
                yield StoredItem(start + row, str(name), int(status[row]), str(error), raw, scores, targets)

    def export(
        self, where: str | Path, kind: str, *, size: str | Sequence[int] | None = None, normalize: bool = True
    ) -> Path:
        """Write the maps in another format, documented at `fastcam.jobs.export.write`."""
        from .export import write

        return write(self, Path(where), kind, size=size, normalize=normalize)
