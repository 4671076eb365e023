"""Timing by turns, agreement of results, and copying as the measure of bandwidth.

Outputs are compared before anything is timed. The calls that are to be compared take turns, so that drift and
neighbours on the machine hit all alike; the figure is the median, with the interquartile range beside it, and of two
calls compared the median of the turns' quotients.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Calls",
    "Results",
    "Times",
    "agree",
    "alternate",
    "copier",
    "copy_gbps",
    "iqr",
    "ratio",
    "seconds_of",
    "turns",
]

Calls: TypeAlias = Mapping[str, Callable[[], Any]]
Times: TypeAlias = dict[str, list[float]]
Results: TypeAlias = Tensor | tuple[Tensor, ...]


def agree(found: Results, expected: Results, limit: float) -> tuple[bool, float]:
    """Whether shapes are equal and the largest absolute difference is at most `limit`; and that difference.

    NaN agrees with nothing; its difference is NaN.
    """
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        pairs = [agree(a, b, limit) for a, b in zip(found, expected, strict=True)]
        return all(match for match, _ in pairs), max(error for _, error in pairs)
    if found.shape != expected.shape:
        return False, math.inf
    error = (found.double() - expected.double()).abs().max().item() if found.numel() else 0.0
    return error <= limit, error


def turns(rounds: int, budget: float | None = None, least: int = 3) -> Iterator[int]:
    """0, 1, ... up to `rounds` (exclusive), ending early once `budget` seconds and `least` rounds have passed."""
    start = time.perf_counter()
    for turn in range(rounds):
        if budget is not None and turn >= least and time.perf_counter() - start > budget:
            return
        yield turn


def alternate(calls: Calls, rounds: int, device: str = "cpu", warmup: int = 3, budget: float | None = None) -> Times:
    """Seconds of every call, taking turns for `rounds` rounds after `warmup` unmeasured ones.

    budget  seconds after which no further round begins, once there are three; None: no limit
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: Times = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in turns(rounds, budget):
            for name, call in calls.items():
                times[name].append(seconds_of(call, device))
    finally:
        gc.enable()
    return times


def seconds_of(call: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call: wall clock on the CPU; on CUDA from event to event on the current stream."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """Time of one call as a multiple of another's: median over turns of the quotient of both times in that turn.

    Drift of the machine hits both calls of a turn alike, so it leaves the quotient alone.
    """
    return statistics.median(mine / theirs for mine, theirs in zip(times[name], times[to], strict=True))


def iqr(seconds: Sequence[float]) -> float:
    """Interquartile range; 0 of a single value."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return high - low


def copier(nbytes: int, device: str = "cpu") -> Callable[[], Tensor]:
    """`copy_` that reads and writes `nbytes` altogether."""
    source = torch.ones(max(1, nbytes // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_gbps(nbytes: int, device: str = "cpu") -> float:
    """Bandwidth of `copy_` over `nbytes`, read plus written, in GB/s: median of nine."""
    copy = copier(nbytes, device)
    copy()
    return nbytes / statistics.median(seconds_of(copy, device) for _ in range(9)) / 1e9
