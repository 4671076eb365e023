"""Where the time of one call goes: stages and ops, by a watcher in the pipeline (`fastcam._watch`).

Every change of stage takes a mark, and the time between two marks belongs to the innermost stage: the parts of a call
add up to the call, with "other" for what lies outside all stages. Ops are timed where they stand, with the tensors as
the network left them, inside the stage that calls them. On CUDA the marks are events on the current stream, so that a
part is what the device spends on it, waits for the host included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastcam._watch import STAGES, watched_by

__all__ = ["PARTS", "Clock", "Instrument", "RangeWatcher", "Split", "clock_for"]

PARTS = (*STAGES, "other")


class Clock(Protocol):
    """Takes marks, and tells the seconds between two of them once `finish` was called."""

    def mark(self) -> Any: ...
    def finish(self) -> None: ...
    def between(self, first: Any, second: Any) -> float: ...


class WallClock:
    """Marks of the CPU."""

    def mark(self) -> float:
        return time.perf_counter()

    def finish(self) -> None:
        pass

    def between(self, first: float, second: float) -> float:
        return second - first


class CudaClock:
    """Marks on the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        torch.cuda.synchronize()

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) / 1e3


def clock_for(device: str) -> Clock:
    return CudaClock() if torch.device(device).type == "cuda" else WallClock()


@dataclass(frozen=True)
class Split:
    """One call: seconds in all, by part (they add up to it), and of each op call in order."""

    total: float
    parts: dict[str, float]
    ops: list[tuple[str, float]]


class Instrument:
    """Splits calls into stages and ops."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._stack: list[str] = []
        self._marks: list[tuple[str, Any]] = []
        self._ops: list[tuple[str, Any, Any]] = []

    def measure(self, call: Callable[[], Any]) -> Split:
        """Run `call` once and split it."""
        self._stack, self._marks, self._ops = ["other"], [], []
        start = self._clock.mark()
        with watched_by(self):
            call()
        self._mark()
        self._clock.finish()
        parts, last = dict.fromkeys(PARTS, 0.0), start
        for part, mark in self._marks:
            parts[part] = parts.get(part, 0.0) + self._clock.between(last, mark)
            last = mark
        ops = [(name, self._clock.between(begin, end)) for name, begin, end in self._ops]
        return Split(sum(parts.values()), parts, ops)

    def _mark(self) -> None:
        self._marks.append((self._stack[-1], self._clock.mark()))

    def enter(self, stage: str) -> None:
        self._mark()
        self._stack.append(stage)

    def leave(self, stage: str) -> None:
        self._mark()
        self._stack.pop()

    def op(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begin = self._clock.mark()
        result = call(*args, **kwargs)
        self._ops.append((name, begin, self._clock.mark()))
        return result


class RangeWatcher:
    """Names stages and ops to somebody else: `begin(name)` and `end()` around each.

    nvtx()   NVTX ranges, for Nsight Systems
    trace()  ranges of torch.profiler, for Chrome traces
    """

    def __init__(self, begin: Callable[[str], Any], end: Callable[[], Any]):
        self._begin = begin
        self._end = end

    @classmethod
    def nvtx(cls) -> RangeWatcher:
        """Raises RuntimeError where torch has no NVTX (CPU builds)."""
        try:
            torch.cuda.nvtx.mark("fastcam")
        except RuntimeError as error:
            raise RuntimeError(
                f"NVTX ranges need a torch built for CUDA, and this is {torch.__version__}; leave out nvtx"
            ) from error
        return cls(torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop)

    @classmethod
    def trace(cls) -> RangeWatcher:
        open_ranges: list[Any] = []

        def begin(name: str) -> None:
            open_ranges.append(torch.profiler.record_function(name))
            open_ranges[-1].__enter__()

        return cls(begin, lambda: open_ranges.pop().__exit__(None, None, None))

    def enter(self, stage: str) -> None:
        self._begin(f"fastcam.{stage}")

    def leave(self, stage: str) -> None:
        self._end()

    def op(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._begin(f"fastcam.ops.{name}")
        try:
            return call(*args, **kwargs)
        finally:
            self._end()
