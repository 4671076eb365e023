"""Images inside tars, WebDataset shards or plain ones: listed once, then read at random by their place in the file."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._decode import MAX_BYTES, MAX_PIXELS, SUFFIXES, ItemError, decode
from ._source import Item, Names, digest_of, printable, unique
from ._table import as_label

__all__ = ["TarSource"]

#: A label file above this is no label file.
_LABEL_BYTES = 1 << 20


@dataclass
class _Member:
    """An image of a tar, and what is wrong with it if anything."""

    name: str
    offset: int
    size: int
    wrong: str | None = None
    label: int | None = None


class TarSource:
    """The image members of uncompressed tars, in order; nothing is ever extracted.

    A member is an item if its name ends like an image's. Ids are member names, behind the tar's name where there are
    several; a name met again gets `#2`, `#3`, ... A label stands beside its image as WebDataset has it: the same name
    up to the first dot of its last part, and `.cls` (an integer) or `.json` (with "label" or "cls"). Where `a.jpg`
    exists, `a.mask.png` belongs to it and is no item of its own.
    Links, devices, names that lead out of the tar (`/x`, `../x`), members cut off by the end of the file and labels
    that are no class are errors of their item; so is the rest of a tar behind a damaged header,
    and, of several tars, one that cannot be read at all (item `name.tar/`).
    Raises ValueError for a single tar that cannot be opened or is compressed, or for tars without any image.
    """

    classes: tuple[str, ...] | None = None

    def __init__(self, paths: list[str], *, where: str | Path | list[str], max_pixels: int = MAX_PIXELS):
        self.paths = [os.path.abspath(path) for path in paths]
        self.where = [os.path.abspath(path) for path in (where if isinstance(where, list) else [where])]
        self.max_pixels = max_pixels
        names: list[str] = []
        offsets, sizes, tars, labels = [], [], [], []
        self._wrong: dict[int, str] = {}
        refused: list[ValueError] = []
        for number, path in enumerate(self.paths):
            prefix = f"{printable(os.path.basename(path))}/" if len(paths) > 1 else ""
            try:
                members = _images(path)
            except ValueError as error:
                refused.append(error)
                members = [_Member("", 0, 0, str(error))]
            for member in members:
                if member.wrong is not None:
                    self._wrong[len(names)] = member.wrong
                names.append(prefix + printable(member.name))
                offsets.append(member.offset)
                sizes.append(member.size)
                tars.append(number)
                labels.append(-1 if member.label is None else member.label)
        if refused and len(refused) == len(names):
            raise refused[0]
        if not names:
            raise ValueError(
                f"{', '.join(self.where)} holds no images (members that end in {', '.join(sorted(SUFFIXES))})"
            )
        self._keys = Names(unique(names))
        self._offsets, self._sizes = np.array(offsets, np.int64), np.array(sizes, np.int64)
        self._tars, self._labels = np.array(tars, np.int32), np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def label(self, index: int) -> int | None:
        label = int(self._labels[index])
        return None if label < 0 else label

    def load(self, index: int) -> Item:
        if index in self._wrong:
            raise ItemError(self._wrong[index])
        size = int(self._sizes[index])
        if size > MAX_BYTES:
            raise ItemError(f"{size} bytes are more than the {MAX_BYTES} an image file may have")
        try:
            with open(self.paths[self._tars[index]], "rb", buffering=0) as file:
                file.seek(int(self._offsets[index]))
                data = file.read(size)
        except OSError as error:
            raise ItemError(f"the tar cannot be read: {error.strerror or error}") from error
        if len(data) < size:
            raise ItemError(f"the tar ends in the middle of it: {len(data)} of {size} bytes are there")
        return Item(decode(data, max_pixels=self.max_pixels), digest_of(data))

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "tar",
            "where": printable(self.where[0]) if len(self.where) == 1 else [printable(path) for path in self.where],
            "items": len(self),
            "ids_hash": self._keys.digest(),
            "labels_hash": digest_of(self._labels.tobytes()),
            "classes": None,
        }


def _images(path: str) -> list[_Member]:
    """The image members of one tar, in order, with their labels."""
    images: list[_Member] = []
    labels: dict[str, tuple[int | None, str | None]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in _infos(tar, path, images):
                key, extension = _split(info.name)
                if extension in (".cls", ".json") and info.isreg() and info.size <= _LABEL_BYTES:
                    found = _label(tar, info)
                    if found != (None, None):
                        labels[key] = found
                elif os.path.splitext(info.name)[1].lower() in SUFFIXES and not info.isdir():
                    images.append(_Member(info.name, info.offset_data, info.size, _refused(info)))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as an uncompressed tar: {error}; unpack it first if it is compressed, as the "
            "members of a compressed tar cannot be read at random"
        ) from error
    plain = {_split(image.name)[0] for image in images if _split(image.name)[1] in SUFFIXES}
    kept = []
    for image in images:
        key, extension = _split(image.name)
        if extension not in SUFFIXES and key in plain:
            continue
        image.label, wrong = labels.get(key, (None, None))
        image.wrong = image.wrong or wrong
        kept.append(image)
    return kept


def _infos(tar: tarfile.TarFile, path: str, images: list[_Member]) -> Iterator[tarfile.TarInfo]:
    """The members' headers; a header that cannot be read becomes an item with the reason."""
    first = True
    while True:
        at = tar.offset
        try:
            info = tar.next()
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            if first:
                raise tarfile.ReadError(str(error)) from error
            cut_off = bool(images) and at >= os.path.getsize(path)  # said against the last image itself
            if not cut_off:
                reason = f"the tar's header at byte {at} is damaged ({error}); what follows cannot be found"
                images.append(_Member(f"(rest of the tar from byte {at}).jpg", at, 0, reason))
            return
        if info is None:  # the end, or what tarfile takes for it
            with open(path, "rb") as raw:
                raw.seek(at)
                reason = f"the tar's header at byte {at} is damaged; what follows cannot be found"
                if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    images.append(_Member(f"(rest of the tar from byte {at}).jpg", at, 0, reason))
            return
        first = False
        tar.members = []  # type: ignore[attr-defined]  # else the whole list is kept
        yield info


def _refused(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return f"it is a link inside a tar (to {info.linkname!r}); links are not followed"
    if not info.isreg() or info.issparse():
        return "it is no ordinary file of the tar (a device, pipe, or sparse file)"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "its name leads out of the tar"
    return None


def _split(name: str) -> tuple[str, str]:
    """WebDataset's key and extension: what stands before and behind the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def _label(tar: tarfile.TarFile, info: tarfile.TarInfo) -> tuple[int | None, str | None]:
    file = tar.extractfile(info)
    content = file.read() if file is not None else b""
    place = f"in {os.path.basename(info.name)!r}"
    text = content.decode("utf-8", "replace")
    if not info.name.lower().endswith(".json"):
        return as_label(text, place)
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return None, f"{os.path.basename(info.name)!r} beside it is no JSON"
    given = next((facts[name] for name in ("label", "cls") if name in facts), None) if isinstance(facts, dict) else None
    return (None, None) if given is None else as_label(str(given), place)
