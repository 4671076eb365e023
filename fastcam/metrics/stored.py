"""The maps of a job's store, together again with the images they explain."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastcam.models.prepare import ItemError, Prepare

from .evaluate import Batch

__all__ = ["batches_of", "read_mask"]

log = logging.getLogger("fastcam")
_DONE = 1


class _Store(Protocol):
    """What is read of a `fastcam.jobs.Store`."""

    ids: Any
    digests: Any
    status: Any
    targets: Any

    def map(self, item: int, size: Any) -> Tensor: ...


class _Source(Protocol):
    """What is read of a job's source of images."""

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def load(self, index: int) -> Any: ...


def batches_of(
    store: _Store,
    source: _Source,
    prepare: Prepare,
    *,
    masks: Path | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Batch]:
    """Batches for `evaluate` of the store's items that are done, at most `limit` of them, in order.

    source   the images, by the ids the store has, with the contents that were explained
    prepare  of the job's pictures
    masks    a folder of PNG files named as the items (suffix aside), white where the object is: of the picture's size,
             then resized and cropped as the picture is, or else of the prepared one's; an item without one gets an
             empty mask, whose metrics are left out

    Raises ValueError where no item is done, one is not among the images or has changed, or it or its mask cannot be
    used.
    """
    if masks is not None and not masks.is_dir():
        raise ValueError(f"masks are PNG files in a folder; there is no folder {masks}")
    rows = {source.key(index): index for index in range(len(source))}
    done = [row for row in range(len(store.ids)) if int(store.status[row]) == _DONE][:limit]
    if not done:
        raise ValueError(
            f"none of the store's {len(store.ids)} items is done; a stopped job goes on with fastcam run --resume"
        )
    missing = next((str(store.ids[row]) for row in done if str(store.ids[row]) not in rows), None)
    if missing is not None:
        raise ValueError(f"item {missing!r} of the store is not among the images; pass those the job was run on")
    lacking = 0
    for start in range(0, len(done), batch_size):
        part = done[start : start + batch_size]
        names = [str(store.ids[row]) for row in part]
        pictures = [_read(source, rows[name], name, store.digests[row]) for name, row in zip(names, part, strict=True)]
        images = torch.stack([prepare(picture) for picture in pictures])
        maps = torch.stack([store.map(row, "input") for row in part])
        targets = torch.as_tensor(np.stack([np.asarray(store.targets[row]) for row in part]))
        if bool((targets < 0).any()):  # fewer targets than the store has room for: no map, no metric
            maps = torch.where((targets < 0).reshape(*targets.shape, 1, 1), torch.nan, maps)
            targets = targets.clamp(min=0)
        found = None
        if masks is not None:
            read = [read_mask(masks, *item, prepare) for item in zip(names, pictures, strict=True)]
            lacking += sum(mask is None for mask in read)
            empty = torch.zeros(images.shape[2:], dtype=torch.bool)
            found = torch.stack([empty if mask is None else mask for mask in read])
            if maps.ndim == 4:
                found = found.unsqueeze(1).expand(maps.shape)
            found = found.to(device)
        yield Batch(images.to(device), maps.to(device), targets.to(device), found, names)
    if lacking:
        log.warning("%d of %d items have no mask in %s", lacking, len(done), masks)


def _read(source: _Source, index: int, name: str, digest: str) -> Any:
    try:
        item = source.load(index)
    except ItemError as error:
        raise ValueError(f"item {name!r}, whose map is in the store, cannot be read any more: {error}") from error
    if item.digest != digest:
        raise ValueError(f"item {name!r} is no longer what was explained; pass the images the job was run on")
    return item.image


def read_mask(folder: Path, name: str, picture: Any, prepare: Prepare) -> Tensor | None:
    """(H, W) bool of the item's PNG in `folder`, over the prepared picture; None where there is none."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("masks are read by pillow: pip install 'fastcam[viz]'") from error
    path = folder / Path(name).with_suffix(".png")
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        return None
    try:
        with Image.open(path) as file:
            mask = file.convert("L")
    except OSError as error:
        raise ValueError(f"mask {path} cannot be read: {error}") from error
    ready = isinstance(picture, (np.ndarray, Tensor)) and "float" in str(picture.dtype)  # as `Prepare` tells them apart
    if isinstance(picture, (np.ndarray, Tensor)):
        own = tuple(picture.shape[1:] if ready else picture.shape[:2])
    else:
        own = (picture.height, picture.width)
    wanted = own if ready else prepare.size
    if mask.size == own[::-1] and not ready:
        mask = dataclasses.replace(prepare, interpolation="nearest", mean=(0.0,), std=(1.0,)).view(mask)
    elif wanted is None or mask.size != wanted[::-1]:
        sizes = " or ".join(f"{size[0]} x {size[1]}" for size in dict.fromkeys((own, wanted)) if size is not None)
        raise ValueError(f"mask {path} must be {sizes} (H x W), as the picture; it is {mask.height} x {mask.width}")
    return torch.from_numpy(np.array(mask)) > 127
