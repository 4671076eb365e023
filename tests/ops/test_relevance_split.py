"""`relevance_split` against a float64 oracle: each rule for one element, in plain Python."""

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
    assert_refuses_grad,
    assert_repeatable,
    elementwise,
    every_combination,
    quotient,
    with_zeros,
)

RULES = ("alpha_beta", "gamma", "rap")
OP = torch.ops.fastcam.relevance_split.default


def messages(rule, r, z, p, first, second, epsilon, eps) -> tuple[float, float]:
    n = z - p
    if n >= -8 * eps * p:
        n = 0.0
    if rule == "alpha_beta":
        return first * quotient(r, p, epsilon), 0.0 if n == 0 else -second * quotient(r, n, epsilon)
    if rule == "gamma":
        u = quotient(0.0 if z <= 0 else r, z + first * p, epsilon)
        return u, 0.0 if z >= 0 else quotient(r, z + first * n, epsilon)
    above, below = 0.0 if r <= 0 else r, 0.0 if r >= 0 else r
    return quotient(above, p), quotient(below, -n) + quotient(r, p - n)


def last_is_channels(x: torch.Tensor) -> bool:
    """channels_last and not contiguous as well."""
    order = (0, *range(2, x.dim()), 1)
    return x.dim() in (4, 5) and not x.is_contiguous() and x.permute(order).is_contiguous()


def check(relevance, output, positive, factor=None, *, rule, first=2.0, second=1.0, epsilon=1e-6) -> None:
    numbers = {"first": first, "second": second, "epsilon": epsilon}
    result = ops.relevance_split(relevance, output, positive, factor, rule=rule, **numbers)
    b, c, *rest = relevance.shape
    assert result.dtype == relevance.dtype
    assert result.shape == (b, 2 * c, *rest)
    if last_is_channels(relevance):
        assert last_is_channels(result)
    else:
        assert result.is_contiguous()
    tensors = [x for x in (relevance, output, positive, factor) if x is not None]
    assert result.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in tensors}
    eps = torch.finfo(relevance.dtype).eps

    def formula(r, z, p, f):
        return messages(rule, r * f, z, p, first, second, epsilon, eps)

    assert_elementwise(result, np.concatenate(elementwise(formula, relevance, output, positive, factor), axis=1))


def layer(shape, dtype, seed, layout="contiguous"):
    """Outputs and their positive parts: with zeros in both parts, and with negative parts that are rounding alone."""
    acc = torch.promote_types(dtype, torch.float32)
    p, n = (with_zeros(make(shape, acc, seed + i).abs(), seed + 2 + i) for i in range(2))
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.1
    n[noise] *= torch.finfo(dtype).eps
    p = p.to(dtype)
    return LAYOUTS[layout]((p.to(acc) - n).to(dtype)), LAYOUTS[layout](p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_layouts_and_dtypes(backend, rule, layout, dtype):
    shape = (2, 17, 5, 7)
    relevance = make(shape, dtype, 1, layout)
    check(relevance, *layer(shape, dtype, 2, layout), rule=rule)
    factor = make(shape, dtype, 3, layout)
    check(make(shape, dtype, 4), *layer(shape, dtype, 5, layout), factor, rule=rule, first=0.25, epsilon=0.0)


def both_signs(seed):
    """Relevance, outputs, positive parts p > 0 and negative parts n < 0."""
    r, p, n = (make((3, 40), torch.float64, seed + i) for i in range(3))
    p, n = p.abs() + 0.1, -n.abs() - 0.1
    return r, p + n, p, n


def test_alpha_beta_hands_on_alpha_less_beta_times_the_relevance(backend):
    r, z, p, n = both_signs(1)
    for alpha, beta in ((2.0, 1.0), (1.0, 0.0), (3.5, 2.5), (2.0, 0.5)):
        u, v = ops.relevance_split(r, z, p, rule="alpha_beta", first=alpha, second=beta, epsilon=0.0).chunk(2, 1)
        torch.testing.assert_close(u * p + v * n, (alpha - beta) * r, rtol=1e-12, atol=1e-12)


def test_gamma_hands_on_the_relevance(backend):
    r, z, p, n = both_signs(2)
    for gamma in (0.0, 0.25, 100.0):
        u, v = ops.relevance_split(r, z, p, rule="gamma", first=gamma, epsilon=0.0).chunk(2, 1)
        # Where z > 0 positive contributions count 1 + gamma times and negative ones once; elsewhere it is the reverse.
        received = u * ((1 + gamma) * p + n) + v * (p + (1 + gamma) * n)
        torch.testing.assert_close(received, r, rtol=1e-11, atol=1e-11)


def test_rap_hands_on_the_relevance(backend):
    r, z, p, n = both_signs(3)
    u, v = ops.relevance_split(r, z, p, rule="rap").chunk(2, 1)
    assert (u >= 0).all()
    torch.testing.assert_close(u * p, r.clamp(min=0))
    torch.testing.assert_close(v - r / (p - n), r.clamp(max=0) / -n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_rounding_is_no_negative_part(backend, rule, dtype):
    """8 eps of p still count as 0, the next number below does not."""
    eps = torch.finfo(dtype).eps
    p = torch.ones(1, 2, dtype=dtype)
    z = torch.tensor([[1 - 8 * eps, 1 - 8.5 * eps]], dtype=dtype)
    relevance = -p
    v = ops.relevance_split(relevance, z, p, rule=rule).chunk(2, 1)[1]
    if rule == "rap":
        assert v[0, 0] == -1
        assert v[0, 1] < -1 / (16 * eps)
    elif rule == "gamma":
        assert v.tolist() == [[0.0, 0.0]]  # z > 0
    else:
        assert v[0, 0] == 0
        assert v[0, 1] < 0
    check(relevance, z, p, rule=rule)


@pytest.mark.parametrize("rule", RULES)
def test_zero_denominators(backend, rule):
    one, zero = torch.ones(1, 3), torch.zeros(1, 3)
    result = ops.relevance_split(one, zero, zero, rule=rule, epsilon=0.0)
    assert torch.equal(result, torch.zeros(1, 6))
    if rule == "alpha_beta":  # stabilised, zero counts as positive
        assert ops.relevance_split(one, zero, zero, rule=rule, epsilon=0.5).tolist() == [[4.0] * 3 + [0.0] * 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_nan_and_infinity(backend, epsilon, rule, dtype):
    check(*every_combination(3, dtype), rule=rule, epsilon=epsilon)
    check(*every_combination(4, dtype), rule=rule, first=0.0, epsilon=epsilon)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("rule", RULES)
def test_several_threads(backend, rule, layout):
    """More elements than a thread takes alone, pixels that end inside its range. Oracle: the reference in float64."""
    shape = (3, 23, 51, 67)
    z, p = layer(shape, torch.float32, 1, layout)
    n = p.double() - z.double()
    p[(n > 0) & (n < 1e-5 * p)] = 0  # what float64 would not take for rounding
    z = torch.where(p == 0, -z.abs(), z)
    r, f = make(shape, torch.float32, 5, layout), make(shape, torch.float32, 6, layout)
    exact = fastcam.reference.relevance_split(*(x.double() for x in (r, z, p, f)), rule=rule)
    assert_elementwise(ops.relevance_split(r, z, p, f, rule=rule), exact.numpy())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("rule", RULES)
def test_empty(backend, rule, shape):
    x = torch.zeros(shape)
    assert ops.relevance_split(x, x, x, x, rule=rule).shape == (shape[0], 2 * shape[1], *shape[2:])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_is_its_images(backend, layout):
    shape = (4, 7, 9, 11)
    r, (z, p) = make(shape, torch.float32, 1, layout), layer(shape, torch.float32, 2)
    images = [ops.relevance_split(*(x[b : b + 1] for x in (r, z, p)), rule="rap") for b in range(4)]
    assert torch.equal(ops.relevance_split(r, z, p, rule="rap"), torch.cat(images))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_on_every_run_and_thread_count(backend, rule, layout):
    shape = (2, 23, 61, 67)
    r, (z, p) = make(shape, torch.float32, 1, layout), layer(shape, torch.float32, 2, layout)
    assert_repeatable(lambda: ops.relevance_split(r, z, p, rule=rule))


X = torch.zeros(2, 5)
ERRORS = [
    ({"relevance": [0.0]}, TypeError, "relevance must be a torch.Tensor, got list"),
    ({"relevance": X.long()}, TypeError, "relevance must be float64, .* got torch.int64"),
    ({"relevance": X.to_sparse()}, TypeError, "relevance must be a strided tensor, got layout torch.sparse_coo"),
    ({"relevance": X[0]}, ValueError, r"relevance must be \(B,C,...\), got 1 dimensions: \(5,\)"),
    ({"output": None}, TypeError, "output must be a torch.Tensor, got NoneType"),
    ({"output": X[:, :4]}, ValueError, r"output must be \(2, 5\) like the relevance, got \(2, 4\)"),
    ({"positive": None}, TypeError, "positive must be a torch.Tensor, got NoneType"),
    ({"positive": X[:1]}, ValueError, r"positive must be \(2, 5\) like the relevance, got \(1, 5\)"),
    ({"positive": X.double()}, TypeError, "positive must be torch.float32 like the relevance, got torch.float64"),
    ({"positive": X.to("meta")}, ValueError, "positive is on meta, relevance on cpu"),
    ({"factor": X.half()}, TypeError, "factor must be torch.float32 like the relevance, got torch.float16"),
    ({"factor": X[..., None]}, ValueError, r"factor must be \(2, 5\) like the relevance, got \(2, 5, 1\)"),
    (
        {"rule": "alphabeta"},
        ValueError,
        "unknown rule 'alphabeta', expected one of alpha_beta, gamma, rap; did you mean 'alpha_beta'?",
    ),
    ({"rule": None}, ValueError, "unknown rule None, expected one of alpha_beta, gamma, rap"),
    ({"first": -2.0}, ValueError, "first must not be negative, got -2.0"),
    ({"first": math.inf}, ValueError, "first must be a finite float, got inf"),
    ({"second": -1.0}, ValueError, "second must not be negative, got -1.0"),
    ({"second": "1"}, TypeError, "second must be a finite float, got str"),
    ({"epsilon": -1e-6}, ValueError, "epsilon must not be negative, got -1e-06"),
    ({"epsilon": math.nan}, ValueError, "epsilon must be a finite float, got nan"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    given = {"relevance": X, "output": X, "positive": X, "factor": X, "rule": "gamma", **change}
    with pytest.raises(error, match="relevance_split: " + message):
        ops.relevance_split(**given)


@pytest.mark.parametrize("change", range(4))
def test_bare_op_reads_nothing_out_of_bounds(change):
    arguments = [torch.zeros(2, 300) for _ in range(4)]
    for wrong in (torch.zeros(2, 299), torch.zeros(3, 300), torch.zeros(300), torch.zeros(2, 300).long()):
        with pytest.raises((ValueError, TypeError)):
            OP(*(wrong if i == change else x for i, x in enumerate(arguments)), rule="rap")
    with pytest.raises(ValueError, match="unknown rule"):
        OP(*arguments, rule="lrp")


def test_inputs_that_require_grad_are_refused(backend):
    inputs = {"relevance": X, "output": X, "positive": X, "factor": X, "rule": "gamma"}
    for call in (ops.relevance_split, OP):
        assert_refuses_grad(call, "relevance_split", inputs)


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    shape = (2, 5, 4, 6)
    r, f, (z, p) = make(shape, dtype, 1, layout), make(shape, dtype, 2, layout), layer(shape, dtype, 3, layout)
    torch.library.opcheck(OP, (r, z, p), {"rule": "gamma", "first": 0.25})
    torch.library.opcheck(OP, (r, z, p, f), {"rule": "alpha_beta", "epsilon": 0.0})
    torch.library.opcheck(OP, (X[:0], X[:0], X[:0]), {"rule": "rap"})


def test_five_dimensions(backend):
    shape = (2, 3, 4, 5, 6)
    z, p = layer(shape, torch.float32, 1)
    r = make(shape, torch.float32, 2).to(memory_format=torch.channels_last_3d)
    check(r, z, p, rule="rap")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_graph_has_the_values_of_eager(layout):
    def split(*tensors):
        return ops.relevance_split(*tensors, rule="rap")

    compiled = torch.compile(split, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        shape = (b, 5, 4, 6)
        r, (z, p) = make(shape, torch.float32, 1, layout), layer(shape, torch.float32, 2, layout)
        found, expected = compiled(r, z, p), split(r, z, p)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
