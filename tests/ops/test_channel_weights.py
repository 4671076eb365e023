"""`channel_weights` against a float64 oracle: the formulas, written out in numpy with explicit loops over channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from fastcam import ops
from fastcam._testing.kernel_cases import check_channel_weights
from fastcam._testing.ops import DTYPES, LAYOUTS, make, to_float64

MODES = ("mean", "sum", "xgrad", "grad_cam_pp")
OP = torch.ops.fastcam.channel_weights.default


def channel(g: np.ndarray, a: np.ndarray, mode: str) -> tuple[float, float]:
    """One coefficient, and how far it moves when every rounded quantity moves by one unit of relative error."""
    total, magnitude = a.sum(), np.abs(a).sum()
    if mode == "mean":
        return g.mean(), np.abs(g).mean()
    if mode == "sum":
        return (g * a).sum(), np.abs(g * a).sum()
    if mode == "xgrad":
        if abs(total) <= 1e-6 * magnitude:
            return 0.0, 0.0
        value = (g * a).sum() / total
        return value, (np.abs(g * a).sum() + abs(value) * magnitude) / abs(total) + abs(value)
    denominator = 2 + total * g
    inverse = np.where(np.abs(denominator) < 1e-6, 0, 1 / np.where(denominator == 0, 1, denominator))
    positive = np.maximum(g, 0)
    moves = positive * (np.abs(inverse) + inverse**2 * (2 + (magnitude + abs(total)) * np.abs(g)))
    return (inverse * positive).sum(), moves.sum()


def oracle(features, multipliers, reference, mode) -> tuple[np.ndarray, np.ndarray]:
    """(values, sensitivities), with a target dimension."""
    a = to_float64(features) - (0 if reference is None else to_float64(reference))
    a = np.broadcast_to(a, features.shape)
    g = to_float64(multipliers)
    g = g[:, None] if g.ndim == 4 else g
    both = np.zeros((2, *g.shape[:3]))
    for b, t, k in np.ndindex(g.shape[:3]):
        both[:, b, t, k] = channel(g[b, t, k], a[b, k], mode)
    return both[0], both[1]


def check(features, multipliers, reference=None) -> None:
    """All modes against the oracle; the limit is the house rate for a sum, per unit of sensitivity."""
    acc = torch.float64 if features.dtype == torch.float64 else torch.float32
    z = features.shape[2] * features.shape[3]
    for mode in MODES:
        result = ops.channel_weights(features, multipliers, reference, mode)
        assert result.dtype == acc
        assert result.is_contiguous()
        assert result.shape == multipliers.shape[:-2]
        expected, sensitivity = oracle(features, multipliers, reference, mode)
        rate = {torch.float64: 1e-12, torch.float32: 1e-6}[acc] * max(1.0, z / 64) ** 0.5
        error = np.abs(to_float64(result).reshape(expected.shape) - expected)
        worst = (error / np.maximum(sensitivity, 1e-300)).max(initial=0)
        assert (error <= rate * sensitivity).all(), (
            f"{mode}: error {worst:.3g} per unit of sensitivity, limit {rate:.3g}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", [(), (3,)], ids=["KHW", "TKHW"])
def test_layouts_and_dtypes(backend, targets, layout, dtype):
    b, k, h, w = 2, 19, 5, 7
    features = make((b, k, h, w), dtype, 1, layout, offset=0.5)
    multipliers = make((b, *targets, k, h, w), dtype, 2, layout)
    check(features, multipliers)
    check(features, multipliers, make((1, k, h, w), dtype, 3, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("k", "h", "w"), [(1, 7, 7), (3, 1, 1), (63, 7, 7), (130, 13, 17), (513, 2, 2), (2, 224, 224)])
def test_sizes(backend, k, h, w, layout):
    features = make((2, k, h, w), torch.float32, 4, layout, offset=0.5)
    check(features, make((2, k, h, w), torch.float32, 5, layout), features.flip(0))


@pytest.mark.parametrize("mode", MODES)
def test_closed_form_of_constant_multipliers(backend, mode):
    features, reference = make((2, 5, 4, 3), torch.float64, 6, offset=0.5), make((1, 5, 4, 3), torch.float64, 7)
    for lead in ((2,), (2, 3)):
        g = make((*lead, 5), torch.float64, 8)[..., None, None].expand(*lead, 5, 4, 3)
        closed = ops.channel_weights(features, g, reference, mode)
        general = ops.channel_weights(features, g.contiguous(), reference, mode)
        torch.testing.assert_close(closed, general, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_constant_multipliers_reach_every_tensor(mode):
    def run(features, g, expand):
        g = g[..., None, None].expand(2, 5, 4, 3)
        return ops.channel_weights(features, g if expand else g.contiguous(), None, mode).square().sum()

    for requires in ("features", "g"):
        grads = []
        for expand in (True, False):
            x = {"features": make((2, 5, 4, 3), torch.float64, 9, offset=0.5), "g": make((2, 5), torch.float64, 10)}
            x[requires].requires_grad_()
            loss = run(x["features"], x["g"], expand)
            grads.append(torch.autograd.grad(loss, x[requires], allow_unused=True)[0] if loss.requires_grad else None)
        closed, general = (torch.zeros(1) if g is None else g for g in grads)
        torch.testing.assert_close(closed.double() + 0 * general, general.double(), rtol=1e-10, atol=1e-12)


def test_xgrad_guard_zeroes_cancelled_channels(backend):
    features = torch.tensor([1.0, -1.0, 2.0, -2.0]).view(1, 1, 2, 2)
    assert ops.channel_weights(features, features.exp(), mode="xgrad").item() == 0.0


def test_grad_cam_pp_guard_zeroes_the_pole(backend):
    features, g = torch.full((1, 1, 1, 2), -1.0), torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    # S = -2: 2 + S g is 0 at g = 1 and -4 at g = 3
    assert ops.channel_weights(features, g, mode="grad_cam_pp").item() == pytest.approx(-0.75)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [7, 56, 150])
@pytest.mark.parametrize("mode", MODES)
def test_nearly_equal_terms_lose_no_digits(backend, mode, side, layout):
    """They round the same way at every addition, so that a long chain of floats loses one digit or two."""
    features = 0.7 + 1e-4 * make((2, 33, side, side), torch.float32, 21, layout)
    multipliers = 1.1 + 1e-4 * make((2, 33, side, side), torch.float32, 22, layout)
    got = ops.channel_weights(features, multipliers, mode=mode)
    check_channel_weights(got, features, multipliers, None, mode)
    if mode in ("mean", "sum"):
        expected, _ = oracle(features, multipliers, None, mode)
        np.testing.assert_allclose(to_float64(got), expected[:, 0], rtol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_infinite_sum_makes_grad_cam_pp_terms_zero(backend, layout):
    features, g = make((1, 5, 7, 7), torch.float32, 23, layout), make((1, 5, 7, 7), torch.float32, 24, layout).exp()
    features[0, 2, 3, 4] = torch.inf
    got = ops.channel_weights(features, g, mode="grad_cam_pp")
    assert got.isfinite().all()
    assert (got == 0).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_channel(backend, mode):
    features, g = make((2, 5, 4, 4), torch.float32, 11, offset=0.5), make((2, 5, 4, 4), torch.float32, 12)
    clean = ops.channel_weights(features, g, mode=mode)
    g[1, 2, 3, 1] = torch.nan
    result = ops.channel_weights(features, g, mode=mode)
    assert result.isnan().nonzero().tolist() == [[1, 2]]
    keep = ~result.isnan()
    assert torch.equal(result[keep], clean[keep])


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (0, 2, 5, 4, 4), (3, 0, 5, 4, 4)])
def test_empty_batch_or_targets(backend, shape):
    for mode in MODES:
        assert ops.channel_weights(torch.zeros(shape[0], 5, 4, 4), torch.zeros(shape), mode=mode).shape == shape[:-2]


F = torch.zeros(2, 5, 4, 4)
ERRORS = [
    ({"features": F.long()}, TypeError, "got torch.int64"),
    ({"features": F[:, :0], "multipliers": F[:, :0]}, ValueError, r"\(2, 0, 4, 4\)"),
    ({"multipliers": torch.zeros(2, 5)}, ValueError, r"multipliers must be \(2, 5, 4, 4\) or .* got \(2, 5\)"),
    ({"multipliers": torch.zeros(2, 5, 4, 5)}, ValueError, r"got \(2, 5, 4, 5\)"),
    ({"multipliers": F.double()}, TypeError, "multipliers must be torch.float32 .* got torch.float64"),
    ({"reference": F[:, :4]}, ValueError, r"reference must be .* got \(2, 4, 4, 4\)"),
    ({"mode": "xgrd"}, ValueError, "unknown mode 'xgrd', .* did you mean 'xgrad'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match=message):
        ops.channel_weights(**{"features": F, "multipliers": F, **change})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_on_every_run_thread_count_and_batch(backend, layout):
    if backend == "reference":
        pytest.skip("PyTorch's own reductions make no such promise")
    features, g = make((4, 700, 7, 7), torch.float32, 13, layout), make((4, 700, 7, 7), torch.float32, 14, layout)
    threads = torch.get_num_threads()
    for mode in MODES:
        first = ops.channel_weights(features, g, mode=mode)
        assert all(torch.equal(first, ops.channel_weights(features, g, mode=mode)) for _ in range(50))
        assert torch.equal(first[1:2], ops.channel_weights(features[1:2], g[1:2], mode=mode))
        try:
            for n in (1, 3):
                torch.set_num_threads(n)
                assert torch.equal(first, ops.channel_weights(features, g, mode=mode))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.slow
def test_more_elements_than_int32(backend):
    if backend == "reference":
        pytest.skip("would materialise 8 GiB")
    k = 2**29 + 8  # times 4 positions: beyond 2^31 elements in a tensor that holds one channel
    g = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2).expand(1, k, 2, 2)
    result = OP(g, g, None, "sum")
    assert result[0, -1] == 30
    assert result.eq(30).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targets", [(), (2,)], ids=["KHW", "TKHW"])
def test_gradcheck(backend, targets, mode):
    shapes = [(2, 3, 3, 4), (2, *targets, 3, 3, 4), (1, 3, 3, 4)]
    tensors = [
        make(s, torch.float64, 20 + i, offset=0.7 if i == 0 else 0.0).requires_grad_() for i, s in enumerate(shapes)
    ]
    # Poles of xgrad and grad_cam_pp make finite differences coarse; a wrong formula is off by far more than 1e-3.
    assert gradcheck(lambda *x: ops.channel_weights(*x, mode), tensors, rtol=1e-3, atol=1e-4)


def test_bare_op_refuses_to_lose_gradients():
    with pytest.raises(RuntimeError, match=r"not differentiable; call fastcam.ops.channel_weights"):
        OP(F, F.clone().requires_grad_())


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    layouts = ("contiguous", "channels_last", "sliced channels")
    for layout, shape in zip(layouts, ((2, 5, 4, 6), (2, 3, 5, 4, 6), (2, 0, 5, 4, 6)), strict=True):
        features = make((2, 5, 4, 6), torch.float32, 15, layout)
        torch.library.opcheck(OP, (features, make(shape, torch.float32, 16, layout), features[:1], mode))


def test_compiled_graph_has_values_and_gradients_of_eager():
    def loss(features, g):
        return ops.channel_weights(features, g, None, "grad_cam_pp").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        eager_in = [make((b, 5, 4, 4), torch.float64, 17 + i, offset=0.5).requires_grad_() for i in range(2)]
        graph_in = [x.detach().clone().requires_grad_() for x in eager_in]
        loss(*eager_in).backward()
        compiled(*graph_in).backward()
        for ours, expected in zip(graph_in, eager_in, strict=True):
            torch.testing.assert_close(ours.grad, expected.grad)
