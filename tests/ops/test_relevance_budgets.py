"""`relevance_budgets` against a float64 oracle: exact sums of an image's positive and negative entries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcam import ops
from fastcam._testing.ops import DTYPES, LAYOUTS, OPCHECKED, make, to_float64
from fastcam._testing.relevance import assert_elementwise, assert_refuses_grad, assert_repeatable

OP = torch.ops.fastcam.relevance_budgets.default


def check(relevance) -> None:
    result = ops.relevance_budgets(relevance)
    assert result.dtype == torch.promote_types(relevance.dtype, torch.float32)
    assert result.is_contiguous()
    expected = [
        [math.fsum(x for x in image if x > 0), math.fsum(-x for x in image if x < 0)]
        for image in to_float64(relevance).reshape(len(relevance), -1).tolist()
    ]
    assert_elementwise(result, np.array(expected), steps=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(backend, layout, dtype):
    check(make((2, 17, 5, 7), dtype, 1, layout))
    check(make((3, 5, 60, 71), dtype, 2, layout))  # several blocks an image


def test_difference_is_the_sum(backend):
    r = make((3, 40, 9), torch.float64, 1)
    p, q = ops.relevance_budgets(r).unbind(1)
    torch.testing.assert_close(p - q, r.sum((1, 2)))
    torch.testing.assert_close(p + q, r.abs().sum((1, 2)))


def test_neither_budget_is_negative_nor_minus_zero(backend):
    for r in (torch.ones(2, 3), -torch.ones(2, 3), torch.zeros(2, 3), torch.full((2, 3), -0.0)):
        assert not ops.relevance_budgets(r).signbit().any()


def test_float32_holds_what_many_small_entries_add_up_to(backend):
    """2^24 ones and as many halves taken off: plain float32 addition would stop at 2^24 and lose every half."""
    r = torch.ones(1, 2, 2**24 + 2**20)
    r[:, 1] = -0.5
    assert ops.relevance_budgets(r).tolist() == [[2.0**24 + 2**20, 2.0**23 + 2**19]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(backend, dtype):
    inf, nan = math.inf, math.nan
    r = torch.tensor([[1, nan, -1], [inf, 1, -1], [-inf, 1, -1], [inf, -inf, 1], [inf, nan, 1]], dtype=dtype)
    expected = torch.tensor([[nan, nan], [inf, 1], [1, inf], [inf, inf], [nan, nan]])
    for x in (r, torch.cat([r] * 30, 1).flip(1)):
        found = ops.relevance_budgets(x)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(backend, shape):
    assert torch.equal(ops.relevance_budgets(torch.zeros(shape)), torch.zeros(shape[0], 2))


def test_batch_is_its_images(backend):
    if backend == "reference":
        pytest.skip("PyTorch's own kernels make no such promise")
    wide = make((8, 7, 39, 41), torch.float32, 1)
    last = wide.to(memory_format=torch.channels_last)
    for r in (wide, last, wide[::2], last[::2], last[:, 1:], wide.transpose(0, 1).contiguous().transpose(0, 1)):
        images = [ops.relevance_budgets(r[b : b + 1]) for b in range(len(r))]
        assert torch.equal(ops.relevance_budgets(r), torch.cat(images))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_same_bits_on_every_run_and_thread_count(backend, layout):
    if backend == "reference":
        pytest.skip("PyTorch's own kernels make no such promise")
    r = make((3, 17, 67, 71), torch.float32, 1, layout)
    assert_repeatable(lambda: ops.relevance_budgets(r))


@pytest.mark.slow
def test_more_elements_than_int32(backend):
    """4 GiB of half values; the last elements lie beyond 2^31."""
    if backend == "reference":
        pytest.skip("would need several times the memory")
    r = torch.zeros((2, 2**30 + 8), dtype=torch.float16)
    r[1, -2:] = torch.tensor([3.0, -5.0])
    assert ops.relevance_budgets(r).tolist() == [[0.0, 0.0], [3.0, 5.0]]


X = torch.zeros(2, 5)
ERRORS = [
    ([0.0], TypeError, "relevance must be a torch.Tensor, got list"),
    (X.long(), TypeError, "relevance must be float64, .* got torch.int64"),
    (X.to_sparse(), TypeError, "relevance must be a strided tensor, got layout torch.sparse_coo"),
    (X[0], ValueError, r"relevance must be \(B,C,...\), got 1 dimensions: \(5,\)"),
    (X[0, 0], ValueError, r"relevance must be \(B,C,...\), got 0 dimensions: \(\)"),
]


@pytest.mark.parametrize(("relevance", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(relevance, error, message):
    with pytest.raises(error, match="relevance_budgets: " + message):
        ops.relevance_budgets(relevance)


def test_bare_op_checks_too():
    for wrong in (X[0], X[0, 0], X.long()):
        with pytest.raises((ValueError, TypeError)):
            OP(wrong)


def test_inputs_that_require_grad_are_refused(backend):
    for call in (ops.relevance_budgets, OP):
        assert_refuses_grad(call, "relevance_budgets", {"relevance": X})


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    torch.library.opcheck(OP, (make((2, 5, 4, 6), dtype, 1, layout),))
    torch.library.opcheck(OP, (X[:0],))


def test_compiled_graph_has_the_values_of_eager():
    compiled = torch.compile(ops.relevance_budgets, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        r = make((b, 5, 4), torch.float32, 1)
        assert torch.equal(compiled(r), ops.relevance_budgets(r))
