"""A job from its options to its summary."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from fastcam._device import device_of

from .compute import Attributor
from .layout import DONE, FAILED, TILE, Layout, storable
from .local import Pipeline, batches, default_workers
from .options import Options
from .progress import Meter, Summary
from .provenance import commit, completed, plain, versions
from .sources import ItemError
from .writer import BlockWriter, JobError, Lock, create, differences, facts_of, refuse_inside, write_facts

if TYPE_CHECKING:
    from fastcam.models import LoadedModel

    from .sources import Source

__all__ = ["Job", "execute", "run"]

log = logging.getLogger("fastcam")


def run(model: Any, images: Any, out: str | Path, *, quiet: bool = True, **options: Any) -> Summary:
    """Explain every image of a data set into a store; what `fastcam run` does, with its options as keywords.

        summary = fastcam.jobs.run("torchvision:resnet50", "photos/", "maps.zarr", weights="w.safetensors")
        store = fastcam.jobs.Store("maps.zarr")

    model          a module, or what `fastcam.models.load_model` takes: "torchvision:resnet50", "timm:...", "hf:...",
                   "package.module:factory", "program.pt2"
    images         what `fastcam.jobs.sources.open_source` takes: a folder, a manifest, tars, an array, a Source. Class
                   folders are labels where they bear the names of the model's classes, or are as many
    out            the store; "{i}" and "{n}" in it become the shard's numbers
    method         a name from `fastcam.methods()`, for single images
    weights        a safetensors file, or a checkpoint of tensors
    layer          as in `fastcam.Explainer`, by name
    targets        "predicted" · "top5" · a class · "labels" (the source's) · a file of labels (.csv, .tsv,
                   .parquet, .npy)
    labels         a file of labels, for targets="labels"
    size           maps at "layer" size, at "input" size, N or (H, W); never normalised, that is done on reading
    dtype          "float16" · "float32" · "uint8" (256 levels between each map's least and largest value)
    scores         keep "all" of the model's scores, or of the "targets" alone
    options        the method's options, a dict
    image_size, mean, std, interpolation, crop   how images are prepared, where not as the model's own metadata says
    batch_size     images read, explained and written together; "auto": found by measuring on accelerators
    precision, channels_last   as in `fastcam.Explainer`
    device         "auto": CUDA where there is a GPU · "cpu" · "cuda" · "cuda:1"
    workers        decode threads; None: one a core, at most 16
    threads        CPU threads of the network (with Ray: of each actor's); None: torch's setting
    engine         "local" · "ray" (actors, cpus_per_actor, gpus_per_actor say how it spreads)
    resume         go on with the store if it exists, also with images that were moved; without, an existing store is
                   an error
    retry_failed   work on items that failed before, too
    limit          only the first N items
    shard          "i/n": part i of n, counted from 0, to be joined by `fastcam.jobs.merge` · "auto": as torchrun or
                   Slurm number this process
    shard_rows     rows a shard file; a multiple of 16
    quiet          False: progress on stderr

    An item that cannot be read or explained is recorded with its reason, and the job goes on. Results are the same to
    the bit whatever batch_size, workers, engine and interruptions, on a CPU; on an accelerator they hold to rounding,
    and a resumed job keeps the batch size it began with. Ctrl-C (KeyboardInterrupt) leaves a store that can be resumed.

    Raises ValueError or TypeError for options that make no sense; JobError where the store, the model or the machine
    stops the job, `usage` telling which of both. Cost: that of the method, if decoding keeps up.
    """
    asked = Options(model=model, images=images, out=out, **options)
    with _threads(asked.threads), Job(asked, quiet=quiet) as job:
        return execute(job)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


class Ready(Protocol):
    """What working on a store takes: a job, or a worker's part in one."""

    options: Options
    source: Source
    loaded: LoadedModel
    attributor: Attributor
    writer: BlockWriter
    layout: Layout
    shape: tuple[int, ...]
    status: np.ndarray
    start: int
    batch_size: int


class Job:
    """A job made ready: source, store and the right to write it. A context that gives the right back."""

    def __init__(self, options: Options, *, quiet: bool = True):
        self.options, self.quiet = options, quiet
        self.root = options.store
        stored = facts_of(self.root)
        if stored is not None and not options.resume:
            raise JobError(
                f"{self.root} exists; pass --resume (resume=True) to go on with it, or another --out", usage=True
            )
        refuse_inside(self.root)
        self.lock = Lock(self.root)
        try:
            self._open()
        except BaseException:
            self.lock.release()
            raise

    def _open(self) -> None:
        from fastcam.models import load_model

        from .sources import open_source

        options = self.options
        self.source: Source = open_source(options.images, labels=options.label_file)
        self.start, self.stop = self._range(len(self.source))
        if options.target_spec == "labels" and self.items and not self._labelled():
            raise JobError(
                "targets 'labels': no item has a label; give each item's class in a file: --labels FILE.csv (columns "
                "id,label)",
                usage=True,
            )
        self.device = device_of(options.device)
        self.loaded: LoadedModel = load_model(
            options.model,
            weights=options.weights,
            image_size=options.image_size,
            mean=options.mean,
            std=options.std,
            interpolation=options.interpolation,
            crop=options.crop,
        )
        self.attributor = Attributor(self.loaded, options, self.device)
        stored = facts_of(self.root)
        facts = self._facts()
        if stored is not None:
            found = differences(completed(stored), facts)
            if found:
                raise JobError(
                    f"{self.root} was made by another job; " + "; ".join(found) + "; restore these, or choose another "
                    "--out",
                    usage=True,
                )
            self._follow(stored, facts)
        if stored is None or 0 in stored["input_shape"]:
            stored = self._create(facts)
        elif stored["versions"] != facts["versions"]:
            log.warning("%s was begun with %s and goes on with %s", self.root, stored["versions"], facts["versions"])
        self.shape = tuple(stored["input_shape"])
        self.layout = Layout.from_json(stored["layout"])
        if 0 not in self.shape:
            if self.attributor.classes is None:
                self._probe(self.shape)
            asked = stored["batch_size"] if options.batch_size == "auto" and self.device.type != "cpu" else None
            self.batch_size = self.attributor.choose_batch(asked or options.batch_size, self.shape)
        self.writer = BlockWriter(self.root, self.layout)
        self.status = self.writer.recover()

    def __len__(self) -> int:
        return self.stop - self.start

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def _range(self, items: int) -> tuple[int, int]:
        """Items of this shard: all shards but the last begin and end at multiples of TILE, to keep tiles the same."""
        self.items = items = items if self.options.limit is None else min(items, self.options.limit)
        i, n = self.options.shard_of
        tiles = -(-items // TILE)
        return tuple(min(items, TILE * (tiles * part // n)) for part in (i, i + 1))  # type: ignore[return-value]

    def _labelled(self) -> bool:
        return any(self.source.label(index) is not None for index in range(self.items))

    def _facts(self) -> dict[str, Any]:
        """Provenance, of which the keys in `writer.IDENTITY` must not change."""
        options, loaded = self.options, self.loaded
        size = options.map_size
        return {
            "format": 1,
            "model": loaded.spec,
            "weights_hash": loaded.weights_hash,
            "classes": list(loaded.classes) if loaded.classes else None,
            "preprocessing": plain(loaded.prepare.describe()),
            "method": options.method,
            "options": plain(self.attributor.explainer.options),
            "layer": options.layer,
            "targets": options.target_spec,
            "size": size if isinstance(size, str) else list(size),
            "dtype": options.dtype,
            "scores": options.scores,
            "precision": options.precision,
            "channels_last": options.channels_last,
            "source": plain(self.source.describe()),
            "limit": options.limit,
            "shard": options.shard,
            "rows": [self.start, self.stop],
            "items": self.items,
            "signed": self.attributor.signed,
            "versions": versions(),
            "commit": commit(),
        }

    def _create(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Make the store. The first image that can be read says what the rest look like."""
        options = self.options
        shape = self._first_shape()
        if shape:
            layout, name = self._probe(shape)
            if options.engine == "ray" and not options.shard_rows:
                from .ray_engine import spread

                layout = dataclasses.replace(layout, block=min(layout.block, spread(len(self), options)))
            batch = self.attributor.choose_batch(options.batch_size, shape)
        else:  # no image can be read: the maps have no size
            layout, name, batch = Layout(len(self), (0, 0), False, (0,) if options.scores == "all" else ()), None, TILE
        facts = {
            **facts,
            "layer_used": name,
            "input_shape": list(shape or (0, 0, 0)),
            "input_size": list(shape[1:] if shape else (0, 0)),
            "batch_size": batch,
            "shard_rows": options.shard_rows,
            "class_count": self.attributor.classes,
            "layout": layout.to_json(),
        }
        ids = [storable(self.source.key(index)) for index in range(self.start, self.stop)]
        try:
            create(self.root, layout, ids, facts)
        except OSError as error:
            raise JobError(disk_message(self.root, error)) from error
        return facts

    def _probe(self, shape: tuple[int, ...]) -> tuple[Layout, str]:
        """The layout of the results, and the layer's name. From then on folders are labels only if they fit the model.

        JobError where they do not and are asked for.
        """
        from .sources.labels import for_model

        wanted = self.options.target_spec == "labels"
        label = self.source.label(self.start) if wanted else None
        found = self.attributor.probe(shape, self.options, len(self), label)
        given, classes = self.source, self.attributor.classes
        self.source = for_model(given, classes, self.loaded.classes)
        if wanted and self.source is not given and self.source.classes is None:
            raise JobError(
                f"targets 'labels': there are {len(given.classes or ())} class folders and the model has {classes} "
                "classes, whose names the folders do not bear; give each item's class in a file: --labels FILE.csv "
                "(columns id,label)",
                usage=True,
            )
        return found

    def _follow(self, stored: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write down where images and labels that were moved lie now; JobError where other images lie there."""
        if stored["source"] == facts["source"]:
            return
        from .store import Store

        store, (before, now) = Store(self.root), (found["source"].get("where") for found in (stored, facts))
        done = np.flatnonzero(store.status == DONE)
        for row in sorted({int(done[place]) for place in (0, len(done) // 2, -1)} if len(done) else ()):
            try:
                digest = self.source.load(self.start + row).digest
            except ItemError as error:
                digest = str(error)
            if digest != store.column("digest")[row]:
                what = f"{store.column('ids')[row]} is not what was explained"
                raise JobError(f"{self.root} was made from {before}; at {now} {what}; choose another --out", usage=True)
        log.warning("the images of %s, found at %s before, are taken from %s", self.root, before, now)
        stored["source"] = facts["source"]
        write_facts(self.root, stored)

    def _first_shape(self) -> tuple[int, ...] | None:
        for index in range(self.start, self.stop):
            prepare, picture = self.loaded.prepare, None
            try:
                picture = self.source.load(index).image
                return tuple(prepare(picture).shape)
            except Exception as error:  # it will be recorded when its turn comes
                if picture is not None and not prepare.known:
                    raise JobError(str(error), usage=True) from error
                log.debug("item %d cannot be read: %s", index, error)
        return None


def execute(job: Job) -> Summary:
    """Run a job that was made ready, by its engine."""
    status = job.status
    meter = Meter(len(job), int((status == DONE).sum()), int((status == FAILED).sum()), job.quiet)
    if job.options.retry_failed:
        meter.failed = 0
    try:
        if 0 in job.shape:
            _record_unreadable(job, meter)
        elif job.options.engine == "ray":
            from .ray_engine import run_blocks

            run_blocks(job, meter)
        else:
            work(job, meter, [])
    except OSError as error:
        raise JobError(disk_message(job.root, error)) from error
    finally:
        meter.close()
    return meter.summary(job.root, getattr(job, "batch_size", TILE))


def work(job: Ready, meter: Meter, blocks: Sequence[int]) -> None:
    """Process what is left of some blocks (empty: of all) on this machine, and settle what was done on any end."""
    pipeline = Pipeline(
        job.source, job.loaded.prepare, job.shape, job.attributor, job.writer, meter,
        offset=job.start, batch_size=job.batch_size, workers=job.options.workers or default_workers(),
    )  # fmt: skip
    try:
        pipeline.run(batches(job.status, job.layout.block, job.batch_size, job.options.retry_failed, blocks))
    except OSError:
        raise  # the disk takes nothing more; what is done stands in the journal
    except BaseException:
        job.writer.settle(blocks)
        raise
    job.writer.settle(blocks)


def _record_unreadable(job: Job, meter: Meter) -> None:
    from .local import _reason
    from .writer import failed

    for batch in batches(job.status, job.layout.block, job.layout.block, job.options.retry_failed):
        reasons, digests = [], []
        for row in batch.rows:
            digest, reason = "", "it could not be read when the job began"
            try:
                item = job.source.load(job.start + int(row))
                digest = item.digest
                job.loaded.prepare(item.image)
            except Exception as error:
                reason = _reason(error)
            reasons.append(reason)
            digests.append(digest)
        columns = failed(job.layout, reasons)
        columns["digest"][:] = digests
        job.writer.append(batch.rows, columns)
        meter.add(0, len(batch.rows))
    job.writer.settle()


def disk_message(root: Path, error: OSError) -> str:
    name = f" ({error.filename})" if error.filename and str(root) not in str(error.filename) else ""
    return (
        f"{root}: {error.strerror or error}{name}; what was done is safe: make room or choose another disk, then go on "
        "with --resume"
    )
