"""Joining the stores of a job's shards into one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .layout import DONE, FAILED, PENDING, sync_folder
from .progress import Meter, Summary
from .provenance import completed
from .store import Store
from .writer import (
    IDENTITY,
    JOURNAL,
    BlockWriter,
    JobError,
    Lock,
    create,
    differences,
    refuse_if_written,
    refuse_inside,
)

__all__ = ["merge"]


def merge(out: str | Path, stores: Sequence[str | Path]) -> Summary:
    """Join the finished stores of all shards of a job into one store, as the job without shards would have made it.

        fastcam.jobs.merge("maps.zarr", ["maps.0.zarr", "maps.1.zarr"])

    The shards are only read. Raises JobError where `out` exists, a shard is missing, given twice, unfinished, being
    written, or of another job; FileNotFoundError where there is no store. Memory: one block. A merge that is cut short
    leaves nothing under the name `out`, which must not lie inside a store.
    """
    out = Path(out)
    if out.exists():
        raise JobError(f"{out} exists; choose another name", usage=True)
    refuse_inside(out)
    if not stores:
        raise JobError("there is nothing to merge: name the shards' stores", usage=True)
    parts = sorted((Store(path) for path in stores), key=lambda store: store.provenance["rows"])
    _check(parts)
    # A shard without a single readable image does not know how large a map is.
    model = next((part for part in parts if 0 not in part.provenance["input_shape"]), parts[0])
    items = model.provenance["items"]
    layout = type(model.layout)(**{**vars(model.layout), "rows": items, "block": model.provenance["shard_rows"] or 0})
    facts = {**model.provenance, "shard": None, "rows": [0, items]}
    aside = out.with_name(f".{out.name}.merging")
    meter = Meter(items)
    try:
        with Lock(aside):
            create(aside, layout, [name for part in parts for name in part.ids], facts)
            writer = BlockWriter(aside, layout)
            for block in range(layout.blocks):
                columns = layout.empty(layout.span(block)[1] - layout.span(block)[0])
                for part in parts:
                    _copy(part, columns, *layout.span(block))
                writer.put(block, columns)
                meter.add(int((columns["status"] == DONE).sum()), int((columns["status"] == FAILED).sum()))
        os.rename(aside, out)
        sync_folder(out.absolute().parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise JobError(f"{out}: {error.strerror or error}; make room or choose another disk") from error
    return meter.summary(out, model.provenance["batch_size"])


def _check(parts: list[Store]) -> None:
    keys = tuple(key for key in IDENTITY if key != "shard")
    for part in parts:
        refuse_if_written(part.path)
        pending = int((part.status == PENDING).sum())
        if pending or any((part.path / JOURNAL).glob("*.npz")):
            raise JobError(f"{part.path} is not finished ({pending} items pending); finish it with --resume first")
        found = differences(completed(parts[0].provenance), completed(part.provenance), keys)
        if found:
            raise JobError(f"{parts[0].path} and {part.path} are not of one job; " + "; ".join(found), usage=True)
    at = 0
    for part in parts:
        start, stop = part.provenance["rows"]
        if start != at:
            what = f"items {at} to {start - 1} are missing" if start > at else f"items from {start} are there twice"
            raise JobError(f"{what}: name the store of every shard once", usage=True)
        at = stop
    items = parts[0].provenance["items"]
    if at != items:
        raise JobError(f"items {at} to {items - 1} are missing: name the store of every shard", usage=True)


def _copy(part: Store, columns: dict[str, np.ndarray], start: int, stop: int) -> None:
    """What `part` has of rows [start, stop) of the whole job."""
    first, last = part.provenance["rows"]
    begin, end = max(start, first), min(stop, last)
    if begin >= end:
        return
    for name, column in columns.items():
        found: Any = part.column(name)[begin - first : end - first]
        if found.shape[1:] == column.shape[1:]:
            column[begin - start : end - start] = found
