"""Compares the times of two result files, or of the result files of two commits, beyond their noise.

    python -P benchmarks/compare.py OLD NEW [--suite cam_map] [--threshold 5] [--by times_forward] [--strict]

OLD, NEW   JSON files of a benchmark or of `fastcam profile`, or commits, whose files under benchmarks/results are
           compared suite by suite, machine by machine
--by       the figure: `median_us` (default), or one that was measured beside something else in the same turns and so
           does not follow the machine's mood: `times_forward` (methods), `pct_copy` (ops; more is better)
--strict   exit with status 1 where something got slower, rather than only say so

A change counts where it exceeds the larger of the threshold (per cent) and three standard errors of the ratio. A
median's standard error is taken as 0.93 IQR / sqrt(n), that of a normal sample; what both runs share (a busy machine, a
different one) is in no standard error, so files of different machines, threads or devices are compared under protest.
Rows that do not match are no faster and no slower: they are wrong, and are listed as such.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("median_us", "times_forward", "pct_copy")
#: What has to be alike for times to be comparable.
ALIKE = ("cpu", "gpu", "cores", "isa", "threads")

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A row in both files: new over old time (above 1: slower), the margin it has to leave, and what that makes it."""

    name: str
    ratio: float
    margin: float
    verdict: str


def standard_error(row: Mapping[str, Any]) -> float:
    """Of a row's median, relative to it."""
    return 0.93 * row["iqr_us"] / math.sqrt(row["n"]) / row["median_us"]


def change(old: Mapping[str, Any], new: Mapping[str, Any], threshold: float, figure: str) -> Change | None:
    """How a row changed; None where either lacks the figure. threshold as a fraction."""
    wrong = [word for word, row in (("before", old), ("now", new)) if not row["match"]]
    if wrong:
        return Change(new["name"], math.nan, math.nan, f"wrong result {' and '.join(wrong)}")
    if not old.get(figure) or not new.get(figure):
        return None
    ratio = old[figure] / new[figure] if figure == "pct_copy" else new[figure] / old[figure]
    margin = max(threshold, 3 * math.hypot(standard_error(old), standard_error(new)))
    # On a log scale, so that exchanging the files exchanges the verdicts.
    beyond = abs(math.log(ratio)) > math.log1p(margin)
    verdict = "" if not beyond else "slower" if ratio > 1 else "faster"
    return Change(new["name"], ratio, margin, verdict)


def changes(old: Document, new: Document, threshold: float, figure: str = "median_us") -> list[Change]:
    """Of all rows in both documents."""
    before = {row["name"]: row for row in old["results"] if "median_us" in row}
    pairs = ((before[row["name"]], row) for row in new["results"] if row["name"] in before)
    return [found for a, b in pairs if (found := change(a, b, threshold, figure)) is not None]


def differences(old: Document, new: Document) -> list[str]:
    """What differs between the machines of two documents."""
    a, b = old["metadata"], new["metadata"]
    return [f"{key}: {a.get(key)} and {b.get(key)}" for key in ALIKE if a.get(key) != b.get(key)]


def documents(place: str, suite: str) -> Iterator[tuple[str, Document]]:
    """(name, document) of a file, or of every result file of a commit whose suite has that name ("": all)."""
    if Path(place).is_file():
        yield "", json.loads(Path(place).read_text())
        return
    listed = _git("ls-tree", "-r", "--name-only", place, "--", "benchmarks/results")
    for path in listed.splitlines():
        name = Path(path).stem
        if path.endswith(".json") and suite in ("", name.split("--")[0]):
            yield name, json.loads(_git("show", f"{place}:{path}"))


def _git(*words: str) -> str:
    done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"compare: neither a file nor a commit with results: {' '.join(done.stderr.split())}")
    return done.stdout


def shown(found: Sequence[Change]) -> Iterator[str]:
    """Lines: what changed, the largest change first, then what is wrong, then how many did not change."""
    moved = sorted(
        (one for one in found if one.verdict in ("slower", "faster")), key=lambda one: -abs(math.log(one.ratio))
    )
    for one in moved:
        percent = 100 * (one.ratio - 1)
        yield f"  {one.verdict}  {percent:+6.1f} %  (noise and threshold {100 * one.margin:.1f} %)  {one.name}"
    wrong = [one for one in found if one.verdict.startswith("wrong")]
    yield from (f"  {one.verdict}: {one.name}" for one in wrong)
    yield f"  {len(found) - len(moved) - len(wrong)} of {len(found)} rows did not change beyond noise"


def main(words: Sequence[str] | None = None) -> int:
    """Print the comparison; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--suite", default="", help="only this suite (of commits)")
    parser.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT", help="smallest change (default: 5)")
    parser.add_argument("--by", choices=FIGURES, default=FIGURES[0])
    parser.add_argument("--strict", action="store_true", help="status 1 where something got slower or wrong")
    given = parser.parse_args(words)
    before = dict(documents(given.old, given.suite))
    slower = compared = 0
    for name, new in documents(given.new, given.suite):
        if name not in before:
            continue
        found = changes(before[name], new, given.threshold / 100, given.by)
        if not found:
            continue
        compared += 1
        print(name or f"{given.old} and {given.new}")
        for text in differences(before[name], new):
            print(f"  not the same machine: {text}")
        print("\n".join(shown(found)))
        slower += sum(one.verdict == "slower" or one.verdict.endswith("now") for one in found)
    if not compared:
        print("compare: no result file in both has timed rows of one name", file=sys.stderr)
        return 2
    return 1 if given.strict and slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
