"""What every source of images is, and the packed list of names that folders, manifests and tars keep."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Item", "Names", "Source", "digest_of", "unique"]


@dataclass(frozen=True)
class Item:
    """An image and its content's hash.

    image   a picture: PIL (RGB) or uint8 (H, W, 3 or 1) · or floating point (C, H, W), prepared for the model already
    digest  SHA-256 of the item's bytes as they are stored (the file, or the array's numbers), 32 hexadecimal digits
    """

    image: Image | np.ndarray | torch.Tensor
    digest: str


class Source(Protocol):
    """A fixed list of images. Can be pickled; `load` may be called from several threads at a time.

    classes  names of the classes that labels count, where the data say so (class folders), or None
    """

    classes: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The item's id: relative path, tar member, or row number. No two items share one."""
        ...

    def label(self, index: int) -> int | None:
        """The class the data give, >= 0, or None. Whether the model has it is for the caller to check."""
        ...

    def load(self, index: int) -> Item:
        """Reads and decodes. Raises `ItemError` with the reason where this item cannot be used."""
        ...

    def describe(self) -> dict[str, Any]:
        """For provenance, JSON-able: kind, where, labels, items, ids_hash, classes."""
        ...


def digest_of(*parts: Any) -> str:
    """SHA-256 of bytes-like objects one after the other, its first 32 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:32]


class Names:
    """Strings packed into one block: a million paths take their letters and 8 bytes each."""

    def __init__(self, names: Iterable[str]):
        # File names that are not UTF-8 hold surrogates, which "surrogatepass" keeps apart.
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._letters = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        count = len(self._ends)
        if not -count <= index < count:
            raise IndexError(f"item {index} of {count}")
        index %= count
        start = self._ends[index - 1] if index else 0
        return self._letters[start : self._ends[index]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> str:
        return digest_of(self._ends.astype("<i8").tobytes(), self._letters)


def printable(name: str) -> str:
    """The name with bytes that are no UTF-8 written out (`\\xe9`), so that it can stand in any file."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unique(names: Iterable[str]) -> list[str]:
    """The names, from the second of its kind on with `#2`, `#3`, ... behind."""
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    result = []
    for name in names:
        own = name
        while own in taken:
            numbers[name] = numbers.get(name, 1) + 1
            own = f"{name}#{numbers[name]}"
        taken.add(own)
        result.append(own)
    return result
