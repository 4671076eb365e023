"""Knowing at every call which tensors have changed since the last one.

PyTorch counts writes to a tensor (`_version`), but not those through `.data`. On the CPU the contents are therefore
compared, bit for bit, with a kept copy; that costs a few milliseconds for a ResNet-50 and its memory once more. On
accelerators it would cost a synchronisation, so there a write through `.data` into the same storage goes unseen.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

__all__ = ["Freshness"]


class Freshness:
    """Gives each tensor of a set a key that is the same as at the last call exactly when the tensor is."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, int]] = {}

    def keys(self, tensors: Mapping[int, torch.Tensor]) -> dict[int, Hashable]:
        """One key for each tensor."""
        return {index: self._key(index, tensor) for index, tensor in tensors.items()}

    def _key(self, index: int, tensor: torch.Tensor) -> Hashable:
        where = (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.device.type != "cpu":
            return where
        now = _bits(tensor)
        copy, count = self._kept.get(index, (None, 0))
        if copy is None or copy.shape != now.shape or copy.dtype != now.dtype or not torch.equal(copy, now):
            count += 1
            self._kept[index] = (now.clone(), count)
        return (*where, count)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of its element size: unlike its values, NaN equals NaN and 0 differs from -0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds.get(tensor.element_size())
    return tensor if kind is None or tensor.is_complex() else tensor.view(kind)
