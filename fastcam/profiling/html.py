"""The report as one HTML page: no script, no link to anything outside, plots inline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from math import floor, log10
from typing import Any

from .instrument import PARTS
from .plots import Panel, Point, Series, growth, roofline
from .report import fastest

__all__ = ["page"]

Row = dict[str, Any]
_PART_COLOURS = {"trunk": "#9fb8d8", "head": "#2563a8", "rules": "#d1662a", "post": "#2f8f5b", "other": "#c9c9c9"}
_PART_WORDS = {
    "trunk": "trunk: the network up to the layer, at every run",
    "head": "head: from the layer to the scores",
    "rules": "rules: gradients, multipliers or relevance, and the method's formula",
    "post": "post-processing: map, ReLU, resize, scaling, the check for what is not finite",
    "other": "other: look-up of the captured network, targets, the result object",
}
_CSS = """
body{font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:#1b1b1b;
margin:0;background:#fff}
main{max-width:1120px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:36px 0 8px}h3{font-size:14px;margin:20px 0 6px}
p{margin:6px 0;max-width:92ch}.quiet{color:#666}.facts{display:flex;flex-wrap:wrap;gap:6px 26px;margin:12px 0 4px}
.facts b{display:block;font-size:11px;font-weight:600;color:#777;text-transform:uppercase;letter-spacing:.03em}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin:4px 0 8px}
th{font-size:11.5px;font-weight:600;color:#666;text-align:right;border-bottom:1.5px solid #999;
padding:4px 8px;vertical-align:bottom}
td{padding:4px 8px;text-align:right;border-bottom:1px solid #ececec;white-space:nowrap}
th.l,td.l{text-align:left}tr.base td{background:#f5f6f8;color:#444}tr.best td.l:first-child{font-weight:600}
tr.peer td{color:#555}tr.bad td{color:#a32020}td.wrap{white-space:normal}
.bar{display:flex;height:13px;border-radius:2px;overflow:hidden}.bar i{display:block;height:100%}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:12px;color:#555;margin:4px 0 14px}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;vertical-align:-1px}
svg{max-width:100%;height:auto}code{background:#f3f3f3;padding:1px 4px;border-radius:3px}
.pct{display:inline-block;height:9px;background:#9fb8d8;border-radius:2px;vertical-align:0;margin-right:6px}
"""


def page(document: Mapping[str, Any]) -> str:
    """The page for a stored profile; ImportError with the pip command where matplotlib is missing."""
    facts, rows = document["metadata"], document["results"]
    title = f"What attribution costs on {facts['model']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _facts(facts),
        *_summary(rows),
        "<h2>Throughput</h2>",
        _key(),
        *(_table(some, title) for title, some in _settings(rows)),
        *_growths(rows),
        *_roofs(facts, rows),
        *_ops(rows),
        *_how(facts, rows),
    ]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head = f"<head>{head}<style>{_CSS}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}\n<body><main>\n{body}\n</main></body></html>\n'


def _facts(facts: Mapping[str, Any]) -> str:
    versions = facts["packages"]
    pairs = {
        "device": facts["gpu"] or f"{facts['cpu']}, {facts['threads']} thread{'s' if facts['threads'] != 1 else ''}",
        "instructions": None if facts["gpu"] else facts["isa"] or "reference only",
        "images": f"{facts['image_size']} × {facts['image_size']}",
        "parameters": f"{facts['parameters'] / 1e6:.1f} M",
        "copy bandwidth": f"{facts['copy_gbps_8mb']:.0f} GB/s at 8 MiB, {facts['copy_gbps_256mb']:.0f} at 256 MiB",
        "matrix product": ", ".join(f"{kind} {peak:.0f} GFLOP/s" for kind, peak in facts["peak_gflops"].items()),
        "fastcam, torch": f"{facts['fastcam']}, {versions['torch']}",
        "measured": facts["time"][:16].replace("T", " ") + " UTC",
    }
    cells = (f"<div><b>{escape(key)}</b>{escape(str(value))}</div>" for key, value in pairs.items() if value)
    return f'<div class="facts">{"".join(cells)}</div>'


def _settings(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    told: set[tuple[str, str, str]] = set()
    for precision, batch in dict.fromkeys((row["precision"], row["batch"]) for row in rows):
        some = [row for row in rows if (row["precision"], row["batch"]) == (precision, batch)]
        # What fails in every setting for the same reason is told once.
        some = [row for row in some if not row.get("error") or _failure(row) not in told]
        told.update(_failure(row) for row in some)
        yield f"batch {batch}, {precision}", some


def _failure(row: Row) -> tuple[str, str, str]:
    return row["method"], row["backend"], row.get("error") or ""


def _summary(rows: Sequence[Row]) -> list[str]:
    """One sentence a precision: what each method costs at the largest batch."""
    found = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        batch = max(row["batch"] for row in rows if row["precision"] == precision)
        best = [fastest(rows, method, batch, precision) for method in _methods(rows)]
        costs = [f"<b>{escape(r['method'])}</b> {r['times_forward']:.2f}" for r in best if r is not None]
        if costs:
            found.append(
                f"<p>At batch {batch} in {precision}, in multiples of the plain forward pass: {', '.join(costs)}.</p>"
            )
    return found


def _methods(rows: Sequence[Row]) -> list[str]:
    return [name for name in dict.fromkeys(row["method"] for row in rows) if name != "forward"]


def _key() -> str:
    items = (f'<span><i style="background:{_PART_COLOURS[p]}"></i>{_PART_WORDS[p]}</span>' for p in PARTS)
    return f'<div class="key">{"".join(items)}</div>'


def _table(rows: Sequence[Row], title: str) -> str:
    launched = any(row.get("launches") for row in rows)
    half = any(row.get("cosine_fp32") is not None for row in rows)
    head = [
        "images/s",
        "ms",
        "IQR",
        "× forward",
        "× faster than reference",
        "MiB",
        "launches" if launched else "op calls",
    ]
    head += ["largest error", *(["cosine to fp32"] if half else [])]
    first = '<th class="l">method</th><th class="l">backend</th>'
    last = '<th class="l" style="width:210px">where the time goes</th>'
    lines = [f"<tr>{first}{''.join(f'<th>{name}</th>' for name in head)}{last}</tr>"]
    widest = max((row["median_us"] for row in rows if row["median_us"]), default=1.0)
    best = {id(fastest(rows, row["method"], row["batch"], row["precision"])) for row in rows}
    for row in rows:
        kind = "best" if id(row) in best else ""
        if row["method"] == "forward":
            kind = "base"
        elif not row["match"]:
            kind = "bad"
        elif not row.get("stages_us"):
            kind = "peer"
        lines.append(f'<tr class="{kind}">{_cells(row, len(head) + 1, launched, half, widest)}</tr>')
    return f"<h3>{escape(title)}</h3>\n<table>{''.join(lines)}</table>"


def _cells(row: Row, columns: int, launched: bool, half: bool, widest: float) -> str:
    name = "plain forward" if row["method"] == "forward" else row["method"]
    first = f'<td class="l">{escape(name)}</td><td class="l">{escape(row["backend"])}</td>'
    if row["median_us"] is None:
        why = row.get("error") or f"MISMATCH: differs from the reference by {_number(row['max_err'], '.2g')}; not timed"
        return f'{first}<td class="l wrap" colspan="{columns}">{escape(why)}</td>'
    speedup = (row.get("speedup") or {}).get("reference")
    cells = [
        f"{row['images_per_s']:.1f}",
        _milliseconds(row["median_us"], row["median_us"]),
        _milliseconds(row["iqr_us"], row["median_us"]),
        f"{row['times_forward']:.2f}",
        _number(speedup, ".2f"),
        f"{row['peak_mib']:.1f}",
        str(row["launches"] if launched else row["op_calls"]),
        "" if row["method"] == "forward" else _number(row["max_err"], ".1e"),
        *([_number(row.get("cosine_fp32"), ".4f")] if half else []),
    ]
    return first + "".join(f"<td>{cell}</td>" for cell in cells) + f'<td class="l">{_bar(row, widest)}</td>'


def _milliseconds(us: float, median_us: float) -> str:
    """With as many decimals as give the median, or what stands beside it, three digits."""
    decimals = 2 - floor(log10(median_us / 1e3)) if median_us > 0 else 3
    return f"{us / 1e3:.{max(decimals, 0)}f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bar(row: Row, widest: float) -> str:
    stages = row.get("stages_us") or {"": row["median_us"]}
    pieces = []
    for part, us in stages.items():
        share = 100 * us / row["median_us"]
        colour = _PART_COLOURS.get(part, "#8a8f98")
        tip = f"{part or 'all'}: {us / 1e3:.3g} ms, {share:.0f} %"
        pieces.append(f'<i style="width:{share:.2f}%;background:{colour}" title="{tip}"></i>')
    width = max(100 * row["median_us"] / widest, 1)
    return f'<div class="bar" style="width:{width:.1f}%">{"".join(pieces)}</div>'


_MEASURES: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
    ("time", "ms", lambda row: row["median_us"] / 1e3),
    ("time an image", "ms", lambda row: row["median_us"] / 1e3 / row["batch"]),
    ("peak memory", "MiB", lambda row: row["peak_mib"]),
)


def _growths(rows: Sequence[Row]) -> list[str]:
    found = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        sizes = sorted({row["batch"] for row in rows if row["precision"] == precision})
        if len(sizes) < 2:
            continue
        panels = []
        for title, unit, value in _MEASURES:
            lines = []
            for method in ["forward", *_methods(rows)]:
                some = [row for size in sizes if (row := fastest(rows, method, size, precision)) is not None]
                line = [(float(row["batch"]), value(row)) for row in some if value(row) > 0]
                if line:
                    label = "plain forward" if method == "forward" else method
                    lines.append(Series(label, line, dashed=method == "forward"))
            if lines:
                panels.append(Panel(title, "batch", unit, lines))
        if panels:
            note = "<p>The fastest backend of each method.</p>"
            found += [f"<h2>Growth with the batch, {precision}</h2>", note, growth(panels)]
    return found


def _roofs(facts: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    points: dict[str, Point] = {}
    for precision in facts["peak_gflops"]:
        batch = max((row["batch"] for row in rows if row["precision"] == precision), default=0)
        several = len(facts["peak_gflops"]) > 1
        for method in ["forward", *_methods(rows)]:
            row = fastest(rows, method, batch, precision)
            if row is None:
                continue
            label = ("plain forward" if method == "forward" else method) + (f" {precision}" if several else "")
            rate = row["flops"] / row["median_us"] / 1e3
            kind = "plain forward pass" if method == "forward" else "method, whole call"
            points[label] = Point(label, row["flops"] / max(row["bytes_all_ops"], 1), rate, kind)
            for op in row.get("ops", []):
                name = op["op"] + (f" {precision}" if several else "")
                point = Point(
                    name, op["flops"] / op["bytes"], op["flops"] / op["us"] / 1e3, "fastcam op, all its calls"
                )
                if name not in points or point.gflops > points[name].gflops:
                    points[name] = point
    if not points:
        return []
    svg = roofline(list(points.values()), facts["copy_gbps_256mb"], facts["peak_gflops"])
    note = (
        "Largest batch, fastest backend. Roofs are measured here: <code>copy_</code> of 256 MiB, and a square matrix "
        "product. Bytes are counted as if every operator read its inputs from and wrote its output to memory, so what "
        "stays in a cache can stand above the slope. FLOPs: convolutions, matrix products and fastcam's ops."
    )
    return ["<h2>Roofline</h2>", f"<p>{note}</p>", svg]


def _ops(rows: Sequence[Row]) -> list[str]:
    head = ("calls", "µs", "MiB moved", "GB/s", "% of copy bandwidth for as many bytes")
    found = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        batch = max(row["batch"] for row in rows if row["precision"] == precision)
        lines = []
        for row in rows:
            if (row["precision"], row["batch"]) != (precision, batch):
                continue
            for op in row.get("ops", []):
                width = min(op["pct_copy"], 150)
                cells = (
                    str(op["calls"]), f"{op['us']:.0f}", f"{op['bytes'] / 2**20:.2f}", f"{op['gbps']:.1f}",
                )  # fmt: skip
                share = (
                    f'<td class="l"><span class="pct" style="width:{width:.0f}px"></span>{op["pct_copy"]:.0f} %</td>'
                )
                names = (op["op"], row["method"], row["backend"])
                first = "".join(f'<td class="l">{escape(name)}</td>' for name in names)
                lines.append(f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells)}{share}</tr>")
        if lines:
            top = "".join(f'<th class="l">{name}</th>' for name in ("op", "in", "backend"))
            top += "".join(f"<th>{name}</th>" for name in head[:-1]) + f'<th class="l">{head[-1]}</th>'
            found += [f"<h3>batch {batch}, {precision}</h3>", f"<table><tr>{top}</tr>{''.join(lines)}</table>"]
    if not found:
        return []
    note = (
        "fastcam's ops inside the calls above, timed where they stand, all calls of one op added up. Bytes: each input "
        "read once, each output written once. More than 100 % means that inputs were still in a cache."
    )
    return ["<h2>Ops</h2>", f"<p>{note}</p>", *found]


def _how(facts: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    counts = [row["n"] for row in rows if row["n"]]
    overheads = [row["instrument_overhead"] for row in rows if row.get("instrument_overhead") is not None]
    lines = [
        f"Calls of a group took turns, {min(counts)} to {max(counts)} rounds; medians and interquartile ranges. "
        "× forward is over the forward passes of the same turns; the row of the plain forward pass is of all turns."
        if counts
        else "Nothing was timed.",
        "Maps were compared with the reference backend's before the clock started; what differs is not timed.",
    ]
    if overheads:
        lines.append(
            "The split comes from further calls in the same turns, with marks taken at each change of stage and around "
            "each op; shares are theirs, milliseconds those of the calls without. These marks made a call "
            f"{100 * min(overheads):+.1f} to {100 * max(overheads):+.1f} % longer (median "
            f"{100 * sorted(overheads)[len(overheads) // 2]:+.1f} %; noise included)."
        )
    lines.append(
        "Memory: bytes of tensors alive at a time above what was alive before, as torch's allocator tells. "
        "Op calls: operators that reach a backend, views left out."
    )
    lines += [escape(note) for note in facts["notes"]]
    items = "".join(f"<li>{line}</li>" for line in lines)
    return ["<h2>How this was measured</h2>", f'<ul class="quiet">{items}</ul>']
