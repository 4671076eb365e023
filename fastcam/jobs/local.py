"""The engine of one machine: decode threads -> buffers -> attribution -> bounded queue -> a writing thread."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .compute import Attributor, Part, pack
from .layout import DONE, FAILED, PENDING
from .progress import Meter
from .writer import BlockWriter, failed

if TYPE_CHECKING:
    from .sources import Source

__all__ = ["Batch", "Pipeline", "batches", "default_workers"]

#: Batches being decoded, waiting or in the network at a time, and batches of results waiting for the disk.
BUFFERS, RESULTS = 4, 2
#: In the place of labels of which there are too many or too few.
_MANY = -2


@dataclass(frozen=True)
class Batch:
    """Rows of a store that go through the network together; `rows - first` are their slots."""

    first: int
    rows: np.ndarray


def batches(status: np.ndarray, block: int, size: int, retry_failed: bool, only: Sequence[int] = ()) -> Iterator[Batch]:
    """What is left to do, in order. A row always has the same slot, whatever was done before; none crosses a block.

    status        (rows,) of the store
    retry_failed  whether failed items are left to do
    only          blocks; empty: all
    """
    for index in only or range(-(-len(status) // block)):
        stop = min((index + 1) * block, len(status))
        for first in range(index * block, stop, size):
            part = status[first : min(first + size, stop)]
            todo = (part == PENDING) | ((part == FAILED) & retry_failed)
            if todo.any():
                yield Batch(first, first + np.flatnonzero(todo))


def default_workers() -> int:
    return max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


@dataclass
class _Loading:
    batch: Batch
    buffer: Tensor
    futures: list[Future[tuple[str, str]]]
    labels: np.ndarray | None


class Pipeline:
    """Runs batches of a source through an attributor into a writer.

    source   items; row r of the store is item `offset` + r
    prepare  image -> (C, H, W) float32 of `shape`
    workers  decode threads

    Memory: BUFFERS batches of images, and what the writer holds. An error of the writer's ends the run with it; on
    any end, results that were computed are written if the disk takes them.
    """

    def __init__(
        self, source: Source, prepare: Any, shape: Sequence[int], attributor: Attributor, writer: BlockWriter,
        meter: Meter, *, offset: int, batch_size: int, workers: int,
    ):  # fmt: skip
        self.source, self.prepare, self.shape, self.offset = source, prepare, tuple(shape), offset
        self.attributor, self.writer, self.meter = attributor, writer, meter
        self.workers = workers
        pinned = attributor.device.type == "cuda"
        self._free: queue.Queue[Tensor] = queue.Queue()
        for _ in range(BUFFERS):
            self._free.put(torch.empty((batch_size, *self.shape), pin_memory=pinned))
        self._loading: queue.Queue[_Loading | BaseException | None] = queue.Queue()
        self._results: queue.Queue[tuple[_Loading, list[Part]] | None] = queue.Queue(RESULTS)
        self._stop = threading.Event()
        self._broken: BaseException | None = None

    def run(self, todo: Iterator[Batch]) -> None:
        """Process the batches; returns when all results are durable. Raises what stopped it."""
        threads = torch.get_num_threads()
        ready = threading.Barrier(self.workers + 1)
        pool = ThreadPoolExecutor(self.workers, "fastcam-decode", initializer=_one_thread, initargs=(ready,))
        writing = threading.Thread(target=self._write, name="fastcam-write")
        feeding = threading.Thread(target=self._feed, args=(todo, pool), name="fastcam-feed")
        try:
            for _ in range(self.workers):
                pool.submit(ready.wait)  # each starts one thread, which waits for the others
            ready.wait()
            torch.set_num_threads(threads)
            writing.start()
            feeding.start()
            self._compute()
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if feeding.ident:
                feeding.join()
            if writing.ident:
                self._results.put(None)
                writing.join()
        if self._broken is not None:
            raise self._broken

    def _feed(self, todo: Iterator[Batch], pool: ThreadPoolExecutor) -> None:
        try:
            for batch in todo:
                buffer = self._buffer()
                if buffer is None:
                    return
                lacking = np.setdiff1d(np.arange(len(buffer)), batch.rows - batch.first)
                if len(lacking):
                    buffer[torch.from_numpy(lacking)] = 0
                view = buffer.numpy()
                futures = [pool.submit(self._load, int(row), view[row - batch.first]) for row in batch.rows]
                self._loading.put(_Loading(batch, buffer, futures, self._labels(batch, len(buffer))))
            self._loading.put(None)
        except RuntimeError as error:  # the pool was shut down by an error elsewhere
            self._loading.put(None if self._stop.is_set() else error)
        except BaseException as error:
            self._loading.put(error)

    def _buffer(self) -> Tensor | None:
        while not self._stop.is_set():
            try:
                return self._free.get(timeout=0.2)
            except queue.Empty:
                continue
        return None

    def _labels(self, batch: Batch, size: int) -> np.ndarray | None:
        """Class or classes of each slot; -1 where there is none."""
        if self.attributor.targets != "labels":
            return None
        labels: np.ndarray = np.full((size, *self.writer.layout.target_shape), -1, dtype=np.int64)
        for row in batch.rows:
            label = self.source.label(self.offset + int(row))
            if label is not None:
                labels[row - batch.first] = label if np.shape(label) == labels.shape[1:] else _MANY
        return labels

    def _load(self, row: int, slot: np.ndarray) -> tuple[str, str]:
        """Put an item's image into its slot; returns (content's hash, why it failed or "")."""
        begin = time.perf_counter()
        digest = ""
        try:
            item = self.source.load(self.offset + row)
            digest = item.digest
            image = self.prepare(item.image)
            if tuple(image.shape) != self.shape:
                raise ValueError(
                    f"the prepared image is {tuple(image.shape)}, this job's are {self.shape}; give an image size"
                )
            slot[...] = image.numpy()
            reason = ""
        except Exception as error:  # whatever an image does is recorded against it
            slot[...] = 0
            reason = _reason(error)
        self.meter.spent("decode", time.perf_counter() - begin)
        return digest, reason

    def _compute(self) -> None:
        while self._broken is None:
            begin = time.perf_counter()
            loading = self._loading.get()
            if loading is None:
                return
            if isinstance(loading, BaseException):
                raise loading
            outcomes = [future.result() for future in loading.futures]
            self.meter.spent("wait", time.perf_counter() - begin)
            begin = time.perf_counter()
            slots: np.ndarray = loading.batch.rows - loading.batch.first
            good = np.array([not reason for _, reason in outcomes], dtype=bool)
            parts = [Part(slots[i : i + 1], reason=reason) for i, (_, reason) in enumerate(outcomes) if reason]
            labels = loading.labels
            if labels is not None:
                unfit = good & ~self._fits(labels[slots])
                parts += [Part(slots[i : i + 1], reason=self._unfit(labels[slots[i]])) for i in np.flatnonzero(unfit)]
                good &= ~unfit
                labels = labels.copy()
                labels[np.setdiff1d(np.arange(len(labels)), slots[good])] = 0
            parts += self.attributor(loading.buffer, slots[good], labels)
            self.meter.spent("attribute", time.perf_counter() - begin)
            self._results.put((loading, parts))

    def _fits(self, labels: np.ndarray) -> np.ndarray:
        classes = self.attributor.classes
        fits = (labels >= 0) & ((labels < classes) if classes is not None else True)
        return fits.reshape(len(labels), -1).all(axis=1)

    def _unfit(self, label: np.ndarray) -> str:
        if (label == -1).all():
            return "there is no label for this item"
        if (label == _MANY).all():
            return "this item has another number of labels than the first"
        return f"label {label} is out of range: the model's classes are 0 to {(self.attributor.classes or 0) - 1}"

    def _write(self) -> None:
        while (entry := self._results.get()) is not None:
            if self._broken is not None:
                continue  # drained, so that nobody waits for room
            loading, parts = entry
            begin = time.perf_counter()
            try:
                self._append(loading, parts)
            except BaseException as error:
                self._broken = error
                self._stop.set()
                self._loading.put(None)
            self._free.put(loading.buffer)
            self.meter.spent("write", time.perf_counter() - begin)

    def _append(self, loading: _Loading, parts: list[Part]) -> None:
        layout, rows = self.writer.layout, loading.batch.rows
        columns = layout.empty(len(rows))
        place = {int(row - loading.batch.first): position for position, row in enumerate(rows)}
        for part in parts:
            at = [place[int(slot)] for slot in part.slots]
            found = (
                failed(layout, [part.reason] * len(at))
                if part.reason
                else pack(part, layout, self.attributor.all_scores)
            )
            for name, column in found.items():
                columns[name][at] = column
        columns["digest"][:] = [future.result()[0] for future in loading.futures]
        self.writer.append(rows, columns)
        done = int((columns["status"] == DONE).sum())
        self.meter.add(done, len(rows) - done)


def _one_thread(ready: threading.Barrier) -> None:
    """Keep this thread's own tensor arithmetic off the cores the network uses.

    Asking for the count first settles this thread's; the setting is then the thread's own, once the starter has put
    the process's back.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


def _reason(error: Exception) -> str:
    from .sources import ItemError

    text = str(error) or type(error).__name__
    return text if isinstance(error, (ItemError, ValueError)) else f"{type(error).__name__}: {text}"
