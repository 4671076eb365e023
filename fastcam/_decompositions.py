"""Gradient operators of ATen written out in operators that every runtime has.

ONNX, and others that run exported programs, know no backward of pools and convolutions. Windows of average pools are
products of intervals, so their transposes are products of one small matrix for each dimension; a maximum's gradient is
a scatter; the transpose of a convolution is a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["copied", "table"]

_aten = torch.ops.aten


def table() -> dict[Any, Callable[..., Any]]:
    """Decompositions for `ExportedProgram.run_decompositions`: PyTorch's own for core ATen, and these."""
    found: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    found[_aten.max_pool2d_with_indices_backward.default] = _max_pool_backward
    found[_aten.max_pool3d_with_indices_backward.default] = _max_pool_backward
    found[_aten.adaptive_max_pool2d_backward.default] = _adaptive_max_pool_backward
    found[_aten.adaptive_max_pool3d_backward.default] = _adaptive_max_pool_backward
    found[_aten.avg_pool2d_backward.default] = _average_backward
    found[_aten.avg_pool3d_backward.default] = _average_backward
    found[_aten._adaptive_avg_pool2d_backward.default] = _adaptive_average_backward
    found[_aten._adaptive_avg_pool3d_backward.default] = _adaptive_average_backward
    found[_aten.convolution_backward.default] = _convolution_backward
    found[_aten.empty_permuted.default] = _empty
    found[_aten.copy.default] = _copy
    found[_aten.as_strided.default] = _strided
    found[_aten.as_strided_scatter.default] = _strided_scatter
    return found


def _empty(size: Sequence[int], order: Sequence[int], **options: Any) -> Tensor:
    """Strides are each runtime's own affair."""
    return torch.empty(size, **options)


def copied(into: Tensor, values: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten.copy`, which autograd has no derivative of."""
    return values.to(into.dtype).expand(into.shape).clone()


def _copy(into: Tensor, values: Tensor, non_blocking: bool = False) -> Tensor:
    """In a graph that writes into nothing, the values themselves where they lie as they would."""
    alike = values.ndim == into.ndim and values.dtype == into.dtype
    if alike and all(map(_equal, (*values.shape, *values.stride()), (*into.shape, *into.stride()))):
        return values
    return copied(into, values)


def _equal(one: Any, other: Any) -> bool:
    """For sizes that follow the number of images too, without making it a condition on that number."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # whose imports are heavy

    return statically_known_true(one == other)


def _strided(x: Tensor, size: Sequence[Any], stride: Sequence[Any], offset: Any = None) -> Tensor:
    """Of all entries in their order, as global pools of channels_last features do: another shape."""
    return x.reshape(size) if _all_in_order(x, size, stride, offset) else NotImplemented


def _strided_scatter(
    x: Tensor, values: Tensor, size: Sequence[Any], stride: Sequence[Any], offset: Any = None
) -> Tensor:
    """Into all entries in their order, as those pools' gradients do: the values themselves."""
    return values.reshape(x.shape) if _all_in_order(x, size, stride, offset) else NotImplemented


def _all_in_order(x: Tensor, size: Sequence[Any], stride: Sequence[Any], offset: Any) -> bool:
    """Whether size and stride mean the memory of x, both without gaps and last dimension first."""
    return (
        offset in (None, x.storage_offset())
        and _equal(math.prod(size), x.numel())
        and _is_in_order(x.shape, x.stride())
        and _is_in_order(size, stride)
    )


def _is_in_order(size: Sequence[Any], stride: Sequence[Any]) -> bool:
    expected = 1
    for extent, step in zip(reversed(size), reversed(stride), strict=True):
        if isinstance(extent, int) and extent == 1:
            continue
        if not _equal(step, expected):
            return False
        expected = expected * extent
    return True


def _max_pool_backward(
    grad: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, indices: Tensor
) -> Tensor:
    """Positions count through the spatial dimensions, as many as the kernel has."""
    return _scattered(grad, x, indices, len(kernel) if len(kernel) > 1 else indices.ndim - 2)


def _adaptive_max_pool_backward(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return _scattered(grad, x, indices, indices.ndim - 2)


def _scattered(grad: Tensor, x: Tensor, indices: Tensor, rank: int) -> Tensor:
    empty = torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(-rank)
    return empty.scatter_add(-1, indices.flatten(-rank), grad.flatten(-rank)).reshape(x.shape)


def _average_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    include_pad: bool,
    divisor: int | None = None,
) -> Tensor:
    rank = grad.ndim - 2
    kernel, stride, padding = (_each(v, rank) for v in (kernel, stride or kernel, padding))
    for d in range(rank):
        size, pad = x.shape[2 + d], padding[d]
        o, i = _places(grad, grad.shape[2 + d], size)
        start = o * stride[d] - pad
        end = (start + kernel[d]).clamp(max=size + pad)
        count = end - start if include_pad else end.clamp(max=size) - start.clamp(min=0)
        inside = (i >= start) & (i < end)
        grad = _along(grad, 2 + d, inside.to(grad.dtype) / (count if divisor is None else 1))
    return grad if divisor is None else grad / divisor


def _adaptive_average_backward(grad: Tensor, x: Tensor) -> Tensor:
    if math.prod(grad.shape[2:]) == 1:
        return (grad / math.prod(x.shape[2:])).expand(x.shape)
    for d in range(2, grad.ndim):
        size, out = x.shape[d], grad.shape[d]
        o, i = _places(grad, out, size)
        # Window o begins at floor(o size / out) and ends before ceil((o + 1) size / out).
        inside = (((i + 1) * out > o * size) & (i * out < (o + 1) * size)).to(grad.dtype)
        grad = _along(grad, d, inside / inside.sum(1, keepdim=True))
    return grad


def _places(like: Tensor, out: int, size: int) -> tuple[Tensor, Tensor]:
    """Windows (out, 1) and places (1, size), numbered."""
    return torch.arange(out, device=like.device).unsqueeze(1), torch.arange(size, device=like.device).unsqueeze(0)


def _along(grad: Tensor, dim: int, spread: Tensor) -> Tensor:
    """Each entry of dimension `dim` spread over its window: spread (out, in)."""
    return (grad.movedim(dim, -1) @ spread).movedim(-1, dim)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """With respect to the input alone: nothing here differentiates weights."""
    if list(wanted) != [True, False, False]:
        return NotImplemented
    rank = grad.ndim - 2
    stride, padding, dilation = (_each(v, rank) for v in (stride, padding, dilation))
    if transposed:
        back = _aten.convolution(grad, weight, None, stride, padding, dilation, False, [0] * rank, groups)
        return back, None, None
    left = [
        x.shape[2 + d]
        - ((grad.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1)
        for d in range(rank)
    ]
    return _aten.convolution(grad, weight, None, stride, padding, dilation, True, left, groups), None, None


def _each(value: Sequence[int], rank: int) -> list[int]:
    return list(value) * rank if len(value) == 1 else list(value)
