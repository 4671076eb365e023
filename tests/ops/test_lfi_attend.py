"""`lfi_attend` against a float64 oracle, image by image in numpy; its gradients against autograd of plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fastcam import ops
from fastcam._testing.kernel_cases import lfi_many_channels
from fastcam._testing.ops import DTYPES, LAYOUTS, OPCHECKED, make, to_float64
from fastcam._testing.relevance import assert_fresh, assert_repeatable

OP = torch.ops.fastcam.lfi_attend.default
MAPS = ("raw", "zeros")


def image(f: np.ndarray, s: np.ndarray, constant_map: str) -> tuple[np.ndarray, np.ndarray, float]:
    """(attention, raw), and the error of the attention per unit of relative error of P."""
    products = s[:, None, None] * f
    m = products.sum(0)
    p = np.where(m <= 0, 0, m)
    if not np.isfinite(p).all():
        return np.full_like(p, np.nan), p, 0.0
    extent, size = p.max() - p.min(), np.abs(products).sum(0).max()
    if extent == 0:
        return p if constant_map == "raw" else 0 * p, p, size
    return (p - p.min()) / extent, p, 4 * size / extent


def check(features, importance, constant_map="raw") -> None:
    attended, attention = ops.lfi_attend(features, importance, constant_map)
    raw = OP(features, importance, constant_map)[2]
    acc = torch.promote_types(features.dtype, torch.float32)
    b, k, h, w = features.shape
    assert_fresh(attended, features, importance)
    for found in (attention, raw):
        assert (found.dtype, found.shape, found.is_contiguous()) == (acc, (b, 1, h, w), True)
    eps = torch.finfo(acc).eps * 8 * max(1.0, k / 64) ** 0.5
    half = torch.finfo(features.dtype).eps if features.dtype.itemsize < 4 else 0.0
    for i in range(b):
        f, s = to_float64(features[i]), to_float64(importance[i])
        a, p, error = image(f, s, constant_map)
        np.testing.assert_allclose(
            to_float64(raw[i, 0]), p, rtol=0, atol=eps * np.nanmax(np.abs(s[:, None, None] * f).sum(0))
        )
        np.testing.assert_allclose(to_float64(attention[i, 0]), a, rtol=0, atol=eps * (error + 1))
        limit = eps * (error + 4) * np.abs(f) + half * np.abs((1 + a) * f) + torch.finfo(features.dtype).tiny
        difference = np.abs(to_float64(attended[i]) - (1 + a) * f)
        assert (difference <= limit).all() or np.isnan(a).all()
        assert np.array_equal(np.isnan(to_float64(attended[i])), np.isnan((1 + a) * f))


def plain(features: Tensor, importance: Tensor, constant_map: str = "raw") -> tuple[Tensor, Tensor]:
    """The formula as autograd can go through it."""
    raw = (importance[:, :, None, None] * features).sum(1, keepdim=True).relu()
    low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
    constant = low == high
    kept = raw if constant_map == "raw" else torch.zeros_like(raw)
    attention = torch.where(constant, kept, (raw - low) / torch.where(constant, 1.0, high - low))
    return (1 + attention) * features, attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide", [False, True])
def test_layouts_and_dtypes(backend, wide, layout, dtype):
    importance = make((3, 19), torch.promote_types(dtype, torch.float32) if wide else dtype, 1)
    check(make((3, 19, 5, 7), dtype, 2, layout), importance)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("k", "h", "w"),
    [(1, 7, 7), (3, 1, 1), (5, 1, 3), (63, 7, 7), (130, 13, 17), (2100, 2, 2), (2, 100, 101), (64, 8, 8), (9, 16, 16)],
)
def test_sizes(backend, k, h, w, layout):
    check(make((2, k, h, w), torch.float32, 3, layout), make((2, k), torch.float32, 4))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_maps(backend, layout):
    """All negative, the same everywhere, a single position."""
    features = make((2, 8, 4, 5), torch.float32, 5, layout).abs()
    features[1] = 0.25
    importance = torch.stack([-torch.ones(8), torch.ones(8)])
    for constant_map, value in (("raw", 2.0), ("zeros", 0.0)):
        check(features, importance, constant_map)
        attended, attention = ops.lfi_attend(features, importance, constant_map)
        assert attention[0].count_nonzero() == 0
        assert attention[1].eq(value).all()
        assert torch.equal(attended[0], features[0])
        assert attended[1].eq(0.25 * (1 + value)).all()
        single = ops.lfi_attend(features[1:, :, :1, :1], importance[1:], constant_map)
        assert single[1].item() == value


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_non_finite_maps_stay_in_their_image(backend, layout):
    features, importance = make((4, 19, 4, 5), torch.float32, 6, layout), torch.ones(4, 19)
    clean = ops.lfi_attend(features, importance)
    features[0, 3, 1, 2], features[1, 3, 1, 2], features[2, 3, 1, 2] = torch.nan, torch.inf, -torch.inf
    attended, attention = ops.lfi_attend(features, importance)
    assert attention[:2].isnan().all()
    assert attended[:2].isnan().all()
    assert attention[2].isfinite().all()  # the ReLU hides it
    for ours, expected in zip((attended, attention), clean, strict=True):
        assert torch.equal(ours[3], expected[3])
    raw = OP(features, importance)[2]
    assert raw[0].isnan().sum() == 1


def test_empty_batch(backend):
    attended, attention = ops.lfi_attend(torch.zeros(0, 5, 4, 4), torch.zeros(0, 5))
    assert attended.shape == (0, 5, 4, 4)
    assert attention.shape == (0, 1, 4, 4)


@pytest.mark.parametrize("constant_map", MAPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", [(4, 7, 5, 4), (4, 5, 1, 1), (4, 3, 9, 11)], ids=str)
@pytest.mark.parametrize("uses", ["both", "attended", "attention"])
def test_gradients_are_those_of_autograd(backend, uses, shape, layout, constant_map):
    """An image of ties, one whose map is zero, one whose map is constant."""
    features, importance = make(shape, torch.float64, 7), make(shape[:2], torch.float64, 8)
    features[1], importance[1] = features[1].round(), importance[1].round()
    features[2], importance[2] = features[2].abs(), -importance[2].abs()
    features[3], importance[3] = 0.5, 1.0
    weights = make(shape, torch.float64, 9), make((4, 1, *shape[2:]), torch.float64, 10)
    grads = []
    for call in (ops.lfi_attend, plain):
        inputs = [LAYOUTS[layout](features).clone().requires_grad_(), importance.clone().requires_grad_()]
        losses = [(x * y).sum() for x, y in zip(call(*inputs, constant_map), weights, strict=True)]
        {"both": losses[0] + losses[1], "attended": losses[0], "attention": losses[1]}[uses].backward()
        grads.append([x.grad for x in inputs])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("k", "h", "w"), [(512, 14, 14), (2048, 7, 7)])
def test_many_channels_cost_no_digits(backend, k, h, w, layout):
    """In float32, as close as 1e-6 to the formula in float64 and to plain PyTorch, gradients included."""
    features, importance = lfi_many_channels(k, h, w, layout)
    weights = make(features.shape, torch.float32, 23), make((2, 1, h, w), torch.float32, 24)
    found = []
    for call, dtype in ((ops.lfi_attend, torch.float32), (plain, torch.float32), (plain, torch.float64)):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (features, importance)]
        outputs = call(*inputs)
        loss = sum((x * y.to(dtype)).sum() for x, y in zip(outputs, weights, strict=True))
        found.append((*outputs, *torch.autograd.grad(loss, inputs)))
    for ours, theirs, exact in zip(*found, strict=True):
        limit = 1e-6 * max(1.0, exact.detach().abs().max().item())
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=limit)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=limit)  # each rounds its sums


@pytest.mark.parametrize("constant_map", MAPS)
def test_gradcheck(backend, constant_map):
    inputs = make((2, 5, 3, 4), torch.float64, 11).requires_grad_(), make((2, 5), torch.float64, 12).requires_grad_()
    assert gradcheck(lambda *x: ops.lfi_attend(*x, constant_map), inputs, atol=1e-4)


def test_mixed_dtypes_have_gradients_in_their_own(backend):
    features = make((2, 5, 4, 6), torch.bfloat16, 13).requires_grad_()
    importance = make((2, 5), torch.float32, 14).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        attended, attention = ops.lfi_attend(features, importance)
        (attended.float().sum() + attention.sum()).backward()
    assert features.grad.dtype == torch.bfloat16
    assert importance.grad.dtype == torch.float32


def test_only_arguments_and_two_maps_are_kept(backend):
    kept = []
    features, importance = torch.rand(2, 5, 4, 4, requires_grad=True), torch.rand(2, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.lfi_attend(features, importance)
    assert [x.shape for x in kept] == [(2, 5, 4, 4), (2, 5), (2, 1, 4, 4), (2, 1, 4, 4)]
    assert kept[0].data_ptr() == features.data_ptr()


F, S = torch.zeros(2, 5, 4, 4), torch.zeros(2, 5)
ERRORS = [
    ({"features": F.long()}, TypeError, "got torch.int64"),
    ({"features": F[:, :, :0]}, ValueError, r"\(2, 5, 0, 4\)"),
    ({"importance": None}, TypeError, "importance must be a torch.Tensor, got NoneType"),
    ({"importance": S[:, :4]}, ValueError, r"importance must be \(2, 5\), got \(2, 4\)"),
    ({"importance": S[..., None, None]}, ValueError, r"importance must be \(2, 5\), got \(2, 5, 1, 1\)"),
    ({"importance": S.double()}, TypeError, "importance must be torch.float32 like the features, got torch.float64"),
    ({"constant_map": "zero"}, ValueError, "unknown constant_map 'zero', .* did you mean 'zeros'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="lfi_attend: .*" + message):
        ops.lfi_attend(**{"features": F, "importance": S, **change})


def test_bare_op_reads_nothing_out_of_bounds():
    for wrong in (S[:, :4], S[:1], S[0], S.double()):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            OP(F, wrong)


def test_bare_op_refuses_to_lose_gradients():
    with pytest.raises(RuntimeError, match=r"not differentiable; call fastcam.ops.lfi_attend"):
        OP(F, S.clone().requires_grad_())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_on_every_run_thread_count_and_batch(backend, layout):
    if backend == "reference":
        pytest.skip("PyTorch's own reductions make no such promise")
    features, importance = make((4, 700, 7, 7), torch.float32, 15, layout), make((4, 700), torch.float32, 16)
    assert_repeatable(lambda: ops.lfi_attend(features, importance))
    images = [ops.lfi_attend(features[b : b + 1], importance[b : b + 1]) for b in range(4)]
    for ours, alone in zip(ops.lfi_attend(features, importance), zip(*images, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(alone))


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    features = make((2, 5, 4, 6), dtype, 17, layout)
    torch.library.opcheck(OP, (features, make((2, 5), torch.float32, 18)))
    torch.library.opcheck(OP, (features, make((2, 5), dtype, 18), "zeros"))
    torch.library.opcheck(OP, (F[:0], S[:0]))


@pytest.mark.parametrize("uses", ["both", "attended", "attention"])
def test_compiled_graph_has_values_and_gradients_of_eager(uses):
    def loss(features, importance):
        attended, attention = ops.lfi_attend(features, importance)
        found = {"both": attended * attention, "attended": attended, "attention": attention}[uses]
        return found.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        eager_in = [make(s, torch.float64, 19).requires_grad_() for s in ((b, 5, 4, 4), (b, 5))]
        graph_in = [x.detach().clone().requires_grad_() for x in eager_in]
        loss(*eager_in).backward()
        compiled(*graph_in).backward()
        for ours, expected in zip(graph_in, eager_in, strict=True):
            torch.testing.assert_close(ours.grad, expected.grad)
