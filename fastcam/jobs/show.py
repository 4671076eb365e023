"""`fastcam show`: items of a store as PNG panels, the picture beside its maps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcam import render

from .layout import DONE, FAILED
from .pictures import Pictures, colormap_of, confidences, safe_name
from .sources import ItemError
from .sources.folder import own_folder
from .store import Store
from .writer import JobError

__all__ = ["main", "show"]


def show(
    store: str | Path | Store,
    *,
    items: Sequence[int | str] = (),
    worst: int | None = None,
    class_: int | str | None = None,
    out: str | Path = "fastcam-show",
    images: Any = None,
    limit: int = 20,
) -> list[Path]:
    """Writes a PNG panel of each chosen item and returns the paths: picture, an overlay a target, scores, label.

    items   numbers or ids of items
    worst   that many items, beginning with the one the network was least sure of (`pictures.confidences`: of the true
            label where the data give one, else of its own answer)
    class_  number or name: only items of that label, or of that first target where they have no label; alone, the
            first `limit` of them
    out     folder of the pictures, made where it is missing
    images  where the items are now, if not where the job found them

    An item whose file has changed since, or is gone with or without all others, is shown as its map alone, and says so.
    Raises ValueError for nothing chosen, an unknown class, an item without a map, or a store without any; KeyError or
    IndexError for an item that does not exist.
    """
    store = store if isinstance(store, Store) else Store(store)
    pictures = Pictures(store, images)
    labels = pictures.labels(len(store))
    sure = confidences(store, labels)
    paths = []
    for row in _chosen(store, pictures, labels, sure, items, worst, class_, limit):
        path = own_folder(Path(out)) / f"{row:07d}-{safe_name(store.ids[row])}.png"
        paths.append(_panel(store, pictures, row, float(sure[row]), path))
    return paths


def _chosen(
    store: Store,
    pictures: Pictures,
    labels: np.ndarray,
    sure: np.ndarray,
    items: Sequence[int | str],
    worst: int | None,
    class_: Any,
    limit: int,
) -> list[int]:
    if items:
        return [store.index(item) for item in items]
    if worst is None and class_ is None:
        raise ValueError("nothing is chosen: name items, worst= or class_=")
    rows = np.flatnonzero(store.status == DONE)
    if not len(rows):
        count = int((store.status == FAILED).sum())
        raise ValueError(f"{store.path} has no map to show: {count} of {len(store)} items failed (reasons: --failed)")
    if class_ is not None:
        number = _class_number(class_, pictures)
        first = store.targets if store.targets.ndim == 1 else store.targets[:, 0]
        rows = rows[np.where(labels < 0, first, labels)[rows] == number]
        if not len(rows):
            raise ValueError(f"no item with a map is of class {class_!r}")
    if worst is None:
        return [int(row) for row in rows[:limit]]
    return [int(row) for row in rows[np.argsort(sure[rows], kind="stable")][:worst]]


def _class_number(given: int | str, pictures: Pictures) -> int:
    if isinstance(given, int) or given.isdecimal():
        return int(given)
    for names in (pictures.classes, getattr(pictures.source, "classes", None)):
        if names and given in names:
            return list(names).index(given)
    raise ValueError(f"there is no class called {given!r}; classes can be given by number")


def _panel(store: Store, pictures: Pictures, row: int, sure: float, path: Path) -> Path:
    try:
        view, remark = pictures.view(row), ""
    except ItemError as error:
        view, remark = torch.zeros(3, *store.input_size), f"\n(without its picture: {error})"
    maps = store.map(row, size=view.shape[1:])
    maps = maps if maps.ndim == 3 else maps.unsqueeze(0)
    targets = np.atleast_1d(store.targets[row])
    cells: list[Any] = [
        render.overlay(view, one, colormap_of(store)) if not remark else _alone(one, colormap_of(store)) for one in maps
    ]
    label = pictures.label(row)
    said = "" if label is None else f"label {pictures.name(label)}   "
    said += "" if np.isnan(sure) else f"confidence {sure:.3f}"
    group = render.Group(render.to_pixels(view), f"{store.ids[row]}\n{said}{remark}", [("", cells)])
    titles = [_title(store, pictures, row, place, int(target)) for place, target in enumerate(targets)]
    return render.panel([group], path, columns=titles, title=store.provenance["method"], cell=224)


def _alone(one: torch.Tensor, colormap: str) -> torch.Tensor:
    table = render.colours(colormap)
    low = -1 if render.COLORMAPS[colormap] == "signed" else 0
    return table[((one.clamp(low, 1) - low) / (1 - low) * 255).round().long()].round().to(torch.uint8)


def _title(store: Store, pictures: Pictures, row: int, place: int, target: int) -> str:
    scores = np.atleast_1d(store.column("scores")[row])
    every = tuple(store.layout.score_shape) != store.layout.target_shape
    at = target if every else place
    score = f"\n{scores[at]:.3f}" if scores.ndim == 1 and 0 <= at < len(scores) else ""
    return f"{pictures.name(target)}{score}"


def main(words: Sequence[str]) -> int:
    """Run `show ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fastcam show", description="Items of a store as pictures with their maps.")
    parser.add_argument("store", help="e.g. maps.zarr")
    parser.add_argument("--item", dest="items", nargs="+", default=[], metavar="ID|N", help="ids or numbers of items")
    parser.add_argument("--worst", type=int, metavar="N", help="those the network was least sure of")
    parser.add_argument("--class", dest="class_", metavar="K", help="only this class, by number or name")
    parser.add_argument("--failed", action="store_true", help="print the items that failed, with their reasons")
    parser.add_argument("--limit", type=int, default=20, help="pictures of --class (default: %(default)s)")
    parser.add_argument("--images", help="where the images are now, if not where the job found them")
    parser.add_argument("--out", default="fastcam-show", help="folder of the pictures (default: %(default)s)")
    given = parser.parse_args(words[1:])
    if not (given.items or given.worst or given.class_ or given.failed):
        parser.error("choose --item, --worst, --class or --failed")
    try:
        store = Store(given.store)
        if given.failed:
            for row in np.flatnonzero(store.status == FAILED):
                print(f"{row}\t{store.ids[row]}\t{store.errors[row]}")
            return 0
        known = set(store.ids)
        items = [word if word in known or not word.isdecimal() else int(word) for word in given.items]
        for path in show(store, items=items, worst=given.worst, class_=given.class_, out=given.out,
                         images=given.images, limit=given.limit):  # fmt: skip
            print(path)
    except (ValueError, TypeError, LookupError, FileNotFoundError, JobError) as error:
        print(f"fastcam: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 1
    return 0
