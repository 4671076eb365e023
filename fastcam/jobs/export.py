"""A store's maps in other formats."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from .layout import DONE
from .sources.folder import own_folder
from .store import Store

__all__ = ["KINDS", "write"]


def write(store: Store, where: Path, kind: str, *, size: str | Sequence[int] | None, normalize: bool) -> Path:
    """The store's maps as files; returns `where`.

    kind  "npy"         one array (N, [T,] H, W) float32, written row by row; NaN for items without a map
          "npz"         compressed: `maps` as above, `scores`, `targets`, `status`, `ids`, `error`
          "png"         a folder of 8-bit grey pictures, `<row>.png` or `<row>-<t>.png`: min-max, or 128 = 0 for signed
                        maps; and `index.json`, row -> id
          "webdataset"  a tar with `<row>.map.npy` and `<row>.json` (id, targets, status, error) an item

    size, normalize are those of `Store.map`. Errors: ValueError for an unknown kind; FileExistsError where `where` is
    there already. Memory: one batch of maps, but "npz" holds all of them.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if where.exists():
        raise FileExistsError(f"{where} exists; choose another name")
    KINDS[kind](store, where, size, normalize)
    return where


def _maps(store: Store, size: str | Sequence[int] | None, normalize: bool) -> Iterator[tuple[int, Tensor | None]]:
    for start, raw, status in store.batches():
        done = np.flatnonzero(status == DONE)
        finished = store._finished(raw[done], size, normalize) if len(done) else raw[:0]
        places = {int(row): position for position, row in enumerate(done)}
        for row in range(len(status)):
            yield start + row, finished[places[row]] if row in places else None


def _shape(store: Store, size: str | Sequence[int] | None) -> tuple[int, ...]:
    spatial = store.layout.map_shape[len(store.layout.target_shape) :]
    wanted = store.input_size if size == "input" else spatial if size is None else size
    return (len(store), *store.layout.target_shape, *(int(n) for n in wanted))


def _npy(store: Store, where: Path, size: str | Sequence[int] | None, normalize: bool) -> None:
    array = np.lib.format.open_memmap(where, mode="w+", dtype=np.float32, shape=_shape(store, size))
    for row, found in _maps(store, size, normalize):
        array[row] = np.nan if found is None else found.numpy()
    array.flush()


def _npz(store: Store, where: Path, size: str | Sequence[int] | None, normalize: bool) -> None:
    maps: np.ndarray = np.full(_shape(store, size), np.nan, dtype=np.float32)
    for row, found in _maps(store, size, normalize):
        if found is not None:
            maps[row] = found.numpy()
    columns = {"maps": maps, "scores": store.scores, "targets": store.targets, "status": store.status}
    names = {"ids": np.array(store.ids), "error": np.array(store.errors)}
    with where.open("wb") as file:  # given a name, numpy would add a suffix
        np.savez_compressed(file, **columns, **names)  # type: ignore[arg-type]


def _png(store: Store, where: Path, size: str | Sequence[int] | None, normalize: bool) -> None:
    from PIL import Image

    if not normalize:
        raise ValueError("a picture has no room for raw values; leave normalize=True for kind='png'")
    own_folder(where)
    signed = store.provenance["signed"]
    for row, found in _maps(store, size, normalize):
        if found is None:
            continue
        grey = (found * 127 + 128 if signed else found * 255).round().byte().numpy()
        for column, picture in enumerate(grey if store.layout.several else grey[None]):
            name = f"{row}-{column}.png" if store.layout.several else f"{row}.png"
            Image.fromarray(picture).save(where / name)
    (where / "index.json").write_text(json.dumps(dict(enumerate(store.ids)), indent=0, ensure_ascii=False))


def _webdataset(store: Store, where: Path, size: str | Sequence[int] | None, normalize: bool) -> None:
    with tarfile.open(where, "w") as tar:
        for row, found in _maps(store, size, normalize):
            facts = {"id": store.ids[row], "targets": store.targets[row].tolist(), "status": int(store.status[row])}
            if found is not None:
                memory = io.BytesIO()
                np.save(memory, found.numpy())
                _add(tar, f"{row:09d}.map.npy", memory.getvalue())
            _add(tar, f"{row:09d}.json", json.dumps({**facts, "error": store.errors[row]}).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


KINDS: dict[str, Callable[[Store, Path, str | Sequence[int] | None, bool], None]] = {
    "npy": _npy,
    "npz": _npz,
    "png": _png,
    "webdataset": _webdataset,
}
