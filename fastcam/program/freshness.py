"""Knowing at every call which tensors have changed since the last one.

PyTorch counts writes to a tensor (`_version`), but not those through `.data` and not a replaced storage with the same
counter. On the CPU the contents are looked at as well, at the speed memory can be read: small tensors are compared byte
by byte with a kept copy, large ones by a checksum. On accelerators that would cost a synchronisation, so there a write
through `.data` into the same storage goes unseen.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

__all__ = ["Freshness"]

#: Elements up to which a tensor is compared exactly.
_SMALL = 4096
#: Every how many words the position-weighted sample takes one; a prime, so that no row or channel stride hides from it.
_STRIDE = 61


class Freshness:
    """Gives each tensor of a set a key that is the same as at the last call exactly when the tensor is."""

    def __init__(self) -> None:
        self._bytes: torch.Tensor | None = None
        self._epoch = 0

    def keys(self, tensors: Mapping[int, torch.Tensor]) -> dict[int, Hashable]:
        """One key for each tensor. All small tensors on the CPU share one counter: if one changes, all count as new."""
        small = [t for t in tensors.values() if t.device.type == "cpu" and t.numel() <= _SMALL]
        now = torch.cat([t.reshape(-1).view(torch.uint8) for t in small]) if small else None
        if now is not None and (self._bytes is None or not torch.equal(now, self._bytes)):
            self._bytes = now
            self._epoch += 1
        return {index: self._key(tensor) for index, tensor in tensors.items()}

    def _key(self, tensor: torch.Tensor) -> Hashable:
        where = (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.device.type != "cpu":
            return where
        return (*where, self._epoch if tensor.numel() <= _SMALL else self._checksum(tensor))

    def _checksum(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Two sums: of all 64-bit words, which sees changed values, and of a sample weighted by position, which sees
        values changing places."""
        flat = tensor.reshape(-1)
        size = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
        aligned = flat.storage_offset() * flat.element_size() % 8 == 0
        words = (flat[:size] if aligned else flat[:size].clone()).view(torch.int64)
        tail = flat[size:].clone().view(torch.uint8).sum() if size < flat.numel() else 0
        sample = words[::_STRIDE]
        places = torch.arange(1, len(sample) + 1)
        return int(words.sum() + tail), int((sample * places).sum())
