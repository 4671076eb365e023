"""`fastcam report`: a store as one HTML page, with thumbnails, filters and summary plots."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastcam import render

from .layout import DONE, FAILED, PENDING
from .pictures import Pictures, colormap_of, confidences
from .sources import ItemError
from .sources.folder import MARK, own_folder
from .store import Store
from .writer import JobError

__all__ = ["main", "report"]

#: Longer side of a map in the page; larger maps are averaged down to it.
MAP_SIDE = 48
STATUS = {PENDING: "pending", DONE: "done", FAILED: "failed"}


def report(
    store: str | Path | Store,
    out: str | Path = "report.html",
    *,
    images: Any = None,
    side: int = 128,
    embed: float = 24.0,
    limit: int | None = None,
    workers: int | None = None,
) -> Path:
    """Writes one HTML page that shows a store's items with their maps over them, and returns its path.

    out      the page. It needs no other file and asks nothing of any server while its thumbnails fit into `embed`;
             beyond, they lie in a folder beside it (report_files/) and are read as they come into sight
    images   where the items are now, if not where the job found them
    side     longer side of a thumbnail in pixels
    embed    MB of thumbnails to hold inside the page
    limit    only the first items, where a page of all would be too much
    workers  decode threads

    Maps are drawn by the page, from 8 bits a cell at layer size (at most 48 cells a side): they can be faded without
    another picture. Of several targets an item the first is shown. Texts of the data (ids, reasons, classes) are data
    to the page, never markup.
    Where the images are gone the maps are drawn alone, and the page says so; a store without a single map makes a page
    of reasons. Raises ValueError where `images` cannot be opened. Cost: every picture is read and resized once; 2 to
    4 kB of thumbnail and about 100 bytes an item besides.
    """
    store = store if isinstance(store, Store) else Store(store)
    count = len(store) if limit is None else min(limit, len(store))
    pictures = Pictures(store, images)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.stem}_files")
    _clear(folder)
    inside: list[str | None] = []
    held = 0
    for row, data in enumerate(_thumbnails(pictures, count, side, workers)):
        held += len(data or b"")
        if held > embed * 1e6 and not folder.is_dir():
            own_folder(folder)
            for earlier, text in enumerate(inside):
                if text:
                    (folder / f"{earlier}.webp").write_bytes(base64.b64decode(text))
            inside = [text and "" for text in inside]
        if data is not None and folder.is_dir():
            (folder / f"{row}.webp").write_bytes(data)
        inside.append(None if data is None else "" if folder.is_dir() else base64.b64encode(data).decode())
    facts = _facts(store, pictures, count)
    note = f" · without pictures: {pictures.missing}" if pictures.missing else ""
    facts |= {"thumbnails": inside, "folder": folder.name if folder.is_dir() else None, "side": side}
    partial = out.with_name(out.name + ".partial")
    partial.write_text(_page(store, facts, note), encoding="utf-8")
    os.replace(partial, out)
    return out


def _clear(folder: Path) -> None:
    """Delete the thumbnails of an earlier page; FileExistsError where the folder holds anything else."""
    if not folder.is_dir():
        return
    foreign = [p.name for p in folder.iterdir() if p.name != MARK and not re.fullmatch(r"\d+\.webp", p.name)]
    if foreign:
        raise FileExistsError(f"{folder} holds {foreign[0]!r}, which no report made; choose another --out")
    shutil.rmtree(folder)


def _thumbnails(pictures: Pictures, count: int, side: int, workers: int | None) -> Iterator[bytes | None]:
    """WebP files in order, None where there is no picture; a bounded number is decoded ahead."""
    from PIL import Image

    def one(row: int) -> bytes | None:
        if pictures.missing or pictures.store.status[row] == PENDING:
            return None
        try:
            pixels = (pictures.view(row).movedim(0, -1) * 255).round().to(torch.uint8).numpy()
        except ItemError:
            return None
        except ValueError:  # how the model wants its pictures is not known
            return None
        picture = Image.fromarray(pixels)
        picture.thumbnail((side, side), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=70, method=2)
        return file.getvalue()

    assert pictures.store.digests is not None  # read once, before the threads do
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, count, 256):
            yield from pool.map(one, range(start, min(start + 256, count)))


def _facts(store: Store, pictures: Pictures, count: int) -> dict[str, Any]:
    """What the page's script works on: a column a key."""
    targets = store.targets if store.targets.ndim == 1 else store.targets[:, 0]
    labels = pictures.labels(count)
    sure = confidences(store, labels, count)
    numbers = sorted({*targets[:count].tolist(), *labels.tolist()})
    maps, shape = _maps(store, count)
    reasons = sorted(set(store.errors[:count]))
    place = {reason: number for number, reason in enumerate(reasons)}
    return {
        "ids": store.ids[:count],
        "status": [int(status) for status in store.status[:count]],
        "reasons": reasons,
        "reason": [place[reason] for reason in store.errors[:count]],
        "target": [int(target) for target in targets[:count]],
        "label": [None if label < 0 else label for label in labels.tolist()],
        "score": [None if np.isnan(value) else round(float(value), 5) for value in sure],
        "names": {str(number): pictures.name(number) for number in numbers if number >= 0},
        "maps": base64.b64encode(maps.tobytes()).decode(),
        "shape": shape,
        "signed": bool(store.provenance["signed"]),
        "colours": [[round(channel) for channel in colour] for colour in render.colours(colormap_of(store)).tolist()],
    }


def _maps(store: Store, count: int) -> tuple[np.ndarray, list[int]]:
    """(count, h, w) uint8 of the first target's maps, min-max to 0..255 or signed around 128, and [h, w]."""
    parts = []
    if 0 in store.layout.map_shape:  # no image could be read
        return np.zeros((count, 1, 1), np.uint8), [1, 1]
    for start in range(0, count, 512):
        maps = store.maps(start, min(start + 512, count))
        maps = maps[:, 0] if store.layout.several else maps
        if max(maps.shape[1:]) > MAP_SIDE:
            scale = MAP_SIDE / max(maps.shape[1:])
            size = [max(1, round(n * scale)) for n in maps.shape[1:]]
            maps = functional.adaptive_avg_pool2d(maps.unsqueeze(1), size)[:, 0]
        parts.append(_bytes(maps, bool(store.provenance["signed"])))
    whole = np.concatenate(parts) if parts else np.zeros((0, 1, 1), np.uint8)
    return whole, list(whole.shape[1:])


def _bytes(maps: Tensor, signed: bool) -> np.ndarray:
    values = (maps.clamp(-1, 1) + 1) / 2 if signed else maps.clamp(0, 1)
    return (values * 255).round().to(torch.uint8).numpy()


def _page(store: Store, facts: dict[str, Any], note: str) -> str:
    here = Path(__file__).parent
    provenance = store.provenance
    title = f"{provenance['method']} · {provenance['model']}"
    counts = Counter(facts["status"])
    told = " · ".join(f"{counts[code]} {name}" for code, name in STATUS.items() if counts[code])
    # "<" must not stand in a script element: an id could end it.
    data = json.dumps(facts, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    rows = {
        "model": provenance["model"],
        "weights": provenance["weights_hash"],
        "method": f"{provenance['method']} {json.dumps(provenance['options'])}",
        "layer": provenance.get("layer_used") or provenance.get("layer"),
        "targets": provenance["targets"],
        "source": f"{provenance['source'].get('kind')}: {provenance['source'].get('where')}",
        "versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
        "commit": provenance.get("commit"),
    }
    table = "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in rows.items() if v is not None)
    fields = {
        "TITLE": html.escape(title),
        "COUNTS": html.escape(f"{len(facts['ids'])} items: {told}{note}"),
        "PROVENANCE": table,
        "PLOTS": _plots(facts),
        "DATA": data,
    }
    page = (here / "report.html").read_text(encoding="utf-8")
    head, *parts = page.split("{{")
    pieces = [head]
    for part in parts:  # split first: a value may hold what looks like a field
        name, rest = part.split("}}", 1)
        pieces += [fields[name], rest]
    return "".join(pieces)


def _plots(facts: dict[str, Any]) -> str:
    """Inline SVG: a histogram of confidence, the classes explained most often, and the reasons of failures."""
    sure = np.array([value for value in facts["score"] if value is not None])
    parts = []
    if len(sure):
        low, high = (0.0, 1.0) if sure.min() >= 0 and sure.max() <= 1 else (float(sure.min()), float(sure.max()))
        heights, edges = np.histogram(sure, bins=20, range=(low, high if high > low else low + 1))
        names = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(edges)]
        parts.append(_bars("Confidence", names, heights, f"{low:.3g}", f"{high:.3g}"))
    counted = Counter(target for target in facts["target"] if target >= 0).most_common(12)
    if counted:
        names = [facts["names"].get(str(number), str(number)) for number, _ in counted]
        parts.append(_rows("Targets explained", names, [count for _, count in counted]))
    failed = Counter(facts["reasons"][r] for r, s in zip(facts["reason"], facts["status"], strict=True) if s == FAILED)
    if failed:
        top = failed.most_common(8)
        parts.append(_rows("Why items failed", [reason for reason, _ in top], [n for _, n in top], "#c0392b"))
    return "".join(parts)


def _bars(title: str, names: list[str], heights: np.ndarray, low: str, high: str) -> str:
    most, bars = max(1, int(heights.max())), []
    for place, (name, height) in enumerate(zip(names, heights, strict=True)):
        tall = 100 * height / most
        bars.append(
            f'<rect x="{place * 16}" y="{110 - tall:.1f}" width="14" height="{tall:.1f}" fill="#3b6fb5">'
            f"<title>{html.escape(name)}: {height}</title></rect>"
        )
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 320 130" width="320" height="130">'
        f'{"".join(bars)}<text x="0" y="125">{low}</text><text x="318" y="125" text-anchor="end">{high}</text>'
        f"<text x='318' y='10' text-anchor='end'>{most}</text></svg></figure>"
    )


def _rows(title: str, names: list[str], counts: list[int], colour: str = "#3b6fb5") -> str:
    most, bars = max(counts), []
    left = 14 + min(196, 7 * max(map(len, names)))
    for place, (name, count) in enumerate(zip(names, counts, strict=True)):
        y, wide = 16 * place, 150 * count / most
        shown = name if len(name) <= 32 else name[:31] + "…"
        bars.append(
            f'<g><title>{html.escape(name)}: {count}</title><text x="0" y="{y + 11}">{html.escape(shown)}</text>'
            f'<rect x="{left}" y="{y + 1}" width="{wide:.1f}" height="12" fill="{colour}"/>'
            f'<text x="{left + 4 + wide:.1f}" y="{y + 11}">{count}</text></g>'
        )
    size = f'viewBox="0 0 {left + 200} {16 * len(names)}" width="{left + 200}" height="{16 * len(names)}"'
    return f"<figure><figcaption>{html.escape(title)}</figcaption><svg {size}>{''.join(bars)}</svg></figure>"


def main(words: Sequence[str]) -> int:
    """Run `report ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fastcam report", description="A store as one HTML page.")
    parser.add_argument("store", help="e.g. maps.zarr")
    parser.add_argument("--out", default="report.html", help="the page (default: %(default)s)")
    parser.add_argument("--images", help="where the images are now, if not where the job found them")
    parser.add_argument("--side", type=int, default=128, help="of a thumbnail, in pixels (default: %(default)s)")
    parser.add_argument("--embed", type=float, default=24.0, metavar="MB", help="of thumbnails inside the page; more "
                        "lie in a folder beside it (default: %(default)s)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument("--workers", type=int, help="decode threads")
    given = vars(parser.parse_args(words[1:]))
    try:
        print(report(given.pop("store"), given.pop("out"), **given))
    except (ValueError, TypeError, FileNotFoundError, JobError) as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 1
    return 0
