"""Where a job's images come from: one class a kind, all opened by `open_source`.

source = open_source("photos/")              # folder, manifest, tars, array, or data set: by what stands there
source.key(0), source.label(0), source.load(0).image
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._decode import MAX_PIXELS, SUFFIXES, ItemError
from ._source import Item, Source

__all__ = ["Item", "ItemError", "Source", "open_source"]

#: What a path is among several.
TAR, FOLDER, IMAGE, ALONE = "a tar", "a folder", "an image file", "alone"
_MANIFESTS = (".csv", ".tsv", ".parquet")


def open_source(
    where: str | Path | Source | np.ndarray | torch.Tensor | Sequence[str | Path],
    *,
    labels: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """The images at `where`.

    a folder                      image files below it (`folder.FolderSource`); one image file is a folder of one
    .csv, .tsv, .parquet          a manifest (`manifest.ManifestSource`)
    .tar, or a pattern of them    WebDataset or plain tars (`tar.TarSource`), e.g. "shards/*.tar"
    several paths                 tars, or folders, or image files, as one source; folders and files are items of the
                                  folder that holds them all
    .npy, .npz                    pictures or prepared tensors, memory-mapped (`arrays.FileArraySource`)
    a Zarr array or group         (`arrays.ZarrSource`)
    a folder by `save_to_disk`    of Hugging Face `datasets` (`hub.DatasetSource`)
    an array or tensor            rows in memory (`arrays.ArraySource`)
    a Source                      itself

    labels      classes from a file instead of the data's own: .csv or .parquet with the column `label`, matched by the
                column `id` where there is one and else row by row; or .npy with one integer a row
    max_pixels  a picture with more is refused before it is decompressed

    Raises ValueError or TypeError for what cannot be opened, ImportError where a package is missing.
    """
    source = _opened(where, max_pixels)
    if labels is None:
        return source
    from .labels import Labelled

    return Labelled(source, labels)


def _opened(where: Any, max_pixels: int) -> Source:
    if isinstance(where, (np.ndarray, torch.Tensor)):
        from .arrays import ArraySource

        return ArraySource(where)
    if isinstance(where, (list, tuple)):
        return _several([os.fspath(path) for path in where], max_pixels)
    if not isinstance(where, (str, Path)):
        if all(hasattr(where, name) for name in ("load", "key", "label", "describe", "__len__")):
            return where
        raise TypeError(f"images must be a path, an array, a tensor or a Source; got {type(where).__name__}")
    path, suffix = os.fspath(where), Path(where).suffix.lower()
    if not os.path.exists(path):
        return _tars(_matching(path), path, max_pixels)
    if os.path.isdir(path):
        return _folder(path, suffix, max_pixels)
    if suffix in _MANIFESTS:
        from .manifest import ManifestSource

        return ManifestSource(path, max_pixels=max_pixels)
    if suffix == ".tar":
        return _tars([path], path, max_pixels)
    if suffix in (".npy", ".npz"):
        from .arrays import FileArraySource

        return FileArraySource(path)
    if suffix in SUFFIXES:
        from .folder import FolderSource

        folder, name = os.path.split(os.path.abspath(path))
        return FolderSource(folder, only=[name], max_pixels=max_pixels)
    hint = "; unpack it first: members of a compressed tar cannot be read at random" if ".tar" in path.lower() else ""
    kinds = ", ".join((*_MANIFESTS, ".tar", ".npy", ".npz"))
    raise ValueError(f"{path} is no folder, image, or file that lists or holds images ({kinds}){hint}")


def _matching(pattern: str) -> list[str]:
    tars = sorted(glob(pattern, recursive=True))
    if not tars:
        raise ValueError(f"there is nothing at {pattern!r}: neither a file, nor a folder, nor a pattern of tars")
    others = [name for name in tars if not name.lower().endswith(".tar")]
    if others:
        raise ValueError(f"a pattern names tars; {pattern!r} also matches {others[0]!r}")
    return tars


def _several(paths: list[str], max_pixels: int) -> Source:
    if len(paths) < 2:
        if not paths:
            raise ValueError("images must name at least one path")
        return _opened(paths[0], max_pixels)
    kinds: dict[str, str] = {}
    for path in paths:
        kinds.setdefault(_kind(path), path)
    alone = kinds.get(ALONE)
    if alone is not None:
        raise ValueError(f"several images must be tars, folders, or image files; {alone} can only be read alone")
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise ValueError(f"several images must be of one kind: {first} is {one}, {second} {other}")
    if TAR in kinds:
        tars = [tar for path in paths for tar in ([path] if os.path.exists(path) else _matching(path))]
        return _tars(list(dict.fromkeys(tars)), paths, max_pixels)
    from .folder import FolderSource

    whole = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath(whole if FOLDER in kinds else [os.path.dirname(path) for path in whole])
    below = [os.path.relpath(path, root) for path in whole]
    return FolderSource(root, only=["" if path == "." else path for path in below], max_pixels=max_pixels)


def _kind(path: str) -> str:
    suffix = os.path.splitext(path.rstrip("/"))[1].lower()
    if os.path.isdir(path):
        special = {"zarr.json", ".zarray", ".zgroup", "dataset_info.json", "dataset_dict.json"} & set(os.listdir(path))
        return ALONE if special or suffix == ".zarr" else FOLDER
    if suffix == ".tar" or not os.path.exists(path):  # a pattern of tars
        return TAR
    return IMAGE if suffix in SUFFIXES else ALONE


def _tars(paths: list[str], where: str | list[str], max_pixels: int) -> Source:
    from .tar import TarSource

    return TarSource(paths, where=where, max_pixels=max_pixels)


def _folder(path: str, suffix: str, max_pixels: int) -> Source:
    names = set(os.listdir(path))
    if names & {"zarr.json", ".zarray", ".zgroup"} or suffix == ".zarr":
        from .arrays import ZarrSource

        return ZarrSource(path)
    if "dataset_dict.json" in names:
        splits = sorted(name for name in names if os.path.isdir(os.path.join(path, name)))
        raise ValueError(f"{path} holds several data sets; name one of them: {path}/{{{','.join(splits)}}}")
    if {"dataset_info.json", "state.json"} <= names:
        from .hub import DatasetSource

        return DatasetSource(path, max_pixels=max_pixels)
    from .folder import FolderSource

    return FolderSource(path, max_pixels=max_pixels)
