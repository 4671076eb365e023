"""Image files of a folder and the folders below it."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._decode import MAX_PIXELS, SUFFIXES, ItemError, decode, open_file, read_file
from ._source import Item, Names, digest_of, printable, unique

__all__ = ["MARK", "FolderSource", "class_folders", "own_folder"]

log = logging.getLogger("fastcam")


#: In folders of pictures that this package made, so that they are not taken for a data set.
MARK = ".fastcam-made"


def own_folder(folder: Path) -> Path:
    """`folder`; where it is not there it is made, and marked, so that a job on what lies around it passes it over."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        (folder / MARK).touch()
    return folder


class FolderSource:
    """The image files below `root`, sorted by relative path, which is their id.

    Where no image lies in `root` itself its folders are classes: a label is the folder's place in alphabetical order.
    What is named like an image (`SUFFIXES`) and is no folder is an item, also where it turns out to be unreadable; so
    is a folder that cannot be listed (`sub/`). Names that begin with a dot are left out, and so are stores and folders
    of pictures that jobs, `show` and `report` made. Links are followed; a folder is listed once, under its own name if
    it lies inside `root`, so loops end.

    only  files and folders below `root`, as relative paths, to take in place of all of it
    Raises ValueError for a folder without images.
    """

    def __init__(self, root: str | Path, *, only: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS):
        self.root = os.path.abspath(root)
        self.max_pixels = max_pixels
        self.only = only
        found, self._unlisted = _listed(self.root, only)
        if not found:
            where = root if only is None else ", ".join(only)
            raise ValueError(
                f"{where} holds no images (names that end in {', '.join(sorted(SUFFIXES))}); "
                "tars are read by a pattern, e.g. DIR/*.tar"
            )
        self._paths = Names(found)
        shown = [printable(path) for path in found]
        self._keys = self._paths if shown == found else Names(unique(shown))
        self.classes, self._labels = class_folders(found)

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return self._keys[index]

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def load(self, index: int) -> Item:
        path = self._paths[index]
        if path in self._unlisted:
            raise ItemError(f"this folder cannot be listed, its images are missing: {self._unlisted[path]}")
        data = read_file(f"{self.root}/{path}")
        return Item(decode(data, max_pixels=self.max_pixels), digest_of(data))

    def describe(self) -> dict[str, Any]:
        places = [printable(os.path.join(self.root, path)) for path in self.only or ()]
        return {
            "kind": "folder",
            "where": printable(self.root) if not places else places[0] if len(places) == 1 else places,
            "items": len(self),
            "ids_hash": self._keys.digest(),
            "classes": None if self.classes is None else list(self.classes),
        }

    def relabelled(self, numbers: Sequence[int] | None, classes: Sequence[str] | None) -> FolderSource:
        """The same images with `numbers` in place of the folders' places, of `classes`; None: without labels."""
        other = copy.copy(self)
        other.classes = None if classes is None else tuple(classes)
        other._labels = None if numbers is None else np.asarray(numbers, np.int32)[self._labels]
        return other


def class_folders(paths: list[str]) -> tuple[tuple[str, ...] | None, np.ndarray | None]:
    """The names of the first folders and each path's place among them; (None, None) where a path has no folder."""
    first = [path.partition("/") for path in paths]
    if not all(slash for _, slash, _ in first):
        return None, None
    names = sorted({folder for folder, _, _ in first})
    place = {name: number for number, name in enumerate(names)}
    labels = np.array([place[folder] for folder, _, _ in first], dtype=np.int32)
    return tuple(printable(name) for name in names), labels


def _listed(root: str, only: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """Relative paths of the images, sorted; and of folders among them (`sub/`), why they could not be listed."""
    asked = {""} if only is None else set(only)
    files = {path for path in asked if path and not os.path.isdir(f"{root}/{path}")}
    found = list(files)
    unlisted: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    links: list[str] = []  # to folders: looked at once all real folders are known
    for start in sorted(asked - files):
        _walk(root, start, found, unlisted, seen, links)
    skipped = 0
    while links:
        later: list[str] = []
        for start in sorted(links):
            skipped += not _walk(root, start, found, unlisted, seen, later)
        links = later
    if skipped:
        log.warning("%s: %d links lead to folders that are listed already; they are left out", root, skipped)
    return sorted([*found, *unlisted]), unlisted


def _walk(
    root: str, start: str, found: list[str], unlisted: dict[str, str], seen: set[tuple[int, int]], links: list[str]
) -> bool:
    """Adds what lies below root/start; False where that has been listed already."""
    pending = [start]
    fresh = False
    while pending:
        folder = pending.pop()
        try:
            descriptor = open_file(f"{root}/{folder}" if folder else root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            unlisted |= _reason(root, folder, error)
            fresh = True
            continue
        try:
            facts = os.fstat(descriptor)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            fresh = True
            if folder != start and _is_ours(descriptor):
                continue
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if _is_folder(entry):
                        (links if entry.is_symlink() else pending).append(path)
                    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                        found.append(path)
        except OSError as error:  # a disk that fails in the middle of a folder
            unlisted |= _reason(root, folder, error)
        finally:
            os.close(descriptor)
    return fresh


def _reason(root: str, folder: str, error: OSError) -> dict[str, str]:
    reason = error.strerror or str(error)
    if not folder:
        raise ValueError(f"{root} cannot be listed: {reason}") from error
    return {f"{folder}/": reason}


def _is_ours(descriptor: int) -> bool:
    """Whether a folder is a store, or holds pictures that this package made."""
    for name in (MARK, "zarr.json"):
        with contextlib.suppress(OSError):
            os.stat(name, dir_fd=descriptor)
            return True
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
