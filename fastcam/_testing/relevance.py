"""What the tests of the relevance_* ops share: inputs, formulas of one element, comparisons element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcam._testing.ops import to_float64

__all__ = [
    "assert_elementwise",
    "assert_fresh",
    "assert_refuses_grad",
    "assert_repeatable",
    "elementwise",
    "every_combination",
    "quotient",
    "with_zeros",
]

ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5, -3.0)


def quotient(r: float, d: float, epsilon: float = 0.0) -> float:
    """r over d moved away from zero; 0 where even that is zero, whatever r is."""
    moved = d - epsilon if d < 0 else d + epsilon
    return 0.0 if moved == 0 else r / moved


def elementwise(formula: Callable[..., Any], *tensors: Tensor | None) -> list[np.ndarray]:
    """A plain function of one element each, of all elements: an array a result. A tensor left out counts as ones."""
    shape = next(x.shape for x in tensors if x is not None)
    columns = [[1.0] * shape.numel() if x is None else to_float64(x).ravel().tolist() for x in tensors]
    found = np.array([formula(*values) for values in zip(*columns, strict=True)], dtype=np.float64)
    return list(found.reshape(shape.numel(), -1).T.reshape(-1, *shape))


def assert_elementwise(actual: Tensor, expected: np.ndarray, scale: np.ndarray | None = None, steps: float = 8) -> None:
    """`steps` eps of the accumulation dtype, of `scale` (the value itself if left out), and one rounding.

    NaN and infinity where expected, with its sign; infinity also where the dtype ends.
    """
    assert tuple(actual.shape) == expected.shape
    found, out = to_float64(actual), torch.finfo(actual.dtype)
    acc = torch.finfo(torch.promote_types(actual.dtype, torch.float32))
    size = np.abs(expected)
    with np.errstate(invalid="ignore"):
        error = np.abs(found - expected)
        limit = steps * acc.eps * np.maximum(size if scale is None else scale, acc.smallest_normal)
        if actual.dtype.itemsize < 4:
            limit = limit + 0.5 * out.eps * np.maximum(size, out.smallest_normal)
        good = np.isfinite(size) & (error <= limit)
    good |= np.isnan(found) & np.isnan(expected)
    good |= np.isinf(found) & (np.sign(found) == np.sign(expected)) & (size >= out.max)
    where = tuple(int(i) for i in np.argwhere(~good)[0]) if not good.all() else ()
    assert good.all(), (
        f"{(~good).sum()} of {good.size} beyond the limit, first at {where}: {found[where]}, expected {expected[where]}"
    )


def assert_fresh(result: Tensor, like: Tensor, *inputs: Tensor | None) -> None:
    """Dtype, shape and strides of empty_like(like), in memory of its own."""
    assert result.dtype == like.dtype
    assert result.shape == like.shape
    assert result.stride() == torch.empty_like(like).stride()
    others = {x.untyped_storage().data_ptr() for x in (like, *inputs) if x is not None and x.numel()}
    assert not result.numel() or result.untyped_storage().data_ptr() not in others


def assert_repeatable(call: Callable[[], Any], runs: int = 20) -> None:
    """The same bits from every run and from every number of threads."""

    def bits() -> list[Tensor]:
        found = call()
        return [found] if isinstance(found, Tensor) else list(found)

    def same(others: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(first, others, strict=True))

    first, threads = bits(), torch.get_num_threads()
    assert all(same(bits()) for _ in range(runs))
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert same(bits())
    finally:
        torch.set_num_threads(threads)


def assert_refuses_grad(call: Callable[..., Any], op: str, inputs: dict[str, Any]) -> None:
    """Each of the tensors is refused where it requires grad, unless nobody records; `op` is in the message."""
    message = rf"fastcam.ops.{op} is not differentiable; detach the inputs, or call under torch.no_grad\(\)"
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        changed = {**inputs, name: value.clone().requires_grad_()}
        with pytest.raises(RuntimeError, match=message):
            call(**changed)
        with torch.no_grad():
            call(**changed)


def every_combination(count: int, dtype: torch.dtype) -> list[Tensor]:
    """`count` tensors of two dimensions, with NaN, infinities, both zeros and a few others in all combinations."""
    values = torch.tensor(ODD, dtype=dtype)
    grids = torch.meshgrid(*[values] * count, indexing="ij")
    return [x.reshape(len(ODD), -1).contiguous() for x in grids]


def with_zeros(x: Tensor, seed: int, share: float = 0.1) -> Tensor:
    """x with zeros here and there, in its own layout."""
    generator = torch.Generator().manual_seed(seed)
    return x.masked_fill_(torch.rand(x.shape, generator=generator) < share, 0)
