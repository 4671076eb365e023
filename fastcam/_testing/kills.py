"""A harness that kills jobs with SIGKILL at random moments and looks for anything lost, torn or done too often."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcam.jobs import run
from fastcam.jobs.layout import DONE, PENDING, Layout
from fastcam.jobs.local import BUFFERS

from .jobs import Numbered, tiny

__all__ = ["Outcome", "kill_runs", "same_arrays"]

ITEMS, BATCH, BLOCK = 400, 16, 64
COLUMNS = ("ids", *Layout(0, (), False, ()).columns())


@dataclass(frozen=True)
class Outcome:
    """What `kill_runs` saw; it raises AssertionError where something is wrong.

    kills           processes killed while they ran
    stores          stores that were killed until they were finished
    at_creation     kills after which no store was there yet
    journalled      items that stood only in the journal right after a kill, all kills together
    checked         comparisons of a done item's map with the uninterrupted run, to the bit
    repeated        most loads of items, beyond one each, that a kill cost
    allowed         bound on it: the batches in flight
    """

    kills: int
    stores: int
    at_creation: int
    journalled: int
    checked: int
    repeated: float
    allowed: int


def kill_runs(folder: Path, kills: int, seed: int = 0, delay: float = 0.001) -> Outcome:
    """Run jobs of ITEMS items, each killed at a random moment and resumed until it is finished, until `kills` kills.

    After each kill: what plain zarr shows as done equals the uninterrupted run to the bit; what was done before still
    is. At the end of a store: every array equals that of the uninterrupted run, and items were loaded once each but for
    at most the batches in flight at each kill.
    """
    assert not any(folder.iterdir()), f"{folder} must be empty"
    chance = random.Random(seed)
    # Jobs are forks of this process, which has traced the model and runs no threads: a kill costs its moment only.
    torch.set_num_threads(1)
    context, model, reference = multiprocessing.get_context("fork"), tiny(), folder / "whole.zarr"
    _job(model, folder / "warm.zarr", folder / "warm.txt", 0.0)
    begin = time.perf_counter()
    _attempt(context, model, reference, folder / "whole.txt", delay, None)
    longest = time.perf_counter() - begin
    expected = read(reference)
    done_kills = stores = at_creation = journalled = checked = 0
    worst = 0.0
    while done_kills < kills:
        root, counted = folder / f"{stores}.zarr", folder / f"{stores}.txt"
        before: np.ndarray = np.zeros(ITEMS, bool)
        here, finished = 0, False
        while not finished:
            limit = chance.uniform(0, longest) if done_kills < kills else None
            killed, finished = _attempt(context, model, root, counted, delay, limit)
            assert killed or finished, "a job ended by itself without finishing"
            if not killed:
                continue
            done_kills, here = done_kills + 1, here + 1
            if not (root / "zarr.json").exists() or not facts(root):
                assert not before.any()
                at_creation += 1
                continue
            shown, recorded = read(root), recorded_done(root)
            visible = shown["status"] == DONE
            for name in COLUMNS:
                same = _equal_rows(shown[name], expected[name])
                assert same[visible].all(), f"{name} of a done item differs after kill {done_kills}"
            checked += int(visible.sum())
            assert (recorded | ~before).all(), f"kill {done_kills} lost items that were done"
            assert (recorded | ~visible).all()
            journalled += int((recorded & ~visible).sum())
            before = recorded
        final = read(root)
        for name in COLUMNS:
            assert _equal_rows(final[name], expected[name]).all(), f"{name} differs from the uninterrupted run"
        loads = len(counted.read_text().split())
        if here:
            worst = max(worst, (loads - ITEMS) / here)
        stores += 1
        shutil.rmtree(root)
    allowed = BUFFERS * BATCH + 1  # and the image whose shape is looked at first
    assert worst <= allowed, f"a kill cost {worst:.0f} repeated loads, {allowed} were in flight at most"
    return Outcome(done_kills, stores, at_creation, journalled, checked, worst, allowed)


def _attempt(
    context: Any, model: torch.nn.Module, root: Path, counted: Path, delay: float, limit: float | None
) -> tuple[bool, bool]:
    """One process; (killed, finished)."""
    process = context.Process(target=_job, args=(model, root, counted, delay))
    process.start()
    process.join(limit)
    killed = process.is_alive()
    if killed:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert killed or process.exitcode == 0, f"a job ended with exit code {process.exitcode}"
    return killed, process.exitcode == 0


def _job(model: torch.nn.Module, root: Path, counted: Path, delay: float) -> None:
    source = Numbered(ITEMS, broken=(5, 77, 300), delay=delay, counted=counted)
    run(model, source, root, resume=True, batch_size=BATCH, shard_rows=BLOCK, workers=2, targets="top2")


def facts(root: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads((root / "zarr.json").read_text())["attributes"].get("fastcam")
    return found


def read(root: Path) -> dict[str, np.ndarray]:
    """Every array of a store as plain zarr shows it."""
    import zarr

    group: Any = zarr.open_group(root, mode="r")
    return {name: np.asarray(group[name][:]) for name in COLUMNS}


def recorded_done(root: Path) -> np.ndarray:
    """(rows,) whether an item has a result, in the arrays or the journal; changes nothing."""
    status = read(root)["status"]
    for path in sorted((root / "journal").glob("*.npz")):
        with np.load(path) as record:
            status[record["rows"]] = record["status"]
    return np.asarray(status != PENDING)


def same_arrays(one: Path, other: Path) -> None:
    """AssertionError unless two stores hold the same, to the bit."""
    first, second = read(one), read(other)
    for name in COLUMNS:
        assert first[name].shape == second[name].shape, name
        assert _equal_rows(first[name], second[name]).all(), name


def _equal_rows(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(rows,) whether rows are the same, NaN equal to NaN."""
    if one.dtype.kind not in "fiu":
        return np.asarray(one == other)
    bits = [np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8) for array in (one, other)]
    return np.asarray((bits[0] == bits[1]).all(axis=1))


if __name__ == "__main__":  # KILLS FOLDER [SEED]: in a process of its own, since it forks
    print(json.dumps(asdict(kill_runs(Path(sys.argv[2]), int(sys.argv[1]), *map(int, sys.argv[3:])))))
