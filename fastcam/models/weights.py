"""Weights of a file, read without running anything it holds, and put into a network."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcam._weights_hash import tensors_hash

__all__ = ["check_finite", "read_weights", "weights_hash", "with_weights"]

_NESTED = ("state_dict", "model", "model_state_dict", "net", "weights")
_PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file, or of a checkpoint that `torch.load(weights_only=True)` accepts.

    A checkpoint may hold the state dict itself, or under "state_dict" or "model"; prefixes that wrappers add
    ("module.", "_orig_mod.") are taken off.
    Raises ValueError for a missing or damaged file, for one whose pickle asks for anything else than tensors (it would
    run code: refused unread), and for one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there are no weights at {str(path)!r}")
    document = _safetensors(path) if path.suffix.lower() == ".safetensors" else _checkpoint(path)
    for name in _NESTED:
        inner = document.get(name) if isinstance(document, dict) else None
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            document = inner
            break
    if not isinstance(document, dict) or not document:
        raise ValueError(f"{path} holds no state dict, but {type(document).__name__}")
    wrong = next((name for name, value in document.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise ValueError(
            f"{path} holds no state dict: {wrong!r} is {type(document[wrong]).__name__}, not a tensor; "
            f"a state dict may stand under {', '.join(map(repr, _NESTED))}"
        )
    state = {str(name): value for name, value in document.items()}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def with_weights(build: Callable[[int | None], nn.Module], path: str | Path) -> nn.Module:
    """`build(classes)` with the weights of a file, where `classes` is None, or what the file's last layer has where
    that differs from the usual number. Raises ValueError as `read_weights`, and where names or shapes do not fit."""
    state = read_weights(path)
    model = build(None)
    own = model.state_dict()
    classes = _classes(state, own)
    if classes is not None:
        model = build(classes)
        own = model.state_dict()
    missing = [name for name in own if name not in state and not _counter(name)]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    said = [
        f"{title}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if said:
        raise ValueError(f"{path} does not fit {type(model).__name__}; {'; '.join(said)}")
    check_finite(state.items(), path)
    model.load_state_dict(state, strict=False)
    return model


def check_finite(tensors: Iterable[tuple[str, Tensor]], origin: Any) -> None:
    """Raises ValueError naming the first tensor with NaN or infinity."""
    for name, tensor in tensors:
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ValueError(f"{origin}: {count} of {tensor.numel()} numbers of {name!r} are NaN or infinite")


def weights_hash(model: nn.Module) -> str:
    """`tensors_hash` of the state dict."""
    return tensors_hash(model.state_dict().items())


def _classes(state: dict[str, Tensor], own: dict[str, Tensor]) -> int | None:
    """The number of classes of the file where that is all that differs from the model."""
    differing = [(state[n].shape, own[n].shape) for n in own if n in state and state[n].shape != own[n].shape]
    counts = {(there[0], here[0]) for there, here in differing if there and here and there[1:] == here[1:]}
    if len(counts) == 1 and all(there[1:] == here[1:] for there, here in differing):
        return int(counts.pop()[0])
    return None


def _counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # older files lack it; evaluation does not read it


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("safetensors files need safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|(Unsupported [a-z]+ \S+|Trying to call \S+ .*)", str(error))
        with path.open("rb") as file:
            pickled = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        if found is None or not pickled:
            raise ValueError(f"{path} is no checkpoint that can be read") from None
        raise ValueError(
            f"{path} is refused: it is pickled code, not only tensors ({found[1] or found[2]}), and reading it would "
            "run that. Where you trust it, read it yourself and save its state dict: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no checkpoint that can be read: {first[:200]}") from error
