"""The pictures behind a store's rows, read again from the job's source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcam.models import Prepare

from .layout import DONE
from .sources import ItemError, Source, open_source
from .store import Store

__all__ = ["Pictures", "colormap_of", "confidences"]


class Pictures:
    """Row of a store -> what the network saw, (3, H, W) in [0, 1], its label, and names of classes.

    store   the job's results
    images  where the items are, if not where the job found them (a path, an array, a `Source`)

    Raises ValueError where the source cannot be opened again.
    """

    def __init__(self, store: Store, images: Any = None):
        facts = store.provenance["source"]
        where = facts.get("where") if images is None else images
        if where is None or (isinstance(where, str) and where == "memory"):
            raise ValueError("the job's images were in memory; pass them again: images=")
        self.source: Source = open_source(where, labels=facts.get("labels"))
        self.store = store
        self.start = int(store.provenance["rows"][0])
        self.classes: list[str] | None = store.provenance.get("classes")
        given = store.provenance.get("preprocessing")
        self.prepare = Prepare(**given) if isinstance(given, dict) else Prepare()

    def label(self, row: int) -> int | None:
        """The class the source gives; None where it has no such item any more."""
        index = self.start + row
        return self.source.label(index) if index < len(self.source) else None

    def name(self, number: int) -> str:
        """A class by name, where names are known."""
        return self.classes[number] if self.classes and 0 <= number < len(self.classes) else str(number)

    def view(self, row: int) -> Tensor:
        """(3, H, W) float32 in [0, 1] of the input's size; ItemError where the item is gone or has changed."""
        index = self.start + row
        if index >= len(self.source):
            raise ItemError("the source has no such item any more")
        item = self.source.load(index)
        # A store may keep more digits of the hash than a source, or fewer.
        stored = self.store.digests[row]
        if stored != item.digest:
            raise ItemError("its content is no longer what was explained")
        if not (isinstance(item.image, (np.ndarray, Tensor)) and "float" in str(item.image.dtype)):
            pixels = np.array(self.prepare.view(item.image))
            values = torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1).float() / 255
        else:
            values = self._undone(torch.as_tensor(item.image).float())
        return values.expand(3, -1, -1) if len(values) == 1 else values

    def _undone(self, values: Tensor) -> Tensor:
        """Prepared numbers as pixels: unnormalised where mean and std are known, else stretched to [0, 1]."""
        if len(values) not in (1, 3):
            values = values.mean(0, keepdim=True)
        if self.prepare.mean is not None and len(self.prepare.mean) == len(values):
            mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.prepare.mean, self.prepare.std))
            return (values * std + mean).clamp(0, 1)
        low, high = values.min(), values.max()
        return (values - low) / (high - low).clamp_min(1e-12)


def confidences(store: Store, labels: list[int | None] | None = None) -> np.ndarray:
    """(N,) how sure the network was of each item; NaN where there is no result.

    Where the store has all scores: the softmax of the label's score, or of the highest where an item has no label.
    Where it has the targets' scores only: the first target's score as it is.
    """
    scores: np.ndarray = store.scores.astype(np.float64)
    done = store.status == DONE
    if scores.ndim == 1 or tuple(store.layout.score_shape) == store.layout.target_shape:
        first = scores if scores.ndim == 1 else scores[:, 0]
        return np.where(done, first, np.nan)
    result = np.full(len(store), np.nan)
    if not scores.shape[1]:
        return result
    rows = np.flatnonzero(done)
    found = scores[rows]
    shares = np.exp(found - found.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    chosen = found.argmax(1)
    if labels is not None:
        given = np.array([-1 if labels[row] is None else labels[row] for row in rows], dtype=np.int64)
        known = (given >= 0) & (given < scores.shape[1])
        chosen = np.where(known, given, chosen)
    result[rows] = shares[np.arange(len(rows)), chosen]
    return result


def colormap_of(store: Store) -> str:
    return "coolwarm" if store.provenance["signed"] else "turbo"


def safe_name(text: str) -> str:
    """An item's id as a part of a file's name."""
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in Path(text).stem)
    return kept[-60:] or "item"
