"""How every benchmark here measures, and the JSON it leaves.

Contract: outputs are compared before anything is timed; a row that does not match has `match: false` and no speed-up.
The calls of a row take turns, so that drift and neighbours on the machine hit all alike; the figure is the median, with
the interquartile range beside it, and a multiple is the median of the turns' quotients. Threads are those of torch,
recorded. `pct_copy` relates a row to `copy_` moving the same number of bytes (read plus written) in the same turns.
Timing and the JSON are those of `fastcam profile` (`fastcam.profiling.measure`, `fastcam.profiling.results`). Each
suite writes `benchmarks/results/<version>/<suite>--<machine>--<device>.json`; the machine is a CPU or GPU model, never
a host name.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastcam
from fastcam.profiling.measure import Calls, Results, agree, alternate, copier, ratio
from fastcam.profiling.results import ROW_KEYS, machine_slug, metadata, row, storable, write_json

__all__ = [
    *("DEVICES", "QUALITY_KEYS", "ROOT", "ROW_KEYS", "Calls", "agree", "alternate", "arguments", "copier", "keep_heap"),
    *("kept", "op_row", "peak_mib", "ratio", "row", "table", "write"),
]

ROOT = Path(__file__).resolve().parent
#: Of suites that take their tensors and networks to `--device`.
DEVICES = ("cpu", "cuda")
#: Rows of suites that measure how good a method is rather than how fast: a figure over n draws and its standard error.
QUALITY_KEYS = ("name", "mean", "standard_error", "n")


def keep_heap() -> None:
    """Start this process again so that freed memory stays with it; for suites that compare with a forward pass.

    The C library may give the memory of a pass back to the system and fault it in again, page by page, in the next: up
    to a fifth of a ResNet-50's forward pass, in some states of the heap and for some of the calls.
    """
    kept = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
    if not all(name in os.environ for name in kept):
        os.execve(sys.executable, [sys.executable, "-P", *sys.argv], {**os.environ, **kept})


def arguments(description: str, devices: Sequence[str] = ("cpu",)) -> argparse.ArgumentParser:
    """A parser with the options all suites share; `devices` are those that the suite takes its tensors to."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=15, help="turns of a row's calls (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", choices=devices)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the JSON file")
    return parser


def op_row(
    name: str, ours: Callable[[], Results], baselines: Calls, expected: Results, limit: float, nbytes: int,
    options: argparse.Namespace, op: str, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row of an op benchmark: `ours` beside its baselines and beside `copy_` of the `nbytes` the op must move.

    The row has the op's `backend`. Where another kernel than the reference could serve the device, as Triton beside
    CUDA C++, `ours` by that one is a baseline of its name, if its results are right.
    """
    match, error = agree(ours(), expected, limit)
    backend, *others = _kernels(op, options.device)
    for other in others:
        call = _by(other, ours)
        right, wrong_by = agree(call(), expected, limit)
        if right:
            baselines = {**baselines, other: call}
        else:
            print(f"{name}: MISMATCH by {other}, error {wrong_by:.3g}; not timed", flush=True)
    calls = {"ours": ours, "copy": copier(nbytes, options.device), **baselines}
    times = alternate(calls, options.rounds, options.device)
    mine = statistics.median(times["ours"])
    found = row(
        name, times["ours"], match, max_err=error, bytes_moved=nbytes, gbps=nbytes / mine / 1e9,
        pct_copy=100 * ratio(times, "copy", "ours"),
        baselines_us={other: statistics.median(times[other]) * 1e6 for other in baselines},
        speedup={other: ratio(times, other, "ours") for other in baselines} if match else None, op=op,
        backend=backend, **more,
    )  # fmt: skip
    speedups = ", ".join(f"{ratio(times, other, 'ours'):.1f}x {other}" for other in baselines)
    verdict = speedups if match else f"MISMATCH, error {error:.3g}"
    print(f"{name}: {mine * 1e6:.0f} us, {found['pct_copy']:.0f} % of copy, {verdict}", flush=True)
    return found


def _kernels(op: str, device: str) -> list[str]:
    """The backend that serves `op` here, and the other kernels that could."""
    facts = fastcam.backends()
    here = facts["ops"][op][device]
    taken = here["auto"] if facts["chosen"] == "auto" else facts["chosen"]
    compiled = ("cuda", "triton") if device == "cuda" else ("cpp",)
    return [taken, *(name for name in compiled if name != taken and name not in here["reasons"])]


def _by(backend: str, call: Callable[[], Results]) -> Callable[[], Results]:
    def forced() -> Results:
        with fastcam.backend(backend):
            return call()

    return forced


def peak_mib(script: str, setup: str, call: str, *arguments: object, **environment: str) -> float:
    """Peak resident MiB of the statement `call` above the state before it, in a fresh process, after one for warmth.

    script     path of the suite; `setup` may import it by name, and reads `arguments` as sys.argv[1:]
    environment  further variables of the process
    """
    code = (
        f"import sys, torch; sys.path.insert(0, {str(Path(script).parent)!r})\n{setup}\n{call}\n"
        "def status(key):\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key))\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        f"before = status('VmRSS:'); {call}; print(status('VmHWM:') - before)\n"
    )
    # Blocks above 1 MiB come from and go back to the system at once, so that resident memory follows the tensors.
    at_once = {name: str(1 << 20) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    at_once["MALLOC_MMAP_MAX_"] = str(1 << 16)  # the C library's default, whatever `keep_heap` has set
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **at_once, **environment}
    )
    return int(done.stdout.split()[-1]) / 1024


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print rows, one column a key."""
    cells = [list(columns)] + [[_cell(entry.get(key)) for key in columns] for entry in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(
    suite: str, device: str, rows: Sequence[Mapping[str, Any]], out: Path, keys: Sequence[str] = ROW_KEYS,
    parts: bool = False, **more: Any,
) -> Path:  # fmt: skip
    """Validate (rows have at least `keys`) and store rows with the metadata (and `more` of it); returns the path.

    parts  add to the rows and facts that the file has of the same commit, for suites that run in parts
    """
    facts = metadata(device) | more
    path = Path(out) / fastcam.__version__ / f"{suite}--{machine_slug(facts)}--{device}.json"
    rows = list(rows)
    if parts and path.is_file():
        there = json.loads(path.read_text())
        if there["metadata"]["commit"] == facts["commit"]:
            names = {entry["name"] for entry in rows}
            rows = [entry for entry in there["results"] if entry["name"] not in names] + rows
            facts = there["metadata"] | facts
    write_json(path, storable({"metadata": facts, "results": rows}), keys)
    print(f"wrote {path}")
    return path


def kept(suite: str, out: Path) -> dict[str, dict[str, Any]]:
    """Rows of the suite's newest CPU result file, by name; for suites that are made in parts."""
    files = (Path(out) / fastcam.__version__).glob(f"{suite}--*--cpu.json")
    documents = sorted((json.loads(path.read_text()) for path in files), key=lambda found: found["metadata"]["time"])
    return {row["name"]: row for row in documents[-1]["results"]} if documents else {}
