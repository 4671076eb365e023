"""The engine of a Ray cluster: Ray Data hands blocks of rows to a pool of actors that each hold an Explainer.

A task is a block, whose shard files nobody else writes, and does what a local job does with it. An actor that dies is
started anew by Ray and its task repeated: batches the first attempt made durable stand in the block's journal and are
not done again, others are. Rows can be neither lost nor doubled, since a row's place in the store is its number.
The nodes see `out` and the images under the same paths (a shared file system).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .layout import DONE, FAILED, PENDING, TILE, Layout
from .options import Options
from .progress import Meter
from .writer import BlockWriter, JobError

if TYPE_CHECKING:
    from .job import Job

__all__ = ["run_blocks", "spread"]

#: Tasks an actor gets at least, so that the last one does not keep all others waiting.
TASKS = 4


def need_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("engine 'ray' needs Ray Data; install it: pip install 'fastcam[ray]'") from error
    return ray


def spread(rows: int, options: Options) -> int:
    """Rows a block at most, for enough tasks to share: a power of two, and whole tiles."""
    each = max(TILE, rows // (TASKS * (options.actors or 2)))
    return int(1 << (each.bit_length() - 1))


@dataclass
class _Work:
    """What an actor needs of the job."""

    options: Options
    loaded: Any
    source: Any
    root: Path
    layout: Layout
    shape: tuple[int, ...]
    start: int
    batch_size: int
    device: str


class WorkerError(RuntimeError):
    """What a worker raised, in one line: Ray hands on the text of an error, not what caused it."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise WorkerError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def cause_of(error: Exception) -> str:
    """Why a worker stopped: what it raised, or what Ray says of its end, in one line."""
    found = re.search(rf"{WorkerError.__name__}: (.+)", str(error))
    return found[1].strip() if found else " ".join(str(error).split())[:600]


class BlockActor:
    """Holds the model and the method; a call does one block."""

    def __init__(self, work: Any):
        with _told():
            self._begin(work)

    def _begin(self, work: Any) -> None:
        from .compute import Attributor

        ray = need_ray()
        self.work: _Work = ray.get(work[0])
        options = self.work.options
        torch.set_num_threads(options.threads or max(1, int(options.cpus_per_actor)))
        device = torch.device(self.work.device)
        self.device = torch.device("cuda", 0) if device.type == "cuda" else device  # Ray shows an actor its own GPUs
        self.loaded, self.source, self.start = self.work.loaded, self.work.source, self.work.start
        self.root, self.shape, self.layout = self.work.root, self.work.shape, self.work.layout
        self.batch_size, self.options = self.work.batch_size, dataclasses.replace(options, workers=options.workers or 2)
        self.attributor = Attributor(self.loaded, options, self.device)
        self.attributor.probe(self.shape, options, self.layout.rows)
        self.attributor.choose_batch(self.batch_size, self.shape)
        self.writer = BlockWriter(self.root, self.layout)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from .job import work

        found: dict[str, list[int]] = {"block": [], "done": [], "failed": []}
        for block in batch["block"].tolist():
            meter = Meter(self.layout.rows)
            with _told():
                self.status = self.writer.status_of(block)
                work(self, meter, [block])
            for name, value in (("block", block), ("done", meter.done), ("failed", meter.failed)):
                found[name].append(value)
        return {name: np.array(values) for name, values in found.items()}


def run_blocks(job: Job, meter: Meter) -> None:
    """Run what is left of a job on the cluster: the one in force, that of RAY_ADDRESS, or this machine as one."""
    ray = need_ray()
    options = job.options
    todo = (job.status == PENDING) | ((job.status == FAILED) & options.retry_failed)
    blocks = sorted(set((np.flatnonzero(todo) // job.layout.block).tolist()))
    if not blocks:
        job.writer.settle()
        return
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, logging_level="warning", log_to_driver=False)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        _stream(ray, job, meter, blocks)
    except ray.exceptions.RayError as error:
        raise JobError(f"a worker stopped: {cause_of(error)}; go on with --resume") from error
    finally:
        if own:
            ray.shutdown()
    # An attempt that died counted for nothing, though some of its items are done.
    job.writer.settle()
    status = job.writer.recover()
    meter.done, meter.failed = int((status == DONE).sum()), int((status == FAILED).sum())


def _stream(ray: Any, job: Job, meter: Meter, blocks: list[int]) -> None:
    options = job.options
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = options.gpus_per_actor if options.gpus_per_actor is not None else float(job.device.type == "cuda")
    # Without its weights' file or a path twice: actors get the model as it was loaded here.
    plain = dataclasses.replace(options, model=None, images=None, engine="local")
    work = _Work(
        plain, job.loaded, job.source, job.root.resolve(), job.layout, job.shape, job.start, job.batch_size,
        str(job.device),
    )  # fmt: skip
    have = ray.cluster_resources()
    fitting = int(have.get("GPU", 0) / gpus) if gpus else int(have.get("CPU", 1) / options.cpus_per_actor)
    actors = max(1, min(options.actors or fitting, len(blocks)))
    data = ray.data.from_items([{"block": block} for block in blocks], override_num_blocks=len(blocks))
    kept = ray.put(work)  # named, so that it is there for actors started late
    results = data.map_batches(
        BlockActor,
        fn_constructor_args=([kept],),  # in a list, so that Ray hands on the reference
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=options.cpus_per_actor,
        num_gpus=gpus or None,
    )
    for row in results.iter_rows():
        meter.add(int(row["done"]), int(row["failed"]))
