"""Knowing at every call which tensors have changed since the last one.

PyTorch counts writes to a tensor (`_version`), but not those through `.data`. On the CPU the contents are therefore
hashed: one read of the weights a call, at memory speed, and no copy of them. On accelerators it would cost a
synchronisation, so there a write through `.data` into the same storage goes unseen.

The hash (`csrc/cpu/fingerprint.h`) has 64 bits. It always tells tensors apart that differ in a single word of 8 bytes;
other changes are missed with a probability of about 2^-64 each, more exactly at most 2^-64 for every block of 64 KiB
that changed, as long as they were not constructed to be missed: the hash is no cryptographic one. Where the C++
extension is missing, the contents are compared exactly, with a kept copy: two reads, and the weights' memory once more.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from fastcam import _extension

__all__ = ["Freshness"]


class Freshness:
    """Gives each tensor of a set a key that is the same as at the last call exactly when the tensor is."""

    def __init__(self) -> None:
        self._hashing = _extension.why_not() is None
        self._kept: dict[int, tuple[torch.Tensor, int]] = {}

    def keys(self, tensors: Mapping[int, torch.Tensor]) -> dict[int, Hashable]:
        """One key for each tensor."""
        here = {index: tensor for index, tensor in tensors.items() if tensor.device.type == "cpu"}
        if self._hashing:
            contents = _hashes(here)
        else:
            contents = {index: self._count(index, tensor) for index, tensor in here.items()}
        return {
            index: (t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, contents.get(index))
            for index, t in tensors.items()
        }

    def _count(self, index: int, tensor: torch.Tensor) -> int:
        """How often the tensor's contents have been found changed."""
        now = _bits(tensor)
        copy, count = self._kept.get(index, (None, 0))
        if copy is None or copy.shape != now.shape or copy.dtype != now.dtype or not torch.equal(copy, now):
            count += 1
            self._kept[index] = (now.clone(), count)
        return count


def _hashes(tensors: Mapping[int, torch.Tensor]) -> dict[int, int]:
    """Of each tensor's elements in the order in which they lie in memory."""
    dense = [_dense(tensor) for tensor in tensors.values()]  # kept alive while their addresses are read
    found = _extension.load().fingerprints([(tensor.data_ptr(), tensor.nbytes) for tensor in dense])
    return dict(zip(tensors, found, strict=True))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its elements fill a stretch of memory, in any order of dimensions, else such a copy.

    Of what is expanded, one repetition is enough.
    """
    if tensor.is_complex():
        tensor = tensor.resolve_conj()  # a conjugate may be the same memory
    if tensor.is_contiguous():
        return tensor
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return once if torch.ops.aten.is_non_overlapping_and_dense(once) else once.contiguous()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of its element size: unlike its values, NaN equals NaN and 0 differs from -0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds.get(tensor.element_size())
    return tensor if kind is None or tensor.is_complex() else tensor.view(kind)
