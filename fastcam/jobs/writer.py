"""The writing side of a store: one writer, blocks of rows, and a journal that makes every batch durable at once.

A batch's results go to a file of their own in `journal/` (written aside, synced, renamed): from then on its items are
done. Once all items of a block have a result, or at the end of a run, the block's arrays are written, one whole shard
file each, `status` last, and the block's journal is deleted. So at any moment of a kill, a row whose status is set has
its map on the disk, a shard file is an old one or a new one with at least the same rows, and what `status` does not
show yet stands in the journal, from which the next run takes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .layout import (
    FAILED,
    Layout,
    create_arrays,
    durable_store,
    need_zarr,
    partial_files,
    storable,
    sync_folder,
    write_durably,
)

__all__ = ["BlockWriter", "JobError", "Lock", "create", "differences", "facts_of", "failed"]
__all__ += ["refuse_if_written", "refuse_inside", "write_facts"]

ATTRIBUTE = "fastcam"
JOURNAL = "journal"
LOCK = "writer.lock"
CREATING = "creating"
#: Letters of a reason that are kept.
LONGEST = 1000
#: Seconds after which a block that is not full yet is written all the same, for those who look at a running job.
FLUSH = 60.0


class JobError(RuntimeError):
    """What stops a job; the message says what to do. `usage` where the request is at fault, not the machine."""

    def __init__(self, message: str, *, usage: bool = False):
        super().__init__(message)
        self.usage = usage


class Lock:
    """The right to write a store: held by one process at a time, and gone with it however it ends."""

    def __init__(self, root: Path):
        self.root = root
        self._made = not root.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._handle = self._take()
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            raise JobError(f"cannot write to {root}: {error.strerror or error}; choose another --out") from error

    def _take(self) -> int:
        path = self.root / LOCK
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its holder deletes the file when it lets go; a lock on a deleted file would keep nobody out.
                if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
            except BlockingIOError:
                holder = _holder(handle)
                os.close(handle)
                message = f"{self.root} is being written by {holder}; wait for it, or choose another --out"
                raise JobError(message) from None
            except OSError:
                os.close(handle)
                raise
            os.close(handle)

    def release(self) -> None:
        """Let go of the store; a folder that holds nothing and was made for it goes too."""
        if self._handle < 0:
            return
        with contextlib.suppress(OSError):  # a disk that became read-only keeps the file, which locks nothing
            (self.root / LOCK).unlink()
        if self._made and not any(self.root.iterdir()):
            self.root.rmdir()
        os.close(self._handle)
        self._handle = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _holder(handle: int) -> str:
    return os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"


def refuse_if_written(root: Path) -> None:
    """JobError where a process writes the store; touches nothing, so that it may lie on a read-only disk."""
    try:
        handle = os.open(root / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JobError(f"{root} is being written by {_holder(handle)}; wait for it") from None
    finally:
        os.close(handle)


def facts_of(root: Path) -> dict[str, Any] | None:
    """A store's provenance; None where nothing is there yet, or a creation was cut short.

    Raises JobError where `root` holds something that is not a store of fastcam's.
    """
    if root.exists() and not root.is_dir():
        raise JobError(f"{root} is a file; choose another --out", usage=True)
    # Another process may be creating it. It sets the mark first and takes it away last, after the provenance: looked at
    # in this order, whatever of a creation is seen is seen with the mark or with the provenance.
    names = sorted(path.name for path in root.iterdir()) if root.exists() else []
    begun = (root / CREATING).exists()
    found = _attribute(root)
    foreign = [name for name in names if name != LOCK and not name.startswith(f"{CREATING}.")]
    if found is None and foreign and not begun:
        what = f"holds {foreign[0]!r} and is no store of fastcam's"
        raise JobError(f"{root} {what}; choose another --out", usage=True)
    return found


def _attribute(root: Path) -> dict[str, Any] | None:
    path = root / "zarr.json"
    return json.loads(path.read_text()).get("attributes", {}).get(ATTRIBUTE) if path.is_file() else None


def refuse_inside(root: Path) -> None:
    """JobError where `root` would lie inside a store: readers take all that is in one for its arrays."""
    for folder in root.resolve().parents:
        if _attribute(folder) is not None:
            raise JobError(f"{root} lies inside the store {folder}; choose another name", usage=True)


def create(root: Path, layout: Layout, ids: list[str], facts: Mapping[str, Any]) -> None:
    """An empty store in a locked folder. The provenance is written last: with it the store exists.

    A mark says that what lies in the folder until then is of a creation, and may be deleted by the next.
    """
    need_zarr()
    write_durably(root / CREATING, b"")
    for path in root.iterdir():
        if path.name not in (LOCK, CREATING):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    sync_folder(root.absolute().parent)  # the store's own name
    create_arrays(root, layout, ids)
    write_facts(root, {**facts, "layout": layout.to_json()})
    (root / CREATING).unlink()


def write_facts(root: Path, facts: Mapping[str, Any]) -> None:
    """The provenance of a locked store, in place of what it has."""
    group = need_zarr().open_group(durable_store(root), mode="a", zarr_format=3)
    group.attrs.update({ATTRIBUTE: dict(facts)})


#: What makes two jobs the same job, with the words a user knows it by.
IDENTITY = (
    *("model", "weights_hash", "preprocessing", "method", "options", "layer", "targets", "size", "dtype", "scores"),
    *("precision", "channels_last", "source", "limit", "shard"),
)
#: What a source says of itself that may change: where it lies, when hashes tell what it is.
PLACES = {"where": "ids_hash", "labels": "labels_hash"}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], keys: tuple[str, ...] = IDENTITY) -> list[str]:
    """One line a difference, 'options.seed: 0 in the store, 1 now'."""
    lines = []
    for key in keys:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            inner = tuple(sorted({*before, *now}))
            if key == "source":
                inner = tuple(name for name in inner if PLACES.get(name) not in inner)
            lines += [f"{key}.{line}" for line in differences(before, now, inner)]
        else:
            lines.append(f"{key}: {before!r} in the store, {now!r} now")
    return lines


@dataclass
class _Block:
    index: int
    columns: dict[str, np.ndarray]
    stale: bool = False  # holds results its shard files lack


class BlockWriter:
    """Writes results of a store's rows, a block at a time; the caller holds the lock or owns the blocks it writes."""

    def __init__(self, root: Path, layout: Layout):
        self.root, self.layout = root, layout
        group = need_zarr().open_group(durable_store(root), mode="r+", zarr_format=3)
        self._arrays = {name: group[name] for name in layout.columns()}
        self._open: _Block | None = None
        self._flushed = time.monotonic()

    def recover(self) -> np.ndarray:
        """(rows,) status after a crash: half-written files deleted, journalled results counted, not yet moved."""
        for path in partial_files(self.root):
            path.unlink(missing_ok=True)
        status: np.ndarray = np.array(self._arrays["status"][:])
        for path in sorted((self.root / JOURNAL).glob("*.npz")):
            record = _read_record(path)
            status[record["rows"]] = record["status"]
        return status

    def status_of(self, block: int) -> np.ndarray:
        """(rows,) status, of which only that of the block's rows is known."""
        start, stop = self.layout.span(block)
        self._open = None
        status: np.ndarray = np.zeros(self.layout.rows, dtype=np.uint8)
        status[start:stop] = self._at(block).columns["status"]
        return status

    def put(self, index: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write a whole block."""
        self._open = _Block(index, dict(columns), stale=True)
        self.flush()

    def append(self, rows: np.ndarray, results: Mapping[str, np.ndarray]) -> None:
        """Make the results of `rows`, all of one block, durable; OSError where that fails, and then none counts."""
        block = self._at(int(rows[0]) // self.layout.block)
        first, _ = self.layout.span(block.index)
        packed = {name: (column.astype(str) if column.dtype == object else column) for name, column in results.items()}
        memory = io.BytesIO()
        np.savez(memory, **{"rows": rows, **packed})  # type: ignore[arg-type]
        taken = [path.name for path in self._journal(block.index)]
        number = int(taken[-1][9:17]) + 1 if taken else 0
        write_durably(self.root / JOURNAL / f"{block.index:08d}-{number:08d}.npz", memory.getvalue())
        for name, column in results.items():
            block.columns[name][rows - first] = column
        block.stale = True
        if time.monotonic() - self._flushed > FLUSH:
            self.flush()

    def flush(self) -> None:
        """Write the open block's shards, and forget its journal."""
        block = self._open
        if block is None:
            return
        if block.stale:
            start, stop = self.layout.span(block.index)
            for name, array in self._arrays.items():
                array[start:stop] = block.columns[name]
            block.stale = False
            self._flushed = time.monotonic()
        for path in self._journal(block.index):
            path.unlink(missing_ok=True)

    def settle(self, blocks: Sequence[int] = ()) -> None:
        """Move the journalled results of some blocks (none named: of all) into the arrays.

        Who owns some blocks only must name them: the others' journals are being written by their owners.
        """
        self.flush()
        left = {int(path.name[:8]) for path in (self.root / JOURNAL).glob("*.npz")}
        for index in sorted(left.intersection(blocks) if blocks else left):
            self._at(index)
            self.flush()
        self._open = None
        if not blocks:
            with contextlib.suppress(OSError):  # not there
                (self.root / JOURNAL).rmdir()

    def _at(self, index: int) -> _Block:
        if self._open is not None and self._open.index == index:
            return self._open
        self.flush()
        start, stop = self.layout.span(index)
        columns = {name: np.array(array[start:stop]) for name, array in self._arrays.items()}
        columns = {n: c.astype(object) if c.dtype.kind in "TU" else c for n, c in columns.items()}
        block = _Block(index, columns)
        for path in self._journal(index):
            record = _read_record(path)
            rows: np.ndarray = record.pop("rows") - start
            for name, column in record.items():
                block.columns[name][rows] = column
            block.stale = True
        self._open = block
        return block

    def _journal(self, index: int) -> list[Path]:
        # Numbered in order: an item that was retried has its later result in a later file.
        return sorted((self.root / JOURNAL).glob(f"{index:08d}-*.npz"))


def _read_record(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as record:
        return {name: record[name] for name in record.files}


def failed(layout: Layout, reasons: list[str]) -> dict[str, np.ndarray]:
    """Results of items that have none, with the reason each."""
    columns = layout.empty(len(reasons))
    columns["error"][:] = [storable(reason, LONGEST) for reason in reasons]
    columns["status"][:] = FAILED
    return columns
