"""Images that lie in an array: in memory, in a .npy or .npz file (memory-mapped), or in a Zarr array."""

from __future__ import annotations

import math
import os
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._decode import ItemError
from ._source import Item, digest_of

__all__ = ["ArraySource", "FileArraySource", "ZarrSource"]

#: Bytes of decompressed blocks that a Zarr source keeps.
_BLOCKS = 1 << 28
_NUMPY = (torch.uint8, torch.float16, torch.float32, torch.float64)


class ArraySource:
    """Rows of an array or tensor in memory; ids are row numbers.

    Floating point (N, C, H, W) is prepared for the model already. uint8 (N, H, W, 3 or 1), (N, 3 or 1, H, W) or
    (N, H, W) is pictures; where both readings fit, the last dimension holds the channels.
    Raises TypeError for another dtype, ValueError for another shape or no rows.
    """

    kind = "array"
    classes: tuple[str, ...] | None = None

    def __init__(self, array: np.ndarray | torch.Tensor, *, where: str = "memory"):
        self._array: Any = array
        self.where = where
        self._shape = tuple(int(n) for n in array.shape)
        self._prepared, self._layout = _kind_of(self._shape, str(array.dtype).removeprefix("torch."), where)

    def __len__(self) -> int:
        return self._shape[0]

    def key(self, index: int) -> str:
        return str(index)

    def label(self, index: int) -> int | None:
        return None

    def load(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        row = self._row(index)
        if isinstance(row, torch.Tensor):
            row = row.detach().cpu()
            # float32 holds all values of the types that numpy lacks
            row = (row if row.dtype in _NUMPY else row.float()).numpy()
        row = np.ascontiguousarray(row)
        digest = digest_of(row)
        if self._prepared:
            image = row.astype(np.float32, copy=False)
            if not np.isfinite(image).all():
                raise ItemError(f"{np.count_nonzero(~np.isfinite(image))} of its values are NaN or infinite")
            # A copy where the memory is shared: torch cannot hold read-only numbers, and the job may outlive a map.
            return Item(torch.from_numpy(image.copy() if not image.flags.writeable else image), digest)
        if self._layout == "first":
            row = row.transpose(1, 2, 0)
        return Item(row[..., None] if row.ndim == 2 else row, digest)

    def describe(self) -> dict[str, Any]:
        rows = sorted({0, len(self) // 2, len(self) - 1})
        return {
            "kind": self.kind,
            "where": self.where,
            "items": len(self),
            "ids_hash": digest_of(str(self._shape).encode()),
            "classes": None,
            # Row numbers are alike everywhere: what tells two arrays apart is their content.
            "rows_hash": digest_of(*(np.ascontiguousarray(_numbers(self._row(row))) for row in rows)),
        }

    def _row(self, index: int) -> Any:
        return self._array[index]


class FileArraySource(ArraySource):
    """A .npy file, or the array `images` (or the only one that fits) of an .npz file, memory-mapped where it is not
    compressed. Pickled objects are refused."""

    kind = "numpy"

    def __init__(self, path: str | Path):
        path = os.path.abspath(path)
        super().__init__(_opened(path), where=path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None}  # each process maps the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._array = _opened(self.where)


class ZarrSource(ArraySource):
    """A Zarr array, or the array `images` (or the only one that fits) of a group.

    The blocks read last are kept decompressed (256 MiB), as a block is decompressed whole for any row of it.
    Raises ImportError with the command that installs zarr.
    """

    kind = "zarr"

    def __init__(self, path: str | Path):
        path = os.path.abspath(path)
        array = _zarr_array(path)
        super().__init__(array, where=path)
        self._prepare_cache()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None, "_blocks": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._array = _zarr_array(self.where)
        self._prepare_cache()

    def _prepare_cache(self) -> None:
        self._rows = int(self._array.chunks[0])
        size = self._rows * int(np.prod(self._shape[1:])) * np.dtype(self._array.dtype).itemsize
        self._keep = max(1, _BLOCKS // max(size, 1))
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def _row(self, index: int) -> np.ndarray:
        block, row = divmod(index, self._rows)
        with self._lock:
            if block not in self._blocks:
                self._blocks[block] = self._array[block * self._rows : (block + 1) * self._rows]
            self._blocks.move_to_end(block)
            while len(self._blocks) > self._keep:
                self._blocks.popitem(last=False)
            return self._blocks[block][row]


def _kind_of(shape: tuple[int, ...], dtype: str, where: str) -> tuple[bool, str]:
    """Whether the rows are prepared tensors, and of pictures where the channels stand: "first" or "last"."""
    if len(shape) < 1 or shape[0] == 0:
        raise ValueError(f"{where}: an array of shape {shape} holds no images")
    if dtype.startswith(("float", "bfloat")):
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{where}: prepared images must be (N, C, H, W) floating point; got shape {shape}")
        return True, "first"
    if dtype != "uint8":
        raise TypeError(f"{where}: images must be uint8 pixels or prepared floating point numbers; got {dtype}")
    last, first = shape[-1] in (1, 3), len(shape) == 4 and shape[1] in (1, 3)
    if 0 in shape or not (last or first if len(shape) == 4 else len(shape) == 3 and not last):
        hint = "; is this one picture? array[None] is a list of one" if len(shape) == 3 and last else ""
        raise ValueError(
            f"{where}: pictures must be uint8 (N, H, W, 3 or 1), (N, 3 or 1, H, W) or (N, H, W); "
            f"got shape {shape}{hint}"
        )
    return False, "last" if last or len(shape) == 3 else "first"


def _numbers(row: Any) -> np.ndarray:
    if isinstance(row, torch.Tensor):
        return (row.detach().float() if row.is_floating_point() else row.detach()).cpu().numpy()
    return np.asarray(row)


def _opened(path: str) -> np.ndarray:
    try:
        if not zipfile.is_zipfile(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return _member(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a NumPy file: {error}") from error


def _member(path: str) -> np.ndarray:
    """The images of an .npz file."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        shapes = {}
        for name in names:
            with archive.open(name) as file:
                shapes[name.removesuffix(".npy")] = _header(file)[0]
        chosen = _choose(shapes, path) + ".npy"
        entry = archive.getinfo(chosen)
        if entry.compress_type != zipfile.ZIP_STORED:
            with archive.open(chosen) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        with open(path, "rb") as raw:
            raw.seek(entry.header_offset + 26)
            name_length, extra_length = (int.from_bytes(raw.read(2), "little") for _ in range(2))
            raw.seek(name_length + extra_length, os.SEEK_CUR)
            shape, fortran, dtype = _header(raw)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            flat: np.ndarray = np.memmap(path, dtype=dtype, mode="r", offset=raw.tell(), shape=(math.prod(shape),))
            return flat.reshape(shape, order="F" if fortran else "C")


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _choose(shapes: dict[str, tuple[int, ...]], path: str) -> str:
    """The name of the array that holds the images."""
    if "images" in shapes:
        return "images"
    fitting = [name for name, shape in shapes.items() if len(shape) == 4]
    if len(fitting) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"
        raise ValueError(f"{path} needs an array called 'images', or a single four-dimensional one; it has {listed}")
    return fitting[0]


def _zarr_array(path: str) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError("Zarr arrays need zarr: pip install 'fastcam[jobs]'") from error
    try:
        found = zarr.open(path, mode="r")
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a Zarr array: {error}") from error
    if isinstance(found, zarr.Array):
        return found
    arrays = dict(found.arrays())
    return arrays[_choose({name: tuple(array.shape) for name, array in arrays.items()}, path)]
