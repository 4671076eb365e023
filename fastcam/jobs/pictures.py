"""The pictures behind a store's rows, read again from the job's source."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcam.models import Prepare

from .layout import DONE, storable
from .sources import ItemError, Source, open_source
from .sources.labels import for_model
from .store import Store

__all__ = ["Pictures", "colormap_of", "confidences"]

log = logging.getLogger("fastcam")

#: Rows of scores that are read at a time.
ROWS = 4096


class Pictures:
    """Row of a store -> what the network saw, (3, H, W) in [0, 1], its label, and names of classes.

    An item is found by its id where the source lists other items than the job's did, else by its place.

    store   the job's results
    images  where the items are, if not where the job found them (a path, an array, a `Source`)

    Where the job's images cannot be opened any more there are no pictures and no labels, and `missing` says why (else
    it is empty). Raises ValueError where `images` cannot be opened.
    """

    def __init__(self, store: Store, images: Any = None):
        facts = store.provenance["source"]
        self.classes: list[str] | None = store.provenance.get("classes")
        self.store, self.missing = store, ""
        self.source: Source | None = None
        try:
            source = _opened(facts, images)
        except (ValueError, OSError) as error:
            if images is not None:
                raise
            self.missing = str(error)
            log.warning("the maps are shown without their pictures: %s", error)
            return
        self.source = for_model(source, store.provenance.get("class_count"), self.classes)
        self.start = int(store.provenance["rows"][0])
        self._places: dict[str, int] | None = None
        if source.describe().get("ids_hash") != facts.get("ids_hash"):
            self._places = {storable(source.key(index)): index for index in range(len(source))}
        given = store.provenance.get("preprocessing")
        self.prepare = Prepare(**given) if isinstance(given, dict) else Prepare()

    def _place(self, row: int) -> int | None:
        """Number of a row's item in the source; None where it has no such item any more."""
        if self.source is None:
            return None
        if self._places is not None:
            return self._places.get(self.store.ids[row])
        index = self.start + row
        return index if index < len(self.source) else None

    def label(self, row: int) -> int | None:
        """The class the source gives, of several the first; None where it gives none or lacks the item."""
        place = self._place(row)
        label = None if place is None or self.source is None else self.source.label(place)
        return None if label is None else int(np.atleast_1d(label)[0])

    def labels(self, count: int) -> np.ndarray:
        """(count,) int64 of the first rows' labels; -1 where there is none."""
        found = (self.label(row) for row in range(count))
        return np.fromiter((-1 if label is None else label for label in found), np.int64, count)

    def name(self, number: int) -> str:
        """A class by name, where names are known."""
        return self.classes[number] if self.classes and 0 <= number < len(self.classes) else str(number)

    def view(self, row: int) -> Tensor:
        """(3, H, W) float32 in [0, 1] of the input's size; ItemError where the item is gone or has changed."""
        if self.source is None:
            raise ItemError(self.missing)
        place = self._place(row)
        if place is None:
            raise ItemError("the source has no such item any more")
        item = self.source.load(place)
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


def _opened(facts: dict[str, Any], images: Any) -> Source:
    where = facts.get("where") if images is None else images
    if where is None or (isinstance(where, str) and where == "memory"):
        raise ValueError("the job's images were in memory; pass them again: images=")
    return open_source(where, labels=facts.get("labels"))


def confidences(store: Store, labels: np.ndarray | None = None, count: int | None = None) -> np.ndarray:
    """(count,) how sure the network was of each of the first items (None: of all); NaN where there is no result.

    labels  (count,) int64, -1 for none
    Where the store has all scores: the softmax of the label's score, or of the highest where an item has no label.
    Where it has the targets' scores only: the first target's score as it is.
    Memory: the scores of ROWS items.
    """
    count = len(store) if count is None else count
    result = np.full(count, np.nan)
    column, shape = store.column("scores"), tuple(store.layout.score_shape)
    explained = shape == store.layout.target_shape
    if not explained and (len(shape) != 1 or not shape[0]):
        return result
    for start in range(0, count, ROWS):
        stop = min(start + ROWS, count)
        done: np.ndarray = start + np.flatnonzero(store.status[start:stop] == DONE)
        found = np.asarray(column[start:stop])[done - start].astype(np.float64)
        if explained:
            result[done] = found if found.ndim == 1 else found[:, 0]
            continue
        shares = np.exp(found - found.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        chosen = found.argmax(1)
        if labels is not None:
            given = labels[done]
            chosen = np.where((given >= 0) & (given < found.shape[1]), given, chosen)
        result[done] = shares[np.arange(len(done)), chosen]
    return result


def colormap_of(store: Store) -> str:
    return "coolwarm" if store.provenance["signed"] else "turbo"


def safe_name(text: str) -> str:
    """An item's id as a part of a file's name."""
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in Path(text).stem)
    return kept[-60:] or "item"
