"""`rescale_multipliers` against a float64 oracle: the rule for one element, in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import leaky_relu

from fastcam import ops
from fastcam._testing.ops import DTYPES, LAYOUTS, OPCHECKED, make, to_float64

SLOPES = (0.0, 0.01, 1.0, -0.5)
OP = torch.ops.fastcam.rescale_multipliers.default


def f(x: float, slope: float) -> float:
    return x if x > 0 else slope * x


def factor(u: float, r: float, slope: float) -> float:
    """s of one element; NaN and infinity as IEEE arithmetic has them."""
    if u > 0 and r > 0:
        return 1.0
    if u <= 0 and r <= 0:
        return slope
    return (f(u, slope) - f(r, slope)) / (u - r)


def oracle(multipliers, inputs, reference, slope) -> np.ndarray:
    g, u = to_float64(multipliers), to_float64(inputs)
    r = np.broadcast_to(to_float64(reference), u.shape)
    result = np.empty(u.shape)
    for index in np.ndindex(u.shape):
        result[index] = g[index] * factor(float(u[index]), float(r[index]), slope)
    return result


def check(multipliers, inputs, reference, slope=0.0) -> None:
    """4 eps of the accumulation dtype for each factor, and one rounding to the result's dtype."""
    result = ops.rescale_multipliers(multipliers, inputs, reference, slope)
    assert result.dtype == multipliers.dtype
    assert result.shape == inputs.shape
    assert result.stride() == torch.empty_like(multipliers).stride()
    assert all(result.data_ptr() != x.data_ptr() or not x.numel() for x in (multipliers, inputs, reference))
    expected = oracle(multipliers, inputs, reference, slope)
    acc, out = torch.promote_types(inputs.dtype, torch.float32), torch.finfo(result.dtype)
    limit = 4 * torch.finfo(acc).eps * np.abs(to_float64(multipliers)) * max(1.0, abs(slope))
    if result.dtype != acc:
        limit = limit + 0.5 * out.eps * np.maximum(np.abs(expected), out.smallest_normal)
    error = np.abs(to_float64(result) - expected)
    assert (error <= limit).all(), f"error {error.max():.3g}, {(error > limit).sum()} of {error.size} beyond the limit"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_layouts_and_dtypes(backend, batch, layout, dtype):
    shape = (2, 17, 5, 7)
    inputs, reference = make(shape, dtype, 1, layout), make((batch, *shape[1:]), dtype, 2, layout)
    check(make(shape, dtype, 3, layout), inputs, reference, 0.01)
    check(make(shape, torch.promote_types(dtype, torch.float32), 3), inputs, reference)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "batch last"])
def test_large_and_shared_reference(backend, layout):
    """Several threads, runs that end inside a thread's range, images inside one another. Oracle: torch's functions."""
    order = {"contiguous": (0, 1, 2, 3, 4), "channels_last_3d": (0, 2, 3, 4, 1), "batch last": (1, 2, 3, 4, 0)}[layout]
    back = sorted(range(5), key=order.__getitem__)
    shape = (9, 7, 11, 13, 17)
    g, u, r = (
        make((b, *shape[1:]), torch.float32, seed).permute(order).contiguous().permute(back)
        for seed, b in ((1, 9), (2, 9), (3, 1))
    )
    result = ops.rescale_multipliers(g, u, r, 0.1)
    assert result.stride() == g.stride()
    u64, r64 = u.double(), r.double()
    same = (u > 0) == (r > 0)
    secant = (leaky_relu(u64, 0.1) - leaky_relu(r64, 0.1)) / torch.where(same, 1, u64 - r64)
    expected = g.double() * torch.where(same, torch.where(u > 0, 1.0, 0.1).double(), secant)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(result, ops.rescale_multipliers(g, u, r.expand(shape), 0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slope", [1.0, 0.5, 1 / 3, -3.0])
def test_every_half_value_is_rounded_as_torch_rounds(backend, slope, dtype):
    """All 65536 multipliers, subnormal, infinite and NaN ones too, by one factor, in the dtype and in float32."""
    g = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    u = torch.full_like(g, -1)
    expected = g.float() * slope
    result = ops.rescale_multipliers(g, u, u, slope)
    torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        ops.rescale_multipliers(g.float(), u, u, slope), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("slope", SLOPES)
def test_inputs_and_reference_may_trade_places(backend, slope):
    g, u, r = (make((3, 300), torch.float32, seed) for seed in range(3))
    assert torch.equal(ops.rescale_multipliers(g, u, r, slope), ops.rescale_multipliers(g, r, u, slope))


@pytest.mark.parametrize("slope", SLOPES)
def test_contributions_sum_to_the_difference_of_the_outputs(backend, slope):
    """Completeness, which the rule is made for: s (u - r) = f(u) - f(r) in every element."""
    u, r = (make((3, 300), torch.float64, seed) for seed in range(2))
    s = ops.rescale_multipliers(torch.ones_like(u), u, r, slope)
    torch.testing.assert_close(s * (u - r), leaky_relu(u, slope) - leaky_relu(r, slope), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("slope", SLOPES)
def test_equal_inputs_give_the_gradient_of_leaky_relu(backend, slope):
    g, u = make((3, 40), torch.float32, 1), make((3, 40), torch.float32, 2)
    u[:, ::5] = 0
    u.requires_grad_()
    (expected,) = torch.autograd.grad(leaky_relu(u, slope), u, g)
    assert torch.equal(ops.rescale_multipliers(g, u.detach(), u.detach(), slope), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_nan_and_infinity(backend, slope, dtype):
    odd = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0]
    values = torch.tensor(odd, dtype=dtype)
    inputs, reference = torch.broadcast_tensors(values[:, None], values[None])
    result = ops.rescale_multipliers(torch.ones_like(inputs), inputs, reference, slope)
    expected = torch.tensor([[factor(u, r, slope) for r in odd] for u in odd])
    assert result[0].isnan().all()
    assert result[:, 0].isnan().all()
    torch.testing.assert_close(result.double(), expected.double(), equal_nan=True, rtol=1e-2, atol=0)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0, 3), (0, 3, 4, 4), (2, 3, 0, 4, 4)])
def test_empty(backend, shape):
    x = torch.zeros(shape)
    for batch in (1, shape[0]):
        assert ops.rescale_multipliers(x, x, torch.zeros(batch, *shape[1:])).shape == shape


X = torch.zeros(2, 5)
ERRORS = [
    ({"inputs": X.long()}, TypeError, "inputs must be float64, .* got torch.int64"),
    ({"inputs": [0.0]}, TypeError, "inputs must be a torch.Tensor, got list"),
    ({"inputs": torch.zeros(())}, ValueError, r"inputs must be \(B,...\), got 0 dimensions"),
    ({"multipliers": X[:, :4]}, ValueError, r"multipliers must be \(2, 5\) like the inputs, got \(2, 4\)"),
    ({"multipliers": X.double()}, TypeError, "multipliers must be torch.float32 like the inputs, got torch.float64"),
    ({"multipliers": X.to("meta")}, ValueError, "multipliers is on meta, inputs on cpu"),
    ({"reference": None}, TypeError, "reference must be a torch.Tensor, got NoneType"),
    ({"reference": X.half()}, TypeError, "reference must be torch.float32 like the inputs, got torch.float16"),
    ({"reference": X[:, :1]}, ValueError, r"reference must be \(2, 5\) like the inputs or have batch 1, got \(2, 1\)"),
    ({"reference": X[0]}, ValueError, r"reference must be .* got \(5,\)"),
    ({"negative_slope": math.inf}, ValueError, "negative_slope must be a finite float, got inf"),
    ({"negative_slope": math.nan}, ValueError, "negative_slope must be a finite float, got nan"),
    ({"negative_slope": "0"}, TypeError, "negative_slope must be a finite float, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match=message):
        ops.rescale_multipliers(**{"multipliers": X, "inputs": X, "reference": X, **change})


@pytest.mark.parametrize("change", [0, 1, 2])
def test_bare_op_reads_nothing_out_of_bounds(change):
    arguments = [torch.zeros(2, 300) for _ in range(3)]
    for wrong in (torch.zeros(2, 299), torch.zeros(3, 300), torch.zeros(300), torch.zeros(2, 300).long()):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            OP(*(wrong if i == change else x for i, x in enumerate(arguments)))


def test_same_bits_on_every_run_thread_count_and_batch(backend):
    if backend == "reference":
        pytest.skip("PyTorch's own kernels make no such promise")
    g, u, r = make((4, 70001), torch.float32, 1), make((4, 70001), torch.float32, 2), make((1, 70001), torch.float32, 3)
    threads = torch.get_num_threads()
    first = ops.rescale_multipliers(g, u, r, 0.1)
    assert all(torch.equal(first, ops.rescale_multipliers(g, u, r, 0.1)) for _ in range(50))
    assert torch.equal(first[1:2], ops.rescale_multipliers(g[1:2], u[1:2], r, 0.1))
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, ops.rescale_multipliers(g, u, r, 0.1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_more_elements_than_int32(backend):
    """8 GiB of half values; the last elements lie beyond 2^31."""
    if backend == "reference":
        pytest.skip("would need three times the memory")
    g = torch.ones(2**31 + 8, dtype=torch.float16)
    g[-1] = -1
    result = OP(g, g, g, 0.5)
    assert result[-8:].tolist() == [1.0] * 7 + [-0.5]
    assert result[:-8].eq(1).all()


@pytest.mark.parametrize("slope", [0.0, 0.1, -0.5])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradcheck(backend, batch, slope):
    """Away from the kinks at 0, where the cases change."""
    tensors = [make(shape, torch.float64, 20 + i) for i, shape in enumerate([(3, 8), (3, 8), (batch, 8)])]
    tensors = [(x + 0.3 * x.sign()).requires_grad_() for x in tensors]
    assert gradcheck(lambda *x: ops.rescale_multipliers(*x, slope), tensors)
    assert gradgradcheck(lambda *x: ops.rescale_multipliers(*x, slope), tensors)


def test_gradient_at_equal_inputs_is_zero_for_them_and_nan_for_nan():
    u = torch.tensor([0.0, 1.0, -1.0, math.nan], requires_grad=True)
    g = torch.ones(4, requires_grad=True)
    ops.rescale_multipliers(g, u, u.detach(), 0.1).sum().backward()
    torch.testing.assert_close(u.grad, torch.tensor([0.0, 0.0, 0.0, math.nan]), equal_nan=True)
    torch.testing.assert_close(g.grad, torch.tensor([0.1, 1.0, 0.1, math.nan]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_their_tensors_dtype_and_shape(backend, dtype):
    tensors = [make(s, d, 1).requires_grad_() for s, d in (((3, 8), torch.float32), ((3, 8), dtype), ((1, 8), dtype))]
    grads = torch.autograd.grad(ops.rescale_multipliers(*tensors).sum(), tensors)
    assert [(x.dtype, x.shape) for x in grads] == [(x.dtype, x.shape) for x in tensors]


def test_bare_op_refuses_to_lose_gradients():
    with pytest.raises(RuntimeError, match=r"not differentiable; call fastcam.ops.rescale_multipliers"):
        OP(X, X.clone().requires_grad_(), X)


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    for batch in (1, 2):
        inputs, reference = make((2, 5, 4, 6), dtype, 15, layout), make((batch, 5, 4, 6), dtype, 16)
        torch.library.opcheck(OP, (make((2, 5, 4, 6), torch.float32, 17, layout), inputs, reference, 0.1))
    torch.library.opcheck(OP, (X[:0], X[:0], X[:1]))


def test_compiled_graph_has_values_and_gradients_of_eager():
    def loss(g, u, r):
        return ops.rescale_multipliers(g, u, r, 0.1).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        eager_in = [make((n, 5, 4), torch.float64, 17 + i).requires_grad_() for i, n in enumerate((b, b, 1))]
        graph_in = [x.detach().clone().requires_grad_() for x in eager_in]
        loss(*eager_in).backward()
        compiled(*graph_in).backward()
        for ours, expected in zip(graph_in, eager_in, strict=True):
            torch.testing.assert_close(ours.grad, expected.grad)
