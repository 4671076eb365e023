"""`relevance_divide` against a float64 oracle: the quotient of one element, in plain Python."""

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

OP = torch.ops.fastcam.relevance_divide.default


def check(relevance, divisor, factor=None, epsilon=1e-6) -> None:
    result = ops.relevance_divide(relevance, divisor, factor, epsilon)
    assert_fresh(result, relevance, divisor, factor)
    (expected,) = elementwise(lambda r, d, f: quotient(r * f, d, epsilon), relevance, divisor, factor)
    assert_elementwise(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(backend, layout, dtype):
    shape = (2, 17, 5, 7)
    relevance, divisor = make(shape, dtype, 1, layout), with_zeros(make(shape, dtype, 2, layout), 3)
    check(relevance, divisor)
    check(relevance, make(shape, dtype, 4), make(shape, dtype, 5, layout), 0.0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.5])
def test_product_with_the_divisor_gives_the_relevance_back(backend, epsilon):
    r, d = make((3, 40), torch.float64, 1), make((3, 40), torch.float64, 2)
    moved = d + epsilon * d.sign()
    torch.testing.assert_close(ops.relevance_divide(r, d, None, epsilon) * moved, r, rtol=1e-14, atol=0)


def test_factor_is_the_product_of_both(backend):
    r, d, f = (make((3, 40), torch.float64, seed) for seed in range(3))
    assert torch.equal(ops.relevance_divide(r, d, f), ops.relevance_divide(r * f, d))


def test_zero_counts_as_positive_and_is_guarded_without_epsilon(backend):
    r, d = torch.tensor([[1.0, -1.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, -0.0, 0.0]])
    assert ops.relevance_divide(r, d, None, 0.5).tolist() == [[2.0, -2.0, 2.0, 0.0]]
    assert ops.relevance_divide(r, d, None, 0.0).tolist() == [[0.0, 0.0, 0.0, 0.0]]
    tiny = torch.full((1, 4), 1e-40)  # subnormal, but not zero
    torch.testing.assert_close(ops.relevance_divide(tiny, 2 * tiny, None, 0.0), torch.full((1, 4), 0.5))


def test_epsilon_is_not_rounded_to_float32_for_float64(backend):
    one = torch.ones(1, 1, dtype=torch.float64)
    assert ops.relevance_divide(one, 0 * one, None, 1e-6).item() == 1 / 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_nan_and_infinity(backend, epsilon, dtype):
    check(*every_combination(2, dtype), None, epsilon)
    check(*every_combination(3, dtype), epsilon)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_several_threads(backend, layout):
    """More elements than a thread takes alone. Oracle: torch's float64."""
    r, d, f = (make((3, 20, 51, 67), torch.float32, seed, layout) for seed in range(3))
    moved = torch.where(d < 0, d.double() - 1e-3, d.double() + 1e-3)
    assert_elementwise(ops.relevance_divide(r, d, f, 1e-3), (r.double() * f.double() / moved).numpy())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(backend, shape):
    x = torch.zeros(shape)
    assert ops.relevance_divide(x, x, x).shape == shape


def test_batch_is_its_images(backend):
    r, d = make((4, 7, 9, 11), torch.float32, 1, "channels_last"), make((4, 7, 9, 11), torch.float32, 2)
    images = [ops.relevance_divide(r[b : b + 1], d[b : b + 1]) for b in range(4)]
    assert torch.equal(ops.relevance_divide(r, d), torch.cat(images))


def test_same_bits_on_every_run_and_thread_count(backend):
    r, d = make((3, 70001), torch.float32, 1), make((3, 70001), torch.float32, 2)
    assert_repeatable(lambda: ops.relevance_divide(r, d))


@pytest.mark.slow
def test_more_elements_than_int32(backend):
    """4 GiB of half values; the last elements lie beyond 2^31."""
    if backend == "reference":
        pytest.skip("would need four times the memory")
    x = torch.ones((2, 2**30 + 8), dtype=torch.float16)
    x[-1, -1] = -3
    result = OP(x, x, x, 0.0)
    assert result[-1, -8:].tolist() == [1.0] * 7 + [-3.0]
    assert result.flatten()[:-1].eq(1).all()


X = torch.zeros(2, 5)
ERRORS = [
    ({"relevance": [0.0]}, TypeError, "relevance must be a torch.Tensor, got list"),
    ({"relevance": X.long()}, TypeError, "relevance must be float64, .* got torch.int64"),
    ({"relevance": X.to_sparse()}, TypeError, "relevance must be a strided tensor, got layout torch.sparse_coo"),
    ({"relevance": X[0]}, ValueError, r"relevance must be \(B,C,...\), got 1 dimensions: \(5,\)"),
    ({"divisor": None}, TypeError, "divisor must be a torch.Tensor, got NoneType"),
    ({"divisor": X[:, :4]}, ValueError, r"divisor must be \(2, 5\) like the relevance, got \(2, 4\)"),
    ({"divisor": X[:1]}, ValueError, r"divisor must be \(2, 5\) like the relevance, got \(1, 5\)"),
    ({"divisor": X.double()}, TypeError, "divisor must be torch.float32 like the relevance, got torch.float64"),
    ({"divisor": X.to("meta")}, ValueError, "divisor is on meta, relevance on cpu"),
    ({"factor": X.half()}, TypeError, "factor must be torch.float32 like the relevance, got torch.float16"),
    ({"factor": X[..., None]}, ValueError, r"factor must be \(2, 5\) like the relevance, got \(2, 5, 1\)"),
    ({"factor": 1.0}, TypeError, "factor must be a torch.Tensor, got float"),
    ({"epsilon": -1e-6}, ValueError, "epsilon must not be negative, got -1e-06"),
    ({"epsilon": math.inf}, ValueError, "epsilon must be a finite float, got inf"),
    ({"epsilon": math.nan}, ValueError, "epsilon must be a finite float, got nan"),
    ({"epsilon": "0"}, TypeError, "epsilon must be a finite float, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="relevance_divide: " + message):
        ops.relevance_divide(**{"relevance": X, "divisor": X, "factor": X, **change})


@pytest.mark.parametrize("change", [0, 1, 2])
def test_bare_op_reads_nothing_out_of_bounds(change):
    arguments = [torch.zeros(2, 300) for _ in range(3)]
    for wrong in (torch.zeros(2, 299), torch.zeros(3, 300), torch.zeros(300), torch.zeros(2, 300).long()):
        with pytest.raises((ValueError, TypeError)):
            OP(*(wrong if i == change else x for i, x in enumerate(arguments)))


def test_inputs_that_require_grad_are_refused(backend):
    for call in (ops.relevance_divide, OP):
        assert_refuses_grad(call, "relevance_divide", {"relevance": X, "divisor": X, "factor": X})


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    r, d, f = (make((2, 5, 4, 6), dtype, seed, layout) for seed in range(3))
    torch.library.opcheck(OP, (r, d))
    torch.library.opcheck(OP, (r, d, f, 0.0))
    torch.library.opcheck(OP, (X[:0], X[:0]))


def test_compiled_graph_has_the_values_of_eager():
    compiled = torch.compile(ops.relevance_divide, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        tensors = [make((b, 5, 4), torch.float32, seed) for seed in range(3)]
        assert torch.equal(compiled(*tensors), ops.relevance_divide(*tensors))
