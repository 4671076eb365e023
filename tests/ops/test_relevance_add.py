"""`relevance_add` against a float64 oracle: the shares of one sum, in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from fastcam import ops
from fastcam._testing.ops import DTYPES, LAYOUTS, OPCHECKED, make
from fastcam._testing.relevance import (
    assert_elementwise,
    assert_fresh,
    assert_refuses_grad,
    assert_repeatable,
    elementwise,
    every_combination,
    quotient,
    with_zeros,
)

OP = torch.ops.fastcam.relevance_add.default


def check(relevance, first, second, factor=None, epsilon=1e-6) -> None:
    results = ops.relevance_add(relevance, first, second, factor, epsilon)
    assert len(results) == 2
    assert_fresh(results[0], relevance, first, second, factor, results[1])
    assert_fresh(results[1], relevance, first, second, factor)

    def shares(r, a, b, f):
        share = quotient(r * f, a + b, epsilon)
        return a * share, b * share

    for result, expected in zip(results, elementwise(shares, relevance, first, second, factor), strict=True):
        assert_elementwise(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(backend, layout, dtype):
    shape = (2, 17, 5, 7)
    relevance, first = make(shape, dtype, 1, layout), with_zeros(make(shape, dtype, 2, layout), 3)
    second = make(shape, dtype, 4, layout)
    check(relevance, first, second)
    check(relevance, first, -first)  # every sum is 0
    check(relevance, make(shape, dtype, 5), second, make(shape, dtype, 6, layout), 0.0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-9])
def test_relevance_is_conserved_where_the_sum_is_not_near_zero(backend, epsilon):
    r, a, b = (make((3, 400), torch.float64, seed) for seed in range(3))
    found = torch.add(*ops.relevance_add(r, a, b, None, epsilon))
    clear = (a + b).abs() > 1e-2
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(found[clear], r[clear], rtol=1e-6 if epsilon else 1e-12, atol=0)


def test_a_sum_of_zero_gets_nothing_without_epsilon(backend):
    r, a = make((2, 9), torch.float32, 1), make((2, 9), torch.float32, 2)
    for x in ops.relevance_add(r, a, -a, None, 0.0):
        assert torch.equal(x, torch.zeros_like(x))


def test_zero_counts_as_positive(backend):
    one = torch.ones(1, 2)
    one_share, other = ops.relevance_add(one, one, -one, None, 0.5)
    assert one_share.tolist() == [[2.0, 2.0]]
    assert other.tolist() == [[-2.0, -2.0]]


def test_summands_may_trade_places(backend):
    r, a, b = (make((3, 300), torch.float32, seed) for seed in range(3))
    found, swapped = ops.relevance_add(r, a, b), ops.relevance_add(r, b, a)
    assert torch.equal(found[0], swapped[1])
    assert torch.equal(found[1], swapped[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_nan_and_infinity(backend, epsilon, dtype):
    check(*every_combination(3, dtype), None, epsilon)
    check(*every_combination(4, dtype), epsilon)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_several_threads(backend, layout):
    """More elements than a thread takes alone. Oracle: torch's float64."""
    r, a, b, f = (make((3, 20, 51, 67), torch.float32, seed, layout) for seed in range(4))
    total = a.double() + b.double()
    share = r.double() * f.double() / torch.where(total < 0, total - 1e-3, total + 1e-3)
    for result, summand in zip(ops.relevance_add(r, a, b, f, 1e-3), (a, b), strict=True):
        assert_elementwise(result, (summand.double() * share).numpy())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(backend, shape):
    x = torch.zeros(shape)
    assert [y.shape for y in ops.relevance_add(x, x, x, x)] == [x.shape] * 2


def test_batch_is_its_images(backend):
    r, a = make((4, 7, 9, 11), torch.float32, 1, "channels_last"), make((4, 7, 9, 11), torch.float32, 2)
    images = [ops.relevance_add(r[b : b + 1], a[b : b + 1], r[b : b + 1]) for b in range(4)]
    for whole, parts in zip(ops.relevance_add(r, a, r), zip(*images, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_same_bits_on_every_run_and_thread_count(backend):
    r, a, b = (make((3, 70001), torch.float32, seed) for seed in range(3))
    assert_repeatable(lambda: ops.relevance_add(r, a, b))


X = torch.zeros(2, 5)
ERRORS = [
    ({"relevance": [0.0]}, TypeError, "relevance must be a torch.Tensor, got list"),
    ({"relevance": X.long()}, TypeError, "relevance must be float64, .* got torch.int64"),
    ({"relevance": X.to_sparse()}, TypeError, "relevance must be a strided tensor, got layout torch.sparse_coo"),
    ({"relevance": X[0]}, ValueError, r"relevance must be \(B,C,...\), got 1 dimensions: \(5,\)"),
    ({"first": None}, TypeError, "first must be a torch.Tensor, got NoneType"),
    ({"first": X[:, :4]}, ValueError, r"first must be \(2, 5\) like the relevance, got \(2, 4\)"),
    ({"second": None}, TypeError, "second must be a torch.Tensor, got NoneType"),
    ({"second": X[:1]}, ValueError, r"second must be \(2, 5\) like the relevance, got \(1, 5\)"),
    ({"second": X.double()}, TypeError, "second must be torch.float32 like the relevance, got torch.float64"),
    ({"second": X.to("meta")}, ValueError, "second is on meta, relevance on cpu"),
    ({"factor": X.half()}, TypeError, "factor must be torch.float32 like the relevance, got torch.float16"),
    ({"factor": X[..., None]}, ValueError, r"factor must be \(2, 5\) like the relevance, got \(2, 5, 1\)"),
    ({"epsilon": -1e-6}, ValueError, "epsilon must not be negative, got -1e-06"),
    ({"epsilon": math.inf}, ValueError, "epsilon must be a finite float, got inf"),
    ({"epsilon": math.nan}, ValueError, "epsilon must be a finite float, got nan"),
    ({"epsilon": "0"}, TypeError, "epsilon must be a finite float, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="relevance_add: " + message):
        ops.relevance_add(**{"relevance": X, "first": X, "second": X, "factor": X, **change})


@pytest.mark.parametrize("change", range(4))
def test_bare_op_reads_nothing_out_of_bounds(change):
    arguments = [torch.zeros(2, 300) for _ in range(4)]
    for wrong in (torch.zeros(2, 299), torch.zeros(3, 300), torch.zeros(300), torch.zeros(2, 300).long()):
        with pytest.raises((ValueError, TypeError)):
            OP(*(wrong if i == change else x for i, x in enumerate(arguments)))


def test_inputs_that_require_grad_are_refused(backend):
    for call in (ops.relevance_add, OP):
        assert_refuses_grad(call, "relevance_add", {"relevance": X, "first": X, "second": X, "factor": X})


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    r, a, b, f = (make((2, 5, 4, 6), dtype, seed, layout) for seed in range(4))
    torch.library.opcheck(OP, (r, a, b))
    torch.library.opcheck(OP, (r, a, b, f, 0.0))
    torch.library.opcheck(OP, (X[:0], X[:0], X[:0]))


def test_compiled_graph_has_the_values_of_eager():
    compiled = torch.compile(ops.relevance_add, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        tensors = [make((b, 5, 4), torch.float32, seed) for seed in range(4)]
        for ours, expected in zip(compiled(*tensors), ops.relevance_add(*tensors), strict=True):
            assert torch.equal(ours, expected)
