"""Facts of a job's provenance: option values as JSON has them, versions, the commit."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastcam
from fastcam.methods import single

__all__ = ["commit", "completed", "plain", "versions"]


def plain(value: Any) -> Any:
    """`value` as JSON has it, so that it compares equal with what comes back from a file."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        return f"{type(value).__name__}{tuple(value.shape)} sha256 {digest}"
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else str(value) if isinstance(value, Path) else type(value).__qualname__


def completed(facts: dict[str, Any]) -> dict[str, Any]:
    """A store's facts, of an older version perhaps: options its method did not have yet stand at their defaults."""
    defaults = plain(single(facts["method"]).make_options({}))
    return {**facts, "options": {**defaults, **facts["options"]}}


def versions() -> dict[str, str]:
    found = {"fastcam": fastcam.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "zarr", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout that runs, where it is one."""
    root = Path(fastcam.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
