"""Attribution over data sets: one command, a store that loses nothing, one machine or a Ray cluster."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["JobError", "Store", "Summary", "merge", "run"]

_HOMES = {"JobError": "writer", "Store": "store", "Summary": "progress", "merge": "merging", "run": "job"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastcam.jobs' has no attribute {name!r}")
