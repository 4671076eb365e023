"""Image files of a folder and the folders below it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from ._decode import MAX_PIXELS, SUFFIXES, decode, open_file, read_file
from ._source import Item, Names, digest_of, printable, unique

__all__ = ["FolderSource", "class_folders"]

log = logging.getLogger("fastcam")


class FolderSource:
    """The image files below `root`, sorted by relative path, which is their id.

    Where no image lies in `root` itself its folders are classes: a label is the folder's place in alphabetical order.
    What is named like an image (`SUFFIXES`) and is no folder is an item, also where it turns out to be unreadable.
    Names that begin with a dot are left out. Links are followed; a folder is listed once, under its own name if it
    lies inside `root`, so loops end.

    names  to take these relative paths instead of looking for them
    Raises ValueError for a folder without images.
    """

    def __init__(self, root: str | Path, *, names: list[str] | None = None, max_pixels: int = MAX_PIXELS):
        self.root = os.path.abspath(root)
        self.max_pixels = max_pixels
        self.only = names
        found = _listed(self.root) if names is None else names
        if not found:
            raise ValueError(
                f"{root} holds no images (names that end in {', '.join(sorted(SUFFIXES))}); "
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
        data = read_file(f"{self.root}/{self._paths[index]}")
        return Item(decode(data, max_pixels=self.max_pixels), digest_of(data))

    def describe(self) -> dict[str, Any]:
        where = self.root if self.only is None else os.path.join(self.root, self.only[0])
        return {
            "kind": "folder",
            "where": printable(where),
            "items": len(self),
            "ids_hash": self._keys.digest(),
            "classes": None if self.classes is None else list(self.classes),
        }


def class_folders(paths: list[str]) -> tuple[tuple[str, ...] | None, np.ndarray | None]:
    """The names of the first folders and each path's place among them; (None, None) where a path has no folder."""
    first = [path.partition("/") for path in paths]
    if not all(rest for _, _, rest in first):
        return None, None
    names = sorted({folder for folder, _, _ in first})
    place = {name: number for number, name in enumerate(names)}
    labels = np.array([place[folder] for folder, _, _ in first], dtype=np.int32)
    return tuple(printable(name) for name in names), labels


def _listed(root: str) -> list[str]:
    """Relative paths of the images, sorted."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    links: list[str] = [""]  # the root; then links to folders, looked at once all real folders are known
    skipped = 0
    while links:
        later: list[str] = []
        for start in sorted(links):
            skipped += not _walk(root, start, found, seen, later)
        links = later
    if skipped:
        log.warning(
            "%s: %d links lead to folders that are listed already, or nowhere; they are left out", root, skipped
        )
    return sorted(found)


def _walk(root: str, start: str, found: list[str], seen: set[tuple[int, int]], links: list[str]) -> bool:
    """Adds what lies below root/start; False where that has been listed already."""
    pending = [start]
    fresh = False
    while pending:
        folder = pending.pop()
        try:
            descriptor = open_file(f"{root}/{folder}" if folder else root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if not folder:
                raise ValueError(f"{root} cannot be listed: {error.strerror}") from error
            log.warning("%s/%s cannot be listed: %s", root, folder, error.strerror)
            continue
        try:
            facts = os.fstat(descriptor)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            fresh = True
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if _is_folder(entry):
                        (links if entry.is_symlink() else pending).append(path)
                    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                        found.append(path)
        finally:
            os.close(descriptor)
    return fresh


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
