"""`relevance_combine` against a float64 oracle: elements in plain Python, the count of each image beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastcam
from fastcam import ops
from fastcam._testing.ops import DTYPES, LAYOUTS, OPCHECKED, make, to_float64
from fastcam._testing.relevance import (
    assert_elementwise,
    assert_fresh,
    assert_refuses_grad,
    assert_repeatable,
    elementwise,
    every_combination,
    with_zeros,
)

OP = torch.ops.fastcam.relevance_combine.default


def check(inputs, parts, budgets, shift=True, threshold=0.0) -> None:
    result = ops.relevance_combine(inputs, parts, budgets, shift, threshold)
    assert_fresh(result, inputs, parts, budgets)
    b = len(inputs)
    tc, ta, tb = parts.split(b)

    def pieces(x, c, a, b):
        return 0.0 if x <= 0 else x * c, a if x > threshold else b

    shared, added = elementwise(pieces, inputs, tc, ta, tb)
    taken = np.zeros_like(shared)
    for image, budget, out in zip(shared, to_float64(budgets)[:, 0], taken, strict=True):
        count = int((image != 0).sum())
        if shift and count and budget > 0:
            out[image != 0] = 1 / count
    with np.errstate(invalid="ignore"):
        expected, scale = shared - taken + added, np.abs(shared) + taken + np.abs(added)
    assert_elementwise(result, expected, scale, steps=4)


def ones(inputs):
    return torch.ones(len(inputs), 2, dtype=torch.promote_types(inputs.dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shift", [True, False])
def test_layouts_and_dtypes(backend, shift, layout, dtype):
    inputs = with_zeros(make((2, 17, 5, 7), dtype, 1, layout), 2)
    parts = with_zeros(make((6, 17, 5, 7), dtype, 3, layout), 4)
    check(inputs, parts, ones(inputs), shift)
    check(make((2, 17, 5, 7), dtype, 5), parts, ones(inputs), shift, 0.5)


EXAMPLES = [
    (1.0, True, (-19, 19, -60)),
    (1.5, True, (-1, 31, -60)),
    (2.0, True, (17, 43, -60)),
    (1.0, False, (11, 49, -60)),
]


@pytest.mark.parametrize(("ratio", "shift", "sixtieths"), EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_layer_worked_out_by_hand(backend, dtype, ratio, shift, sixtieths):
    """Budgets, messages and this op on either side of one layer of three inputs and two outputs."""
    x = torch.tensor([[3.0, 1.0, 0.0]], dtype=dtype)
    v = torch.tensor([[1.0, -2.0, 1.0], [-1.0, 1.0, 3.0]], dtype=dtype).abs()
    relevance = torch.tensor([[4.0, -2.0]], dtype=dtype)
    divisors = torch.cat([x.clamp(min=0), (x > 0).to(dtype), (x <= 0).to(dtype)]) @ v.t()
    assert divisors.tolist() == [[5, 4], [3, 2], [1, 3]]
    budgets = ops.relevance_budgets(relevance)
    assert budgets.tolist() == [[4, 2]]
    messages = ops.relevance_equilibrium(relevance, budgets, divisors, ratio)
    lower = ops.relevance_combine(x, messages @ v, budgets, shift)
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(lower * 60, torch.tensor([sixtieths], dtype=dtype), rtol=eps, atol=60 * eps)


def test_shift_takes_one_altogether_from_each_image_with_something_positive(backend):
    x, t = make((3, 40, 7), torch.float64, 1), make((9, 40, 7), torch.float64, 2)
    budgets = ones(x)
    budgets[1, 0] = 0
    difference = ops.relevance_combine(x, t, budgets, False) - ops.relevance_combine(x, t, budgets, True)
    expected = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(difference.sum((1, 2)), expected)
    assert torch.equal(difference[0] != 0, x[0] > 0)


def test_image_without_a_shared_part_is_not_shifted(backend):
    x, t = make((2, 40), torch.float32, 1), make((6, 40), torch.float32, 2)
    x[0] = -x[0].abs()
    t[1] = 0
    result = ops.relevance_combine(x, t, ones(x))
    assert torch.equal(result, torch.where(x > 0, t[2:4], t[4:]))


def test_elements_are_counted_exactly(backend):
    """More than one block, none of them full."""
    x, t = torch.ones(2, 70001), torch.zeros(6, 70001)
    t[:2] = 1
    t[0, ::3] = 0
    result = ops.relevance_combine(x, t, ones(x))
    counts = torch.tensor([70001 - len(range(0, 70001, 3)), 70001])
    assert torch.equal(result[:, 1], 1 - 1 / counts)
    assert result[0, 0] == 0


def test_products_that_underflow_are_not_counted(backend):
    x, t = torch.tensor([[1e-30, 1.0]]), torch.tensor([[1e-30, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert ops.relevance_combine(x, t, ones(x)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [True, False])
def test_nan_and_infinity(backend, shift, dtype):
    x, tc, ta = every_combination(3, dtype)
    check(x, torch.cat([tc, ta, ta.roll(1, 0)]), ones(x), shift, 0.5)
    check(x, torch.cat([tc, ta, ta.roll(1, 0)]), every_combination(1, ones(x).dtype)[0].expand(-1, 2), shift)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_several_threads(backend, layout):
    """Images that end inside a thread's range. Oracle: the reference in float64, of products without rounding."""
    x = make((5, 20, 41, 47), torch.float32, 1, layout)
    t = with_zeros(make((15, 20, 41, 47), torch.float32, 2, layout), 3)
    exact = fastcam.reference.relevance_combine(x.double(), t.double(), ones(x).double(), True, 0.5).numpy()
    scale = 1 + np.abs(exact) + np.abs(to_float64(x * t[:5]))
    assert_elementwise(ops.relevance_combine(x, t, ones(x), True, 0.5), exact, scale, steps=4)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("shift", [True, False])
def test_empty(backend, shift, shape):
    t = torch.zeros(3 * shape[0], *shape[1:])
    assert ops.relevance_combine(torch.zeros(shape), t, torch.zeros(shape[0], 2), shift).shape == shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_batch_is_its_images(backend, layout):
    x, t = make((4, 7, 39, 41), torch.float32, 1, layout), make((12, 7, 39, 41), torch.float32, 2, layout)
    images = [ops.relevance_combine(x[b : b + 1], t[b::4], ones(x)[:1]) for b in range(4)]
    assert torch.equal(ops.relevance_combine(x, t, ones(x)), torch.cat(images))


def test_same_bits_on_every_run_and_thread_count(backend):
    x, t = make((3, 70001), torch.float32, 1), make((9, 70001), torch.float32, 2)
    assert_repeatable(lambda: ops.relevance_combine(x, t, ones(x)))


X, T, BUDGETS = torch.zeros(2, 5), torch.zeros(6, 5), torch.zeros(2, 2)
ERRORS = [
    ({"inputs": [0.0]}, TypeError, "inputs must be a torch.Tensor, got list"),
    ({"inputs": X.long()}, TypeError, "inputs must be float64, .* got torch.int64"),
    ({"inputs": X.to_sparse()}, TypeError, "inputs must be a strided tensor, got layout torch.sparse_coo"),
    ({"inputs": X[0]}, ValueError, r"inputs must be \(B,C,...\), got 1 dimensions: \(5,\)"),
    ({"parts": None}, TypeError, "parts must be a torch.Tensor, got NoneType"),
    ({"parts": X}, ValueError, r"parts must be \(6, 5\), three times the inputs, got \(2, 5\)"),
    ({"parts": T[:, :4]}, ValueError, r"parts must be \(6, 5\), three times the inputs, got \(6, 4\)"),
    ({"parts": T.half()}, TypeError, "parts must be torch.float32 like the inputs, got torch.float16"),
    ({"parts": T.to("meta")}, ValueError, "parts is on meta, inputs on cpu"),
    ({"budgets": None}, TypeError, "budgets must be a torch.Tensor, got NoneType"),
    ({"budgets": BUDGETS.double()}, TypeError, "budgets must be torch.float32 for torch.float32, got torch.float64"),
    ({"budgets": BUDGETS[:1]}, ValueError, r"budgets must be \(2, 2\), got \(1, 2\)"),
    ({"budgets": BUDGETS.to("meta")}, ValueError, "budgets must be on cpu, got meta"),
    ({"threshold": -1.0}, ValueError, "threshold must not be negative, got -1.0"),
    ({"threshold": math.inf}, ValueError, "threshold must be a finite float, got inf"),
    ({"threshold": math.nan}, ValueError, "threshold must be a finite float, got nan"),
    ({"threshold": "0"}, TypeError, "threshold must be a finite float, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="relevance_combine: " + message):
        ops.relevance_combine(**{"inputs": X, "parts": T, "budgets": BUDGETS, **change})


@pytest.mark.parametrize("change", range(3))
def test_bare_op_reads_nothing_out_of_bounds(change):
    arguments = [torch.zeros(2, 300), torch.zeros(6, 300), torch.zeros(2, 2)]
    for wrong in (torch.zeros(2, 299), torch.zeros(3, 300), torch.zeros(300), arguments[change].long()):
        with pytest.raises((ValueError, TypeError)):
            OP(*(wrong if i == change else x for i, x in enumerate(arguments)))


def test_inputs_that_require_grad_are_refused(backend):
    for call in (ops.relevance_combine, OP):
        assert_refuses_grad(call, "relevance_combine", {"inputs": X, "parts": T, "budgets": BUDGETS})


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    x, t = make((2, 5, 4, 6), dtype, 1, layout), make((6, 5, 4, 6), dtype, 2, layout)
    torch.library.opcheck(OP, (x, t, ones(x)))
    torch.library.opcheck(OP, (x, t.contiguous(), ones(x), False, 0.5))
    torch.library.opcheck(OP, (X[:0], T[:0], BUDGETS[:0]))


def test_compiled_graph_has_the_values_of_eager():
    compiled = torch.compile(ops.relevance_combine, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        x, t = make((b, 5, 4), torch.float32, 1), make((3 * b, 5, 4), torch.float32, 2)
        assert torch.equal(compiled(x, t, ones(x)), ops.relevance_combine(x, t, ones(x)))
