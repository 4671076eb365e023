"""How every benchmark here measures, and the JSON it leaves.

Contract: outputs are compared before anything is timed; a row that does not match has `match: false` and no speed-up.
The calls of a row take turns, so that drift and neighbours on the machine hit all alike; the figure is the median, with
the interquartile range beside it. Threads are those of torch, recorded. `pct_copy` relates a row to `copy_` moving the
same number of bytes (read plus written) in the same turn-taking. Each suite writes
`benchmarks/results/<version>/<suite>--<machine>--<device>.json`; the machine is a CPU or GPU model, never a host name.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcam
from fastcam import _extension

ROOT = Path(__file__).resolve().parent
METADATA_KEYS = (
    *("time", "commit", "dirty", "fastcam", "build", "packages", "system", "cpu", "cores", "isa", "threads", "load"),
    *("gpu", "driver", "copy_gbps_8mb", "copy_gbps_256mb"),
)
ROW_KEYS = ("name", "median_us", "iqr_us", "n", "match", "max_err")
#: Rows of suites that measure how good a method is rather than how fast: a figure over n draws and its standard error.
QUALITY_KEYS = ("name", "mean", "standard_error", "n")
PACKAGES = ("torch", "torchvision", "triton", "numpy", "grad-cam", "torchcam", "captum", "zennit", "quantus")

Calls = Mapping[str, Callable[[], Any]]
Times = dict[str, list[float]]
Results = Tensor | tuple[Tensor, ...]


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options all suites share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=15, help="turns of a row's calls (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the JSON file")
    return parser


def agree(found: Results, expected: Results, limit: float) -> tuple[bool, float]:
    """Whether shapes are equal and the largest absolute difference is at most `limit`; and that difference."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        pairs = [agree(a, b, limit) for a, b in zip(found, expected, strict=True)]
        return all(match for match, _ in pairs), max(error for _, error in pairs)
    if found.shape != expected.shape:
        return False, math.inf
    error = (found.double() - expected.double()).abs().max().item() if found.numel() else 0.0
    return error <= limit, error


def alternate(calls: Calls, rounds: int, device: str = "cpu", warmup: int = 3) -> Times:
    """Seconds of every call, taking turns for `rounds` rounds after `warmup` unmeasured ones."""
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: Times = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(clock(call))
    finally:
        gc.enable()
    return times


def _cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ratio(times: Times, name: str, to: str) -> float:
    """Median time of one call as a multiple of another's."""
    return statistics.median(times[name]) / statistics.median(times[to])


def copier(nbytes: int, device: str = "cpu") -> Callable[[], Tensor]:
    """`copy_` that reads and writes `nbytes` altogether."""
    source = torch.ones(max(1, nbytes // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def row(name: str, seconds: Sequence[float], match: bool, **more: Any) -> dict[str, Any]:
    """One result: median, interquartile range and count of `seconds`, and whatever else the suite knows."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    median = statistics.median(seconds)
    return {
        "name": name,
        "median_us": median * 1e6,
        "iqr_us": (high - low) * 1e6,
        "n": len(seconds),
        "match": match,
        **more,
    }


def op_row(
    name: str, ours: Callable[[], Results], baselines: Calls, expected: Results, limit: float, nbytes: int,
    options: argparse.Namespace, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row of an op benchmark: `ours` beside its baselines and beside `copy_` of the `nbytes` the op must move."""
    match, error = agree(ours(), expected, limit)
    calls = {"ours": ours, "copy": copier(nbytes, options.device), **baselines}
    times = alternate(calls, options.rounds, options.device)
    mine = statistics.median(times["ours"])
    found = row(
        name, times["ours"], match, max_err=error, bytes_moved=nbytes, gbps=nbytes / mine / 1e9,
        pct_copy=100 * ratio(times, "copy", "ours"),
        baselines_us={other: statistics.median(times[other]) * 1e6 for other in baselines},
        speedup={other: ratio(times, other, "ours") for other in baselines} if match else None, **more,
    )  # fmt: skip
    speedups = ", ".join(f"{ratio(times, other, 'ours'):.1f}x {other}" for other in baselines)
    verdict = speedups if match else f"MISMATCH, error {error:.3g}"
    print(f"{name}: {mine * 1e6:.0f} us, {found['pct_copy']:.0f} % of copy, {verdict}", flush=True)
    return found


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
    at_once = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
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


def metadata(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on."""
    build = None if _extension.why_not() else _extension.load().build_config()
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain")),
        "fastcam": fastcam.__version__,
        "build": build,
        "packages": {name: _installed(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": build["isa"] if build else None,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device == "cuda"
        else None,
        "copy_gbps_8mb": _copy_gbps(8 << 20, device),
        "copy_gbps_256mb": _copy_gbps(256 << 20, device),
    }


def _copy_gbps(nbytes: int, device: str) -> float:
    return nbytes / statistics.median(alternate({"copy": copier(nbytes, device)}, 9, device)["copy"]) / 1e9


def _output(*command: str) -> str | None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", path.read_text()) if path.is_file() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(
    suite: str, device: str, rows: Sequence[Mapping[str, Any]], out: Path, keys: Sequence[str] = ROW_KEYS, **more: Any
) -> Path:
    """Validate (rows have at least `keys`) and store rows with the metadata (and `more` of it); returns the path."""
    facts = metadata(device) | more
    document = _storable({"metadata": facts, "results": list(rows)})
    validate(document, keys)
    machine = _slug(f"{facts['gpu'] or facts['cpu']} {facts['cores']}c {facts['isa'] or 'reference'}")
    path = Path(out) / fastcam.__version__ / f"{suite}--{machine}--{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}")
    return path


def _storable(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers become null, others keep six digits."""
    if isinstance(value, Mapping):
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def validate(document: Mapping[str, Any], keys: Sequence[str] = ROW_KEYS) -> None:
    """Raise ValueError unless a result document has the shape this module promises."""
    lacking = [key for key in METADATA_KEYS if key not in document["metadata"]]
    if lacking:
        raise ValueError(f"metadata lacks {', '.join(lacking)}")
    if not document["results"]:
        raise ValueError("no rows: does --only match any?")
    for index, entry in enumerate(document["results"]):
        lacking = [key for key in keys if key not in entry]
        if lacking:
            raise ValueError(f"row {index} lacks {', '.join(lacking)}")
        if keys is not ROW_KEYS:
            continue
        if not entry["match"] and entry.get("speedup"):
            raise ValueError(f"row {index} ({entry['name']}) claims a speed-up for wrong results")
        if not entry["median_us"] or entry["median_us"] <= 0:
            raise ValueError(f"row {index}: median_us must be positive, got {entry['median_us']!r}")
