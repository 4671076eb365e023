"""What a user asks of a job."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Options"]

#: Names of files of labels, as `sources.labels.Labelled` reads them.
LABEL_FILES = (".csv", ".tsv", ".parquet", ".npy")


@dataclass(frozen=True)
class Options:
    """Everything a job is told, named as on the command line; documented at `fastcam.jobs.run`."""

    model: Any
    images: Any
    out: str | Path
    method: str = "lift_cam"
    weights: str | Path | None = None
    layer: str | None = None
    targets: str | int | Path = "predicted"
    size: str | int | Sequence[int] = "layer"
    dtype: str = "float16"
    scores: str = "all"
    options: dict[str, Any] = field(default_factory=dict)
    labels: str | Path | None = None
    image_size: int | Sequence[int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None
    crop: float | str | None = None
    batch_size: str | int = "auto"
    precision: str | None = None
    channels_last: bool = False
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    engine: str = "local"
    actors: int | None = None
    cpus_per_actor: float = 1.0
    gpus_per_actor: float | None = None
    resume: bool = False
    retry_failed: bool = False
    limit: int | None = None
    shard: str | None = None
    shard_rows: int | None = None

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, ("float16", "float32", "uint8"))
        _one_of("scores", self.scores, ("all", "targets"))
        _one_of("engine", self.engine, ("local", "ray"))
        for name in ("batch_size", "workers", "threads", "actors", "shard_rows", "limit"):
            value = getattr(self, name)
            if value is None or (name == "batch_size" and value == "auto"):
                continue
            least = 0 if name == "limit" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                other = " or 'auto'" if name == "batch_size" else ""
                raise ValueError(f"{name} must be an integer from {least} up{other}, got {value!r}")
        if "on_nonfinite" in self.options:
            raise ValueError("a job records maps that are not finite as failed items; leave on_nonfinite out")
        if self.shard == "auto":
            object.__setattr__(self, "shard", _own_shard())
        self.target_spec  # noqa: B018  (checked now)
        self.map_size  # noqa: B018
        self.shard_of  # noqa: B018

    @property
    def label_file(self) -> str | Path | None:
        """Where labels come from, if not from the source itself."""
        if self.labels is not None:
            return self.labels
        return str(self.targets) if self._names_file else None

    @property
    def _names_file(self) -> bool:
        text = self.targets
        return isinstance(text, Path) or (isinstance(text, str) and Path(text).suffix.lower() in LABEL_FILES)

    @property
    def target_spec(self) -> str | int:
        """ "predicted", "labels", "top5" or a class."""
        if self._names_file:
            return "labels"
        text = self.targets
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            return text
        if isinstance(text, str):
            if text in ("predicted", "labels") or re.fullmatch(r"top[1-9]\d*", text):
                return text
            if text.isdecimal():
                return int(text)
        raise ValueError(f"targets must be predicted, labels, topK, a class or a file of labels; got {text!r}")

    @property
    def map_size(self) -> str | tuple[int, int]:
        """ "layer", "input" or (H, W)."""
        size = self.size
        if isinstance(size, str):
            if size in ("layer", "input"):
                return size
            size = [int(part) if part.isdecimal() else 0 for part in re.split("[x,]", size)]
        numbers = [size] if isinstance(size, int) else list(size)
        if len(numbers) not in (1, 2) or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise ValueError(f"size must be layer, input, N or HxW; got {self.size!r}")
        return numbers[0], numbers[-1]

    @property
    def shard_of(self) -> tuple[int, int]:
        """(i, n); (0, 1) for a whole job."""
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if match is None or not int(match[1]) < int(match[2]):
            raise ValueError(f"shard must be auto, or i/n with i from 0 to n - 1, as in 0/4; got {self.shard!r}")
        return int(match[1]), int(match[2])

    @property
    def store(self) -> Path:
        """Where the store goes: `out`, with {i} and {n} replaced by the shard's numbers."""
        i, n = self.shard_of
        return Path(str(self.out).replace("{i}", str(i)).replace("{n}", str(n)))


def _own_shard() -> str:
    """i/n of this process among those torchrun or Slurm started."""
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and count in os.environ:
            return f"{os.environ[rank]}/{os.environ[count]}"
    raise ValueError("shard 'auto' needs RANK and WORLD_SIZE (torchrun), or Slurm's variables; give i/n instead")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
