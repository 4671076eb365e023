"""A source for tests of jobs: images made of their number, some of which misbehave."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastcam.jobs.sources import Item, ItemError

__all__ = ["Numbered", "tiny"]


@dataclass(frozen=True)
class Numbered:
    """`count` images (3, *size) of noise, each seeded by its number.

    names    what items are called, or "image-0", ...
    broken   numbers whose load raises ItemError("broken on purpose")
    odd      number -> size it has instead
    nan      numbers whose image holds a NaN
    labels   label of each, or none
    delay    seconds a load takes
    deadly   number -> file: the first process to load it makes the file and is killed with SIGKILL
    counted  a file that gets a line with the number at every load
    """

    count: int
    size: tuple[int, int] = (16, 16)
    names: Sequence[str] | None = None
    broken: Sequence[int] = ()
    odd: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    nan: Sequence[int] = ()
    labels: Sequence[Any] | None = None
    delay: float = 0.0
    deadly: Mapping[int, Path] = field(default_factory=dict)
    counted: Path | None = None

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"image-{index}" if self.names is None else self.names[index]

    def label(self, index: int) -> Any:
        return None if self.labels is None else self.labels[index]

    def image(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn((3, *self.odd.get(index, self.size)), generator=generator)
        if index in self.nan:
            image[0, 0, 0] = torch.nan
        return image

    def load(self, index: int) -> Item:
        if self.counted is not None:
            with self.counted.open("a") as file:
                file.write(f"{index}\n")
        if self.delay:
            time.sleep(self.delay)
        if index in self.deadly and not self.deadly[index].exists():
            self.deadly[index].touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.broken:
            raise ItemError("broken on purpose")
        image = self.image(index)
        return Item(image, hashlib.sha256(image.numpy().tobytes()).hexdigest())

    def describe(self) -> dict[str, Any]:
        return {"kind": "numbered", "items": self.count, "size": list(self.size)}


def tiny() -> torch.nn.Module:
    """A small network, as a model specification names it: "fastcam._testing.jobs:tiny"."""
    from .models import gap_linear

    return gap_linear()
