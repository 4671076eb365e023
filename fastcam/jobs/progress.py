"""What a running job says about itself."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Meter", "Summary"]

#: Seconds between lines, on a terminal (where one replaces the other) and elsewhere.
TERMINAL, LOG = 0.5, 30.0
STAGES = ("decode", "wait", "attribute", "write")


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    items       items of the store
    done        of them, done by now
    failed      of them, failed by now; their reasons stand in the store
    processed   items this run worked on
    seconds     time of this run, from the first image on
    rate        images a second of it
    batch_size  images a batch
    split       seconds spent to "decode" (all workers together), "wait" for decoded images, "attribute", "write"
    """

    store: Path
    items: int
    done: int
    failed: int
    processed: int
    seconds: float
    rate: float
    batch_size: int
    split: dict[str, float]

    @property
    def exit_code(self) -> int:
        """0 where every item is done, 3 where some failed, 1 where some were not reached."""
        return 1 if self.done + self.failed < self.items else 3 if self.failed else 0

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "store": str(self.store), "exit_code": self.exit_code}

    def __str__(self) -> str:
        rate = f", {self.processed} in {clock(self.seconds)} ({self.rate:.1f} images/s)" if self.processed else ""
        return f"{self.store}: {self.done} of {self.items} done, {self.failed} failed{rate}"


@dataclass
class Meter:
    """Counts items and seconds; threads add to it, and it prints a line now and then."""

    total: int
    done: int = 0
    failed: int = 0
    quiet: bool = True
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def __post_init__(self) -> None:
        self.processed = 0
        self.split = dict.fromkeys(STAGES, 0.0)
        self.begin = self._shown = time.perf_counter()
        self._lock = threading.Lock()

    def spent(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.split[stage] += seconds

    def add(self, done: int, failed: int) -> None:
        """Count items whose results are durable."""
        self.done += done
        self.failed += failed
        self.processed += done + failed
        now = time.perf_counter()
        if not self.quiet and now - self._shown > (TERMINAL if self.stream.isatty() else LOG):
            self._shown = now
            print(self.line(), end="" if self.stream.isatty() else "\n", file=self.stream, flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def line(self) -> str:
        rate = self.processed / max(self.seconds, 1e-9)
        left = max(0, self.total - self.done - self.failed)
        busy = sum(self.split.values()) or 1.0
        shares = " ".join(f"{stage} {100 * seconds / busy:.0f}%" for stage, seconds in self.split.items())
        text = (
            f"{self.done + self.failed}/{self.total} items, {rate:.1f} images/s, "
            f"{clock(left / rate) if rate else '?'} left, {self.failed} failed | {shares}"
        )
        return f"\r\033[K{text}" if self.stream.isatty() else f"fastcam: {text}"

    def close(self) -> None:
        if not self.quiet and self.stream.isatty():
            print("\r\033[K", end="", file=self.stream, flush=True)

    def summary(self, store: Path, batch_size: int) -> Summary:
        seconds = self.seconds
        rate = self.processed / max(seconds, 1e-9)
        split = dict(self.split)
        return Summary(store, self.total, self.done, self.failed, self.processed, seconds, rate, batch_size, split)


def clock(seconds: float) -> str:
    """'3 s', '4 min 05 s', '2 h 07 min'."""
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
