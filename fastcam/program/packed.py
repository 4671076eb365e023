"""Convolutions on the CPU with weights kept in oneDNN's own order and what follows done on the way out.

Plain `conv2d` brings its weight into that order at every call. Used for runs with folded batch norms, without
autograd. The operators are those torch.compile's CPU backend calls; where they are missing, or for other devices and
dtypes, the plain convolution runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fastcam._tracing import tracing

__all__ = ["PackedConvolution", "packs"]


class PackedConvolution:
    """A 2-D convolution, optionally followed by an addition and a ReLU, that packs each weight tensor it is given once.

    With `other`, a tensor of the result's shape, the sum is left in its memory.

    A packed weight lives as long as the tensor it was made from, so explainers of different precision, or in different
    threads, share the convolution without getting in each other's way.
    """

    def __init__(self, relu: bool):
        self._relu = relu
        self._packed = WeakTensorKeyDictionary()

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        other: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not _supported(x, weight) or isinstance(padding, str) or not _addable(other, x):
            result = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
            result = result if other is None else result.add_(other)
            return result.relu_() if self._relu else result
        pads, steps, spread = _pair(padding), _pair(stride), _pair(dilation)
        packed = self._packed.get(weight)
        if packed is None:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            packed = self._packed[weight] = pack(weight, pads, steps, spread, groups, list(x.shape))
        if other is not None:
            add = torch.ops.mkldnn._convolution_pointwise_.binary
            after = "relu" if self._relu else None
            return add(other, x, packed, bias, pads, steps, spread, groups, "add", None, after, [], None)
        run = torch.ops.mkldnn._convolution_pointwise
        return run(x, packed, bias, pads, steps, spread, groups, "relu" if self._relu else "none", [], "")


def _supported(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.ndim != 4 or x.numel() == 0 or x.dtype != weight.dtype:
        return False
    return packs(x.dtype, x.device)


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether convolutions of this kind run on packed weights."""
    if tracing() or device.type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _addable(other: torch.Tensor | None, x: torch.Tensor) -> bool:
    if other is None:
        return True
    # Sizes that follow the batch could be different multiples of it, which addition would broadcast for a batch of one.
    return other.dtype == x.dtype and len(other) == len(x) and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values
