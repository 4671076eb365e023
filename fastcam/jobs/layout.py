"""What a store looks like on disk: its arrays, their shards, and writes that survive a power cut."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DONE", "FAILED", "PENDING", "TILE", "Layout", "blank", "create_arrays", "durable_store", "need_zarr"]
__all__ += ["partial_files", "storable", "sync_folder", "write_durably"]

PENDING, DONE, FAILED = 0, 1, 2
#: A block is held in memory while it fills, and rewritten as a whole: this bounds both.
BLOCK_BYTES, BLOCK_ROWS = 32 << 20, 8192
#: Shards, and the rows that go through a network together on a CPU, begin at multiples of this.
TILE = 16
#: What reading one item has to decompress.
CHUNK_BYTES = 256 << 10


@dataclass(frozen=True)
class Layout:
    """Shapes and types of the arrays of a store of `rows` items.

    maps     (rows, [T,] h, w) of `dtype`; the map itself is maps * scale + offset, with one of each for a map
    scores   (rows, C): the model's output, or (rows, [T]): the scores explained
    block    rows a shard: the unit that is written, and no file of which belongs to two blocks
    """

    rows: int
    map_shape: tuple[int, ...]
    several: bool
    score_shape: tuple[int, ...]
    dtype: str = "float16"
    score_dtype: str = "float32"
    block: int = 0

    def __post_init__(self) -> None:
        if self.block < 0 or self.block % TILE:
            raise ValueError(f"shard_rows must be a positive multiple of {TILE}, got {self.block}")
        if not self.block:
            fitting = max(TILE, min(BLOCK_ROWS, BLOCK_BYTES // max(1, self.row_bytes)))
            needed = max(TILE, 1 << (self.rows - 1).bit_length()) if self.rows else TILE
            object.__setattr__(self, "block", min(needed, 1 << (fitting.bit_length() - 1)))

    @property
    def target_shape(self) -> tuple[int, ...]:
        return self.map_shape[:1] if self.several else ()

    @property
    def row_bytes(self) -> int:
        maps = int(np.prod(self.map_shape)) * np.dtype(self.dtype).itemsize
        return maps + int(np.prod(self.score_shape)) * np.dtype(self.score_dtype).itemsize

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)

    def span(self, block: int) -> tuple[int, int]:
        return block * self.block, min((block + 1) * self.block, self.rows)

    def columns(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name -> (shape of a row, dtype) of every array but `ids`, in the order they are written: `status` last."""
        per_map = self.target_shape
        return {
            "maps": (self.map_shape, np.dtype(self.dtype)),
            "scale": (per_map, np.dtype("float32")),
            "offset": (per_map, np.dtype("float32")),
            "scores": (self.score_shape, np.dtype(self.score_dtype)),
            "targets": (per_map, np.dtype("int64")),
            "digest": ((), str),
            "error": ((), str),
            "status": ((), np.dtype("uint8")),
        }

    def dimensions(self, name: str) -> tuple[str, ...]:
        """Names of an array's dimensions, by which xarray knows which belong together."""
        targets = ("target",) * len(self.target_shape)
        if name == "maps":
            spatial = len(self.map_shape) - len(targets)
            return ("item", *targets, *("z", "y", "x")[3 - spatial :])
        if name == "scores" and self.score_shape != self.target_shape:
            return ("item", *(f"class_{axis}" if axis else "class" for axis in range(len(self.score_shape))))
        return ("item", *targets) if name in ("scores", "targets", "scale", "offset") else ("item",)

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        """Columns of `rows` pending items."""
        found: dict[str, np.ndarray] = {}
        for name, (shape, dtype) in self.columns().items():
            if dtype is str:
                found[name] = np.full(rows, "", dtype=object)
            else:
                found[name] = np.full((rows, *shape), blank(name, dtype), dtype=dtype)
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Layout:
        shapes = {key: tuple(facts[key]) for key in ("map_shape", "score_shape")}
        return cls(**{**facts, **shapes})


def blank(name: str, dtype: Any) -> Any:
    """What an array holds for an item that has no result."""
    if dtype is str:
        return ""
    if name == "targets":
        return -1
    return np.nan if name == "scores" else 1 if name == "scale" else 0


def storable(text: str, most: int = 100_000) -> str:
    """Text as the store's UTF-8 arrays can hold it: bytes of a name that are no UTF-8 show as \\udc.., NUL as \\0."""
    return text[:most].replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def need_zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError("a job's store needs zarr 3.1 or newer; install it: pip install 'fastcam[jobs]'") from error
    return zarr


def durable_store(root: Path, *, read_only: bool = False) -> Any:
    """A zarr store of local files in which every value is on the disk, whole, before the call that set it returns."""
    need_zarr()
    from zarr.abc.store import Store as ZarrStore
    from zarr.storage import LocalStore

    class DurableStore(LocalStore):
        async def set(self, key: str, value: Any) -> None:
            self._check_writable()
            write_durably(self.root / key, value.to_bytes())

        async def set_if_not_exists(self, key: str, value: Any) -> None:
            # LocalStore's runs in a thread, which might still be at it when another write has failed and been told.
            if not (self.root / key).exists():
                await self.set(key, value)

    store: ZarrStore = (LocalStore if read_only else DurableStore)(root, read_only=read_only)
    return store


def write_durably(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`: after a crash at any moment it holds the old bytes or the new ones."""
    _make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for step in reversed(missing):
        step.mkdir(exist_ok=True)
        sync_folder(step.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_files(root: Path) -> Iterator[Path]:
    """What killed writers left: never visible to a reader, safe to delete under the store's lock."""
    return root.rglob("*.partial")


def create_arrays(root: Path, layout: Layout, ids: list[str]) -> None:
    """The arrays of an empty store, with the items' ids in place."""
    zarr = need_zarr()
    group = zarr.open_group(durable_store(root), mode="a", zarr_format=3)
    chunk = _chunk_rows(layout)
    for name, (shape, dtype) in {"ids": ((), str), **layout.columns()}.items():
        array = group.create_array(
            name,
            shape=(layout.rows, *shape),
            chunks=(chunk, *(max(1, size) for size in shape)),
            shards=(layout.block, *(max(1, size) for size in shape)),
            dtype=dtype,
            fill_value=blank(name, dtype),
            dimension_names=layout.dimensions(name),
            overwrite=True,
            # An all-blank chunk is a file too: a delete in place of a write would need an order of its own.
            config={"write_empty_chunks": True},
        )
        if name == "ids":
            for block in range(layout.blocks):
                start, stop = layout.span(block)
                array[start:stop] = np.array(ids[start:stop], dtype=object)


def _chunk_rows(layout: Layout) -> int:
    """Rows a chunk: a divisor of the block whose maps and scores are about CHUNK_BYTES."""
    rows = max(1, min(layout.block, CHUNK_BYTES // max(1, layout.row_bytes)))
    while layout.block % rows:
        rows -= 1
    return rows
