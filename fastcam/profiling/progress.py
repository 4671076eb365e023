"""A progress bar, where somebody can see it."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["Progress"]

_WIDTH = 24


class Progress:
    """`with Progress(total) as bar: bar.step("what comes now")` for each of `total` steps.

    Draws on a terminal only, over itself, and leaves an empty line behind.
    """

    def __init__(self, total: int, enabled: bool = True, stream: TextIO | None = None):
        self._total = total
        self._stream = stream or sys.stderr
        self._enabled = enabled and self._stream.isatty()
        self._done = -1
        self._start = time.perf_counter()
        self._drawn = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._draw("")

    def step(self, what: str) -> None:
        """One more step begins."""
        self._done += 1
        full = _WIDTH * self._done // max(self._total, 1)
        left = ""
        if self._done > 0:
            elapsed = time.perf_counter() - self._start
            left = f", {elapsed * (self._total - self._done) / self._done:.0f} s left"
        self._draw(f"[{'#' * full}{'.' * (_WIDTH - full)}] {self._done}/{self._total} {what}{left}")

    def _draw(self, text: str) -> None:
        if self._enabled:
            self._stream.write(f"\r{text:<{self._drawn}}" + ("" if text else "\r"))
            self._stream.flush()
            self._drawn = len(text)
