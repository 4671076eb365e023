"""The JSON that measurements leave: metadata, rows, and the promises both keep.

{"metadata": {...}, "results": [row, ...]}. The machine is a CPU or GPU model, never a host name. A row that does not
match has `match: false` and no speed-up.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastcam
from fastcam import _extension

from .measure import copy_gbps, iqr

__all__ = ["METADATA_KEYS", "ROW_KEYS", "machine_slug", "metadata", "row", "storable", "validate", "write_json"]

METADATA_KEYS = (
    *("time", "commit", "dirty", "fastcam", "build", "packages", "system", "cpu", "cores", "isa", "threads", "load"),
    *("gpu", "driver", "copy_gbps_8mb", "copy_gbps_256mb"),
)
ROW_KEYS = ("name", "median_us", "iqr_us", "n", "match", "max_err")
PACKAGES = ("torch", "torchvision", "triton", "numpy", "grad-cam", "torchcam", "captum", "zennit", "quantus")
_CHECKOUT = Path(fastcam.__file__).resolve().parents[1]


def row(name: str, seconds: Sequence[float], match: bool, **more: Any) -> dict[str, Any]:
    """One result: median, interquartile range and count of `seconds`, and whatever else the suite knows."""
    return {
        "name": name,
        "median_us": statistics.median(seconds) * 1e6,
        "iqr_us": iqr(seconds) * 1e6,
        "n": len(seconds),
        "match": match,
        **more,
    }


def metadata(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on; measures the bandwidth of `copy_` at two sizes."""
    build = None if _extension.why_not() else _extension.load().build_config()
    cuda = torch.device(device).type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
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
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _output(*query) if cuda else None,
        "copy_gbps_8mb": copy_gbps(8 << 20, device),
        "copy_gbps_256mb": copy_gbps(256 << 20, device),
    }


def _output(*command: str) -> str | None:
    """What a command prints, in fastcam's checkout; None where it fails, or where fastcam was installed without one.

    GIT_DIR and GIT_WORK_TREE, git's own variables, name the checkout that an installed fastcam was built from.
    """
    if command[0] == "git" and not (_CHECKOUT / "csrc").is_dir() and "GIT_DIR" not in os.environ:
        return None
    try:
        done = subprocess.run(command, cwd=_CHECKOUT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
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


def machine_slug(facts: Mapping[str, Any]) -> str:
    """CPU or GPU model, cores and instruction set, for file names."""
    text = f"{facts['gpu'] or facts['cpu']} {facts['cores']}c {facts['isa'] or 'reference'}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def storable(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers become null, others keep six digits."""
    if isinstance(value, Mapping):
        return {key: storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_json(path: Path, document: Mapping[str, Any], keys: Sequence[str] = ROW_KEYS) -> Path:
    """Validate (rows have at least `keys`) and store a storable document; makes the folder."""
    validate(document, keys)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def validate(document: Mapping[str, Any], keys: Sequence[str] = ROW_KEYS) -> None:
    """Raise ValueError unless a result document has the shape this module promises."""
    lacking = [key for key in METADATA_KEYS if key not in document["metadata"]]
    if lacking:
        raise ValueError(f"metadata lacks {', '.join(lacking)}")
    if not document["results"]:
        raise ValueError("no rows were measured")
    for index, entry in enumerate(document["results"]):
        lacking = [key for key in keys if key not in entry]
        if lacking:
            raise ValueError(f"row {index} lacks {', '.join(lacking)}")
        if keys is not ROW_KEYS:
            continue
        speeds = [key for key in ("speedup", "images_per_s") if entry.get(key)]
        if not entry["match"] and speeds:
            raise ValueError(f"row {index} ({entry['name']}) claims a speed for wrong results: {', '.join(speeds)}")
        timed = entry["match"] or entry["median_us"] is not None
        if timed and (not entry["median_us"] or entry["median_us"] <= 0):
            raise ValueError(f"row {index}: median_us must be positive, got {entry['median_us']!r}")
