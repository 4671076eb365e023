"""From prepared images to the columns of a store, whatever a batch does."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcam.explainer import Explainer
from fastcam.methods import single
from fastcam.program.rescale import UnsupportedOpError
from fastcam.program.targets import class_scores

from .layout import DONE, FAILED, TILE, Layout
from .options import Options
from .writer import JobError

if TYPE_CHECKING:
    from fastcam.models import LoadedModel

__all__ = ["Attributor", "Part", "pack"]

log = logging.getLogger("fastcam")

#: Batches an accelerator is probed with, until one is not faster by this factor, or memory is this full.
PROBED, GAIN, FULL = (8, 16, 32, 64, 128, 256, 512), 1.05, 0.7
#: Beyond these a float16 loses digits or overflows, and a map is stored times a power of two.
SMALL, LARGE = 2.0**-10, 2.0**15


@dataclass
class Part:
    """Results of some slots of a batch: tensors of one row a slot, or the reason why there are none."""

    slots: np.ndarray
    maps: Tensor | None = None
    scores: Tensor | None = None
    targets: Tensor | None = None
    valid: Tensor | None = None
    reason: str = ""
    ready: Any = None  # CUDA event after which the tensors may be read

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()


class Attributor:
    """A model and a method, run on tiles of a fixed number of images.

    On a CPU a tile is 16 images whatever the batch: matrix products of other heights may round differently, so this
    makes results independent of the batch size to the bit. Slots without an image hold zeros. Elsewhere a tile is the
    batch. Out of memory, a tile is halved from then on; on another error the images at fault are found by leaving
    others out.
    """

    def __init__(self, loaded: LoadedModel, options: Options, device: torch.device):
        method = single(options.method)
        size = options.map_size
        self.device = device
        self.targets = options.target_spec
        self.at_layer = size == "layer"
        self.all_scores = options.scores == "all"
        self.signed = method.signed
        self.explainer = Explainer(
            _at(loaded.model, device),
            options.method,
            layer=options.layer,
            size=size,
            normalize=False,
            precision=options.precision,
            channels_last=options.channels_last,
            mean=loaded.mean,
            std=loaded.std,
            on_nonfinite="mask",
            **options.options,
        )
        parameter = next((p for p in loaded.model.parameters() if p.is_floating_point()), None)
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        self.tile = TILE
        self.limit = 0
        self.classes: int | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def probe(self, shape: Sequence[int], options: Options, rows: int, label: Any = None) -> tuple[Layout, str]:
        """The layout of results for images of `shape`, and the layer's name; JobError where the method cannot run.

        label  an item's label, which is one class or several
        """
        labels = np.zeros((2, *np.shape(label)), dtype=np.int64) if np.ndim(label) == 1 else None
        try:
            result = self._explain(torch.zeros((2, *shape)), labels)
        except (ValueError, TypeError, IndexError, UnsupportedOpError) as error:
            raise JobError(str(error), usage=True) from error
        except RuntimeError as error:
            raise JobError(f"the first pass through the network failed: {error}") from error
        maps, scores = self._maps(result), class_scores(result.scores)
        if not isinstance(scores, Tensor):
            raise JobError(
                f"the model's output is a {type(scores).__name__}; a job needs one tensor of scores", usage=True
            )
        self.classes = scores.shape[1] if scores.ndim == 2 else None
        targets = result.targets
        layout = Layout(
            rows=rows,
            map_shape=tuple(maps.shape[1:]),
            several=targets.ndim == 2,
            score_shape=tuple(scores.shape[1:]) if options.scores == "all" else tuple(targets.shape[1:]),
            dtype=options.dtype,
            score_dtype="float64" if scores.dtype == torch.float64 else "float32",
            block=options.shard_rows or 0,
        )
        return layout, result.layer

    def choose_batch(self, asked: str | int, shape: Sequence[int]) -> int:
        """Images a batch, and with it the tile; "auto": probed on accelerators, two tiles on a CPU."""
        if self.device.type == "cpu":
            tiles = 2 if asked == "auto" else -(-int(asked) // TILE)
            self.tile = self.limit = TILE
            return tiles * TILE
        self.tile = self.limit = self._probed(shape) if asked == "auto" else int(asked)
        return self.tile

    def _probed(self, shape: Sequence[int]) -> int:
        best, fastest = 1, 0.0
        for size in PROBED:
            images = torch.zeros((size, *shape))
            try:
                for _ in range(2):  # the first pays for allocation and choice of algorithms
                    begin = time.perf_counter()
                    self._explain(images, None)
                    torch.accelerator.synchronize(self.device)
                    rate = size / (time.perf_counter() - begin)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                self._release()
                break
            if rate < GAIN * fastest:
                break
            best, fastest = size, rate
            if self.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(self.device)
                if free < (1 - FULL) * total:
                    break
        return best

    def __call__(self, images: Tensor, present: np.ndarray, labels: np.ndarray | None) -> list[Part]:
        """Results of the slots in `present` of a batch (n tiles of images, C, *spatial) on the host."""
        parts = []
        for start in range(0, len(images), self.tile):
            slots = present[(present >= start) & (present < start + self.tile)]
            if len(slots):
                parts += self._run(images, labels, start, min(self.tile, len(images) - start), slots)
        return parts

    def _run(self, images: Tensor, labels: np.ndarray | None, start: int, count: int, slots: np.ndarray) -> list[Part]:
        """One tile; `count` shrinks when memory does, the slots asked for when one of them is at fault."""
        if count > self.limit:
            return self._halves(images, labels, start, count, slots)
        part = images[start : start + count]
        lacking = np.setdiff1d(np.arange(start, start + count), slots) - start
        if len(lacking):
            part = part.clone()
            part[torch.from_numpy(lacking)] = 0
        try:
            result = self._explain(part, None if labels is None else labels[start : start + count])
            return [self._part(result, slots, start)]
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                raise JobError(f"the device failed: {error}") from error  # nothing more will run on it
            if not _out_of_memory(error):
                return self._without_culprit(images, labels, start, count, slots, error)
        except Exception as error:
            return self._without_culprit(images, labels, start, count, slots, error)
        # Out of memory. Handled here, where the traceback no longer holds the tensors.
        self._release()
        if count == 1:
            return [Part(slots, reason="out of memory, for this image alone")]
        self.limit = -(-count // 2)
        log.warning("out of memory with %d images at a time; going on with %d", count, self.limit)
        return self._halves(images, labels, start, count, slots)

    def _halves(
        self, images: Tensor, labels: np.ndarray | None, start: int, count: int, slots: np.ndarray
    ) -> list[Part]:
        parts, half = [], -(-count // 2)
        for begin, length in ((start, half), (start + half, count - half)):
            inside = slots[(slots >= begin) & (slots < begin + length)]
            if len(inside):
                parts += self._run(images, labels, begin, length, inside)
        return parts

    def _without_culprit(
        self, images: Tensor, labels: np.ndarray | None, start: int, count: int, slots: np.ndarray, error: Exception
    ) -> list[Part]:
        if len(slots) == 1:
            return [Part(slots, reason=f"{type(error).__name__}: {error}")]
        middle = len(slots) // 2
        halves = (slots[:middle], slots[middle:])
        return [part for half in halves for part in self._run(images, labels, start, count, half)]

    def _explain(self, images: Tensor, labels: np.ndarray | None) -> Any:
        given: Any = None if self.targets in ("predicted", "labels") else self.targets
        if labels is not None:
            given = torch.from_numpy(labels).to(self.device)
        return self.explainer(self._moved(images).to(self.dtype), given)

    def _moved(self, images: Tensor) -> Tensor:
        """Images on the device; from pinned memory on a stream of their own, beside the batch before."""
        if self._copies is None:
            return images.to(self.device)
        with torch.cuda.stream(self._copies):
            moved = images.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        moved.record_stream(current)
        return moved

    def _maps(self, result: Any) -> Tensor:
        found: Tensor = result.raw if self.at_layer else result.maps
        return found

    def _part(self, result: Any, slots: np.ndarray, start: int) -> Part:
        chosen = torch.from_numpy(slots - start)
        columns = (self._maps(result), class_scores(result.scores), result.targets, result.valid)
        if self.device.type != "cuda":
            maps, scores, targets, valid = (column.cpu()[chosen] for column in columns)
            return Part(slots, maps, scores, targets, valid)
        chosen = chosen.to(self.device, non_blocking=True)
        held = []
        for column in columns:
            found = column[chosen]
            host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            held.append(host.copy_(found, non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        maps, scores, targets, valid = held
        return Part(slots, maps, scores, targets, valid, ready=event)

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _at(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself where it is on the device, else a copy: the caller's stays where it is."""
    tensors = (*model.parameters(), *model.buffers())
    if all(tensor.device.type == device.type and device.index in (None, tensor.device.index) for tensor in tensors):
        return model
    return copy.deepcopy(model).to(device)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    said = any(words in text for words in ("can't allocate memory", "not enough memory", "out of memory"))
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or said


def pack(part: Part, layout: Layout, all_scores: bool) -> dict[str, np.ndarray]:
    """A part that has results as columns of the store, digests not yet in them; where they are not finite, none."""
    columns = layout.empty(len(part.slots))
    part.wait()
    assert part.maps is not None
    assert part.scores is not None
    assert part.targets is not None
    assert part.valid is not None
    maps, targets, valid = part.maps.numpy(), part.targets, part.valid.numpy()
    if not all_scores:
        found = part.scores.gather(1, targets if targets.ndim == 2 else targets.unsqueeze(1))
        columns["scores"][:] = (found if targets.ndim == 2 else found.squeeze(1)).numpy()
    else:
        columns["scores"][:] = part.scores.float().numpy() if part.scores.dtype.itemsize < 4 else part.scores.numpy()
    columns["targets"][:] = targets.numpy()
    columns["maps"][:], columns["scale"][:], columns["offset"][:] = _stored(maps, layout)
    columns["status"][:] = np.where(valid, DONE, FAILED)
    if not valid.all():
        finite = np.isfinite(columns["scores"]).reshape(len(valid), -1).all(1)
        what = np.where(finite, "the map", "the model's output")
        columns["error"][~valid] = [
            f"{w} is not finite: NaN or infinity in the image or the weights" for w in what[~valid]
        ]
        nothing = layout.empty(int((~valid).sum()))
        for name in ("maps", "scale", "offset", "scores", "targets"):
            columns[name][~valid] = nothing[name]
    return columns


def _stored(maps: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps in the store's dtype, and what undoes it: map = stored * scale + offset."""
    lead = 1 + layout.several
    flat = maps.reshape(*maps.shape[:lead], -1)
    wide = (*maps.shape[:lead], *(1,) * (maps.ndim - lead))
    if layout.dtype == "uint8":
        low, high = flat.min(-1).astype(np.float32), flat.max(-1).astype(np.float32)
        scale = np.where(high > low, (high - low) / np.float32(255), np.float32(1))
        return np.rint((maps - low.reshape(wide)) / scale.reshape(wide)).clip(0, 255), scale, low
    scale = np.ones(maps.shape[:lead], np.float32)
    if layout.dtype == "float16":
        largest = np.abs(flat).max(-1)
        odd = (largest > 0) & np.isfinite(largest) & ((largest < SMALL) | (largest > LARGE))
        scale[odd] = np.exp2(np.floor(np.log2(largest[odd])))
        maps = maps / scale.reshape(wide)
    return maps, scale, np.zeros_like(scale)
