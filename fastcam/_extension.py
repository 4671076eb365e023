"""Loads `fastcam._C` once and says truthfully why it cannot.

Policy: the build writes `fastcam/_build.json` beside the package, whether it compiled anything or not. Loading compares
that record with the running torch, CUDA and Python *before* the shared library is opened, because a library for another
torch fails with undefined symbols that nobody can read. Success and failure are both cached; every fallback line and
every forced-backend error repeats the reason.
"""

from __future__ import annotations

import functools
import importlib
import json
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CURE = "pip install --no-build-isolation --force-reinstall --no-deps ."
RECORD = Path(__file__).with_name("_build.json")


class ExtensionNotBuilt(ImportError):
    """`fastcam._C` was not compiled, or its compilation failed."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"fastcam's C++ extension is not built: {reason}. Cure, in the source directory: {CURE}")
        self.reason = reason


class ExtensionMismatch(ImportError):
    """`fastcam._C` was compiled for another torch, CUDA or Python than the running one."""

    def __init__(self, built_for: dict[str, Any], running: dict[str, Any]) -> None:
        different = ", ".join(
            f"{k} {built_for.get(k)} (running: {v})" for k, v in running.items() if built_for.get(k) != v
        )
        super().__init__(f"fastcam's C++ extension was built for {different}. Cure, in the source directory: {CURE}")
        self.built_for, self.running = built_for, running


def running() -> dict[str, Any]:
    """What an extension must have been built for to be loaded here."""
    return abi_key(torch.__version__, torch.version.cuda, platform.python_version())


def abi_key(torch_version: str, cuda_version: str | None, python_version: str) -> dict[str, Any]:
    """The versions that decide binary compatibility: torch major.minor, CUDA major, Python tag."""
    return {
        "torch": ".".join(torch_version.split(".")[:2]),
        "cuda": cuda_version.split(".")[0] if cuda_version else None,
        "python": "cp" + "".join(python_version.split(".")[:2]),
    }


def build_record() -> dict[str, Any]:
    """`fastcam/_build.json`, or a record that says it is missing."""
    if not RECORD.is_file():
        return {"built": False, "reason": f"{RECORD} is missing, so this package was never installed or built"}
    return dict(json.loads(RECORD.read_text()))


@functools.cache
def _load() -> ModuleType | ImportError:
    record = build_record()
    if not record["built"]:
        return ExtensionNotBuilt(record["reason"])
    built_for = abi_key(record["torch"], record["cuda"], record["python"])
    if built_for != running():
        return ExtensionMismatch(built_for, running())
    try:
        return importlib.import_module("fastcam._C")
    except ImportError as error:
        failure = ExtensionNotBuilt(f"{RECORD} says it was, but importing it failed: {error}")
        failure.__cause__ = error
        return failure


def load() -> ModuleType:
    """`fastcam._C`; raises ExtensionNotBuilt or ExtensionMismatch with the reason and the cure."""
    module = _load()
    if isinstance(module, ImportError):
        raise module
    return module


def why_not() -> str | None:
    """None if the extension is loaded, else the reason with its cure."""
    module = _load()
    return str(module) if isinstance(module, ImportError) else None
