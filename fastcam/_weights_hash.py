"""Telling weights apart across processes and machines: a SHA-256 of named tensors."""

from __future__ import annotations

import hashlib
import operator
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["kept_hash", "tensors_hash"]

#: Of each model the hashes found last, by the tensors' names, and of which state of them.
_Known = tuple[Any, list[StorageWeakRef], str]
_kept: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], _Known]] = weakref.WeakKeyDictionary()


def tensors_hash(tensors: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 of tensors (names, types, shapes, numbers; sorted by name), its first 32 hexadecimal digits.

    The same on every machine for the same weights, wherever and in whatever file they lie.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(tensors, key=operator.itemgetter(0)):
        if not isinstance(tensor, Tensor):  # a module's extra state
            continue
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous()
        state.update(values.reshape(-1).view(torch.uint8).numpy() if values.numel() else b"")
    return state.hexdigest()[:32]


def kept_hash(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """`tensors_hash` of some of a model's tensors, computed again only where one was replaced or written to.

    Writes through `.data`, which PyTorch does not count, go unseen. Cost, where nothing changed: a look at each
    tensor's address and count of writes.
    """
    state = [
        (tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor.shape, _writes(tensor))
        for tensor in tensors.values()
    ]
    every, names = _kept.setdefault(model, {}), tuple(tensors)
    known = every.get(names)
    if known is None or known[0] != state:
        # While a weak reference lives, no other storage gets the same address of its bookkeeping.
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors.values()]
        known = every[names] = state, storages, tensors_hash(tensors.items())
    return known[2]


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
