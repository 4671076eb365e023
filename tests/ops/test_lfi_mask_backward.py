"""`lfi_mask_backward` against a float64 oracle: the formula, channel by channel in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcam._testing.ops import DTYPES, LAYOUTS, OPCHECKED, make, to_float64
from fastcam._testing.relevance import (
    assert_elementwise,
    assert_fresh,
    assert_refuses_grad,
    assert_repeatable,
    with_zeros,
)
from fastcam.ops.lfi_mask_backward import lfi_mask_backward

OP = torch.ops.fastcam.lfi_mask_backward.default


def channel(g: np.ndarray, x: np.ndarray, shade: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradient, and the size of what it is a sum of."""
    low, high = x.min(), x.max()
    if np.isnan(x).any():
        return np.full_like(x, np.nan), np.zeros_like(x)
    if low == high:
        return np.zeros_like(x), np.zeros_like(x)
    d, n = np.where(x == 0, 0, g * shade) / (high - low), (x - low) / (high - low)
    found, size = d.copy(), np.abs(d)
    found[x == low] += (d * (n - 1)).sum() / (x == low).sum()
    found[x == high] -= (d * n).sum() / (x == high).sum()
    size[x == low] += np.abs(d).sum()
    size[x == high] += np.abs(d).sum()
    return found, size


def check(grad, features, grey) -> None:
    result = lfi_mask_backward(grad, features, grey)
    assert_fresh(result, features, grad, grey)
    g, f, shades = (to_float64(x) for x in (grad, features, grey))
    expected, scale = np.empty_like(f), np.empty_like(f)
    for b, k in np.ndindex(f.shape[:2]):
        expected[b, k], scale[b, k] = channel(g[b, k], f[b, k], shades[b, 0])
    assert_elementwise(result, expected, scale, steps=16)


def features_of(shape, dtype, seed, layout="contiguous"):
    """With zeros, ties, a constant and a dead channel."""
    x = with_zeros(make(shape, torch.float64, seed), seed)
    x[:, 1::3] = x[:, 1::3].round().relu()
    x[0, 0], x[-1, -1] = 0.5, 0
    return LAYOUTS[layout](x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide", [False, True])
def test_layouts_and_dtypes(backend, wide, layout, dtype):
    grey = make((3, 1, 5, 7), torch.promote_types(dtype, torch.float32) if wide else dtype, 1, layout)
    features, grad = features_of((3, 19, 5, 7), dtype, 2, layout), make((3, 19, 5, 7), dtype, 3)
    check(grad, features, grey)
    check(LAYOUTS[layout](grad), features, grey)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("k", "h", "w"), [(1, 7, 7), (3, 1, 1), (5, 1, 3), (63, 7, 7), (300, 13, 17), (530, 2, 2), (2, 64, 65)]
)
def test_sizes(backend, k, h, w, layout):
    features = features_of((2, k, h, w), torch.float32, 4, layout)
    check(make((2, k, h, w), torch.float32, 5, layout), features, make((2, 1, h, w), torch.float32, 6))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_channel(backend, layout):
    features, grad = features_of((2, 19, 4, 4), torch.float32, 7, layout), make((2, 19, 4, 4), torch.float32, 8)
    features[1, 2, 3, 1] = torch.nan
    check(grad, features, make((2, 1, 4, 4), torch.float32, 9))


def test_empty_batch(backend):
    empty = torch.zeros(0, 5, 4, 4)
    assert lfi_mask_backward(empty, empty, empty[:, :1]).shape == (0, 5, 4, 4)


F, GREY = torch.zeros(2, 5, 4, 4), torch.zeros(2, 1, 4, 4)
ERRORS = [
    ({"grad": None}, TypeError, "grad must be a torch.Tensor, got NoneType"),
    ({"grad": F.half()}, TypeError, "grad must be torch.float32 like the features, got torch.float16"),
    ({"grad": F[:, :4]}, ValueError, r"grad must be \(2, 5, 4, 4\) like the features, got \(2, 4, 4, 4\)"),
    ({"features": F.long()}, TypeError, "got torch.int64"),
    ({"grey": F}, ValueError, r"grey must be \(2, 1, 4, 4\), got \(2, 5, 4, 4\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="lfi_mask_backward: .*" + message):
        lfi_mask_backward(**{"grad": F, "features": F, "grey": GREY, **change})


@pytest.mark.parametrize("change", range(3))
def test_bare_op_reads_nothing_out_of_bounds(change):
    arguments = [F, F, GREY]
    for wrong in (torch.zeros(2, 5, 4, 3), torch.zeros(2, 2, 4, 4), F[0], arguments[change].double()):
        with pytest.raises((ValueError, TypeError)):
            OP(*(wrong if i == change else x for i, x in enumerate(arguments)))


def test_inputs_that_require_grad_are_refused(backend):
    for call in (lfi_mask_backward, OP):
        assert_refuses_grad(call, "lfi_mask_backward", {"grad": F, "features": F, "grey": GREY})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_on_every_run_thread_count_and_batch(backend, layout):
    if backend == "reference":
        pytest.skip("PyTorch's own reductions make no such promise")
    grad, features = make((4, 700, 7, 7), torch.float32, 10), features_of((4, 700, 7, 7), torch.float32, 11, layout)
    grey = make((4, 1, 7, 7), torch.float32, 12)
    assert_repeatable(lambda: lfi_mask_backward(grad, features, grey))
    images = [lfi_mask_backward(*(x[b : b + 1] for x in (grad, features, grey))) for b in range(4)]
    assert torch.equal(lfi_mask_backward(grad, features, grey), torch.cat(images))


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    features, grad = make((2, 5, 4, 6), dtype, 13, layout), make((2, 5, 4, 6), dtype, 14)
    torch.library.opcheck(OP, (grad, features, make((2, 1, 4, 6), torch.float32, 15)))
    torch.library.opcheck(OP, (F[:0], F[:0], GREY[:0]))
