"""What the arguments of `profile` mean: checked, with the model loaded and converted."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import fastcam
from fastcam.backends import BACKENDS

__all__ = [
    "DTYPES",
    "backends",
    "channels",
    "converted",
    "device",
    "known",
    "load",
    "own_dtype",
    "positive",
    "writable",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_BY_DEVICE = {"cpu": ("reference", "cpp"), "cuda": ("reference", "cuda", "triton")}


def own_dtype(model: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter; float32 where there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def converted(model: nn.Module, precision: str, channels_last: bool) -> nn.Module:
    """A copy in another precision or layout; the model itself where neither is asked for."""
    if own_dtype(model) == DTYPES[precision] and not channels_last:
        return model
    layout = torch.channels_last if channels_last else torch.preserve_format
    return copy.deepcopy(model).to(dtype=DTYPES[precision], memory_format=layout)


def load(model: nn.Module | str) -> tuple[nn.Module, str, int | None]:
    """(a copy or a fresh model, its name, the height of the images it was trained on or None)"""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model), type(model).__name__, None
    if not isinstance(model, str):
        raise TypeError(f"model must be a torch.nn.Module or a name; got {type(model).__name__}")
    from fastcam.models import load_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has random weights")  # they cost what trained ones cost
        loaded = load_model(model)
    # A name may stand for a module that others hold, too.
    return copy.deepcopy(loaded.model), model, None if loaded.image_size is None else loaded.image_size[0]


def channels(model: nn.Module) -> int:
    """Image channels: those of the first convolution; 3 where there is none."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None else 3


def positive(name: str, numbers: Sequence[int]) -> list[int]:
    wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if wrong or not numbers:
        raise ValueError(f"{name} must hold positive integers; got {wrong[0] if wrong else 'none'}")
    return list(dict.fromkeys(numbers))


def writable(folder: Path) -> None:
    """Makes the folder; ValueError where nothing can be written to it, before anything is measured for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"out={str(folder)!r} cannot be written to: {error.strerror}") from error


def known(name: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    for one in given:
        if one not in known:
            raise ValueError(f"{name} must be of {', '.join(known)}; got {one!r}")
    if not given:
        raise ValueError(f"{name} must name at least one of {', '.join(known)}")
    return list(dict.fromkeys(given))


def device(given: str | None) -> str:
    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {given!r}") from error
    if device.type not in _BY_DEVICE:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {given!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise ValueError(
            f"device {given!r} is not here: torch {torch.__version__} sees {have} CUDA devices; use --device cpu"
        )
    return given


def backends(given: Sequence[str] | str, device: str) -> tuple[list[str], list[str]]:
    """The backends to measure, and a note for each that "all" leaves out."""
    kind = torch.device(device).type
    found = [facts[kind]["reasons"] for facts in fastcam.backends()["ops"].values()]
    # A backend that lacks an op may run the methods that do without it; the others then say so.
    reasons = {name: found[0][name] for name in BACKENDS[1:] if all(name in lacking for lacking in found)}
    if given == "all" or list(given) == ["all"]:
        candidates = _BY_DEVICE[kind]
        notes = [f"backend {name} is left out: {reasons[name]}" for name in candidates if name in reasons]
        return [name for name in candidates if name not in reasons], notes
    chosen = known("backends", [given] if isinstance(given, str) else given, BACKENDS)
    for name in chosen:
        if name in reasons:
            raise ValueError(f"backend {name!r} cannot run on {kind} here: {reasons[name]}")
    return chosen, []
