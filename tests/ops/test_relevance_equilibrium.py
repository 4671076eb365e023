"""`relevance_equilibrium` against a float64 oracle: the three messages of one element, in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastcam
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

OP = torch.ops.fastcam.relevance_equilibrium.default


def check(relevance, budgets, divisors, ratio=2.0) -> None:
    result = ops.relevance_equilibrium(relevance, budgets, divisors, ratio)
    assert_fresh(result, divisors, relevance, budgets)
    b = len(relevance)
    p, q = (budgets[:, i].reshape(b, *(1,) * (relevance.dim() - 1)).expand(relevance.shape) for i in range(2))

    def messages(r, p, q, zc, za, zb):
        positive = quotient(0.0 if r <= 0 else r, p)
        negative = quotient(0.0 if r >= 0 else r, q)
        return quotient(ratio * positive + negative, zc), quotient(positive, za), quotient(negative, zb)

    assert_elementwise(result, np.concatenate(elementwise(messages, relevance, p, q, *divisors.split(b))))


def sums(relevance):
    """Budgets by torch's own sums, in the dtype they are asked for."""
    r = relevance.double().flatten(1)
    found = torch.stack([r.clamp(min=0).sum(1), (-r).clamp(min=0).sum(1)], 1)
    return found.to(torch.promote_types(relevance.dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(backend, layout, dtype):
    relevance = make((2, 17, 5, 7), dtype, 1, layout)
    divisors = with_zeros(make((6, 17, 5, 7), dtype, 2, layout).abs_(), 3)
    check(relevance, sums(relevance), divisors)
    check(make((2, 17, 5, 7), dtype, 4), sums(relevance), divisors, 0.0)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, 2.0])
def test_totals_are_the_budgets_in_equilibrium(backend, ratio):
    r = make((3, 40, 7), torch.float64, 1)
    ones = torch.ones(9, 40, 7, dtype=torch.float64)
    totals = ops.relevance_equilibrium(r, ops.relevance_budgets(r), ones, ratio).sum((1, 2)).reshape(3, 3)
    expected = torch.tensor([[ratio - 1], [1.0], [-1.0]], dtype=torch.float64).expand(3, 3)
    torch.testing.assert_close(totals, expected)


def test_messages_times_their_divisors_are_the_relevance(backend):
    r, z = make((2, 40), torch.float64, 1), make((6, 40), torch.float64, 2)
    budgets = ops.relevance_budgets(r)
    shared, active, inactive = (ops.relevance_equilibrium(r, budgets, z, 1.0) * z).split(2)
    torch.testing.assert_close(shared, active + inactive)
    p, q = budgets[:, :1], budgets[:, 1:]
    torch.testing.assert_close(active * p + inactive * q, r)


def test_zero_budgets_and_divisors_give_zero(backend):
    r = make((2, 40), torch.float32, 1)
    nothing = torch.zeros(2, 2)
    assert torch.equal(ops.relevance_equilibrium(r, nothing, torch.ones(6, 40)), torch.zeros(6, 40))
    assert torch.equal(ops.relevance_equilibrium(r, nothing + 1, torch.zeros(6, 40)), torch.zeros(6, 40))
    one_sided = ops.relevance_equilibrium(r.abs(), sums(r.abs()), torch.ones(6, 40))
    assert torch.equal(one_sided[4:], torch.zeros(2, 40))
    assert one_sided.isfinite().all()


def test_subnormal_budget_is_no_zero(backend):
    r = torch.full((1, 4), 1e-40)  # 1 / budget overflows
    r[0, 3] = 0
    result = ops.relevance_equilibrium(r, sums(r), torch.ones(3, 4), 1.0)
    third = torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3
    torch.testing.assert_close(result, torch.stack([third, third, torch.zeros(4)]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(backend, dtype):
    r, z = every_combination(2, dtype)
    acc = torch.promote_types(dtype, torch.float32)
    odd = every_combination(1, acc)[0]
    for budgets in (torch.cat([odd, odd.flip(0)], 1), torch.ones(len(r), 2, dtype=acc)):
        check(r, budgets, torch.cat([z, z.flip(0), z.roll(1, 0)]), 1.5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_several_threads(backend, layout):
    """Images that end inside a thread's range. Oracle: the reference in float64."""
    r = make((5, 20, 41, 47), torch.float32, 1, layout)
    z = with_zeros(make((15, 20, 41, 47), torch.float32, 2, layout), 3)
    budgets = sums(r)
    exact = fastcam.reference.relevance_equilibrium(r.double(), budgets.double(), z.double(), 1.5)
    assert_elementwise(ops.relevance_equilibrium(r, budgets, z, 1.5), exact.numpy())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(backend, shape):
    z = torch.zeros(3 * shape[0], *shape[1:])
    assert ops.relevance_equilibrium(torch.zeros(shape), torch.zeros(shape[0], 2), z).shape == z.shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_is_its_images(backend, layout):
    r, z = make((4, 7, 9, 11), torch.float32, 1, layout), make((12, 7, 9, 11), torch.float32, 2, layout)
    budgets = sums(r)
    images = [ops.relevance_equilibrium(r[b : b + 1], budgets[b : b + 1], z[b::4]) for b in range(4)]
    whole = ops.relevance_equilibrium(r, budgets, z)
    assert all(torch.equal(whole[b::4], images[b]) for b in range(4))


def test_same_bits_on_every_run_and_thread_count(backend):
    r, z = make((3, 70001), torch.float32, 1), make((9, 70001), torch.float32, 2)
    budgets = sums(r)
    assert_repeatable(lambda: ops.relevance_equilibrium(r, budgets, z))


X, BUDGETS, Z = torch.zeros(2, 5), torch.zeros(2, 2), torch.zeros(6, 5)
ERRORS = [
    ({"relevance": [0.0]}, TypeError, "relevance must be a torch.Tensor, got list"),
    ({"relevance": X.long()}, TypeError, "relevance must be float64, .* got torch.int64"),
    ({"relevance": X.to_sparse()}, TypeError, "relevance must be a strided tensor, got layout torch.sparse_coo"),
    ({"relevance": X[0]}, ValueError, r"relevance must be \(B,C,...\), got 1 dimensions: \(5,\)"),
    ({"budgets": None}, TypeError, "budgets must be a torch.Tensor, got NoneType"),
    ({"budgets": BUDGETS.double()}, TypeError, "budgets must be torch.float32 for torch.float32, got torch.float64"),
    ({"budgets": BUDGETS[:1]}, ValueError, r"budgets must be \(2, 2\), got \(1, 2\)"),
    ({"budgets": BUDGETS[0]}, ValueError, r"budgets must be \(2, 2\), got \(2,\)"),
    ({"budgets": BUDGETS.to("meta")}, ValueError, "budgets must be on cpu, got meta"),
    ({"divisors": None}, TypeError, "divisors must be a torch.Tensor, got NoneType"),
    ({"divisors": X}, ValueError, r"divisors must be \(6, 5\), three times the relevance, got \(2, 5\)"),
    ({"divisors": Z[:, :4]}, ValueError, r"divisors must be \(6, 5\), three times the relevance, got \(6, 4\)"),
    ({"divisors": Z.half()}, TypeError, "divisors must be torch.float32 like the relevance, got torch.float16"),
    ({"divisors": Z.to("meta")}, ValueError, "divisors is on meta, relevance on cpu"),
    ({"ratio": -1.0}, ValueError, "ratio must not be negative, got -1.0"),
    ({"ratio": math.inf}, ValueError, "ratio must be a finite float, got inf"),
    ({"ratio": math.nan}, ValueError, "ratio must be a finite float, got nan"),
    ({"ratio": "2"}, TypeError, "ratio must be a finite float, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="relevance_equilibrium: " + message):
        ops.relevance_equilibrium(**{"relevance": X, "budgets": BUDGETS, "divisors": Z, **change})


@pytest.mark.parametrize("change", range(3))
def test_bare_op_reads_nothing_out_of_bounds(change):
    arguments = [torch.zeros(2, 300), torch.zeros(2, 2), torch.zeros(6, 300)]
    for wrong in (torch.zeros(2, 299), torch.zeros(3, 300), torch.zeros(300), arguments[change].long()):
        with pytest.raises((ValueError, TypeError)):
            OP(*(wrong if i == change else x for i, x in enumerate(arguments)))


def test_inputs_that_require_grad_are_refused(backend):
    inputs = {"relevance": X, "budgets": BUDGETS, "divisors": Z}
    for call in (ops.relevance_equilibrium, OP):
        assert_refuses_grad(call, "relevance_equilibrium", inputs)


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    r, z = make((2, 5, 4, 6), dtype, 1, layout), make((6, 5, 4, 6), dtype, 2, layout)
    torch.library.opcheck(OP, (r, sums(r), z, 1.5))
    torch.library.opcheck(OP, (r, sums(r), z.contiguous()))
    torch.library.opcheck(OP, (X[:0], BUDGETS[:0], Z[:0]))


def test_compiled_graph_has_the_values_of_eager():
    compiled = torch.compile(ops.relevance_equilibrium, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        r, z = make((b, 5, 4), torch.float32, 1), make((3 * b, 5, 4), torch.float32, 2)
        assert torch.equal(compiled(r, sums(r), z), ops.relevance_equilibrium(r, sums(r), z))
