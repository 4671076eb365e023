"""`lfi_mask` against a float64 oracle, channel by channel in numpy; its gradients against autograd of plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fastcam import ops
from fastcam._testing.ops import DTYPES, LAYOUTS, OPCHECKED, make, to_float64
from fastcam._testing.relevance import assert_elementwise, assert_fresh, assert_repeatable, with_zeros

OP = torch.ops.fastcam.lfi_mask.default


def check(features, grey) -> None:
    result = ops.lfi_mask(features, grey)
    assert_fresh(result, features, grey)
    f, shades = to_float64(features), to_float64(grey)
    expected = np.empty_like(f)
    for b, k in np.ndindex(f.shape[:2]):
        x, n = f[b, k], np.ones(f.shape[2:])
        if np.isnan(x).any():
            n[:] = np.nan
        else:
            if x.max() > x.min():
                n = (x - x.min()) / (x.max() - x.min())
            n[x == 0] = 0
        expected[b, k] = n * shades[b, 0]
    assert_elementwise(result, expected, steps=4)


def plain(features: Tensor, grey: Tensor) -> Tensor:
    """The formula as autograd can go through it."""
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    constant = low == high
    n = torch.where(constant, 1.0, (features - low) / torch.where(constant, 1.0, high - low))
    return torch.where(features == 0, 0.0, n) * grey


def special(shape, dtype, seed, layout="contiguous") -> Tensor:
    """Features with zeros, ties, a constant and a dead channel."""
    x = with_zeros(make(shape, torch.float64, seed), seed)
    x[:, ::2] = x[:, ::2].relu()
    x[:, 1::3] = x[:, 1::3].round()
    x[0, 0], x[-1, -1] = 0.5, 0
    return LAYOUTS[layout](x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide", [False, True])
def test_layouts_and_dtypes(backend, wide, layout, dtype):
    features = special((3, 19, 5, 7), dtype, 1, layout)
    check(features, make((3, 1, 5, 7), torch.promote_types(dtype, torch.float32) if wide else dtype, 2, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("k", "h", "w"), [(1, 7, 7), (3, 1, 1), (5, 1, 3), (63, 7, 7), (300, 13, 17), (530, 2, 2), (2, 224, 224)]
)
def test_sizes(backend, k, h, w, layout):
    check(special((2, k, h, w), torch.float32, 3, layout), make((2, 1, h, w), torch.float32, 4))


def test_expanded_features_and_images_inside_others(backend):
    features, grey = special((3, 5, 4, 6), torch.float32, 5), make((3, 1, 4, 6), torch.float32, 6)
    check(features.transpose(0, 1).contiguous().transpose(0, 1), grey)
    check(features[:1].expand(3, 5, 4, 6), grey[:1].expand(3, 1, 4, 6))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("at", [(0, 0), (3, 1)])
def test_nan_stays_in_its_channel(backend, at, layout):
    features, grey = special((2, 19, 4, 4), torch.float32, 7, layout), make((2, 1, 4, 4), torch.float32, 8)
    clean = ops.lfi_mask(features, grey)
    features[1, 2][at] = torch.nan
    check(features, grey)
    result = ops.lfi_mask(features, grey)
    assert result[1, 2].isnan().all()
    keep = ~result.isnan()
    assert keep.sum() == keep.numel() - 16
    assert torch.equal(result[keep], clean[keep])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinities_follow_the_formula(backend, layout):
    features, grey = make((1, 19, 4, 4), torch.float32, 9, layout), torch.ones(1, 1, 4, 4)
    features[0, 0, 1, 1], features[0, 1], features[0, 2, 0, 0] = torch.inf, torch.inf, -torch.inf
    torch.testing.assert_close(ops.lfi_mask(features, grey), plain(features, grey), equal_nan=True)


def test_empty_batch(backend):
    assert ops.lfi_mask(torch.zeros(0, 5, 4, 4), torch.zeros(0, 1, 4, 4)).shape == (0, 5, 4, 4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", [(3, 7, 5, 4), (2, 5, 1, 1), (2, 3, 9, 11)], ids=str)
def test_gradients_are_those_of_autograd(backend, shape, layout):
    features, grey = special(shape, torch.float64, 10, layout), make((shape[0], 1, *shape[2:]), torch.float64, 11)
    weights = make(shape, torch.float64, 12, layout)
    grads = []
    for call in (ops.lfi_mask, plain):
        inputs = [features.clone().requires_grad_(), grey.clone().requires_grad_()]
        (call(*inputs) * weights).sum().backward()
        grads.append([x.grad for x in inputs])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck(backend):
    features = (torch.randperm(2 * 3 * 4 * 3, dtype=torch.float64).view(2, 3, 4, 3) / 10 + 0.1).requires_grad_()
    assert gradcheck(ops.lfi_mask, (features, make((2, 1, 4, 3), torch.float64, 13).requires_grad_()))


def test_second_derivatives_are_refused():
    """Also where the gradient that comes in is a constant, and only what was saved depends on the features."""
    features, grey = torch.rand(2, 5, 4, 4, requires_grad=True), torch.rand(2, 1, 4, 4, requires_grad=True)
    for loss in (lambda x: x.square().sum(), lambda x: x.sum()):
        grads = torch.autograd.grad(loss(ops.lfi_mask(features, grey)), (features, grey), create_graph=True)
        plain = torch.autograd.grad(loss(ops.lfi_mask(features, grey)), (features, grey))
        for grad, other in zip(grads, plain, strict=True):
            assert torch.equal(grad, other)
            with pytest.raises(RuntimeError, match=r"ops.lfi_mask can be differentiated once"):
                torch.autograd.grad(grad.sum(), features, retain_graph=True, allow_unused=True)


def test_mixed_dtypes_have_gradients_in_their_own(backend):
    features = special((2, 5, 4, 6), torch.bfloat16, 14).requires_grad_()
    grey = make((2, 1, 4, 6), torch.float32, 15).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ops.lfi_mask(features, grey).float().sum().backward()
    assert features.grad.dtype == torch.bfloat16
    assert grey.grad.dtype == torch.float32


def test_only_the_arguments_are_kept(backend):
    kept = []
    features, grey = torch.rand(2, 5, 4, 4, requires_grad=True), torch.rand(2, 1, 4, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.lfi_mask(features, grey)
    assert [x.data_ptr() for x in kept] == [features.data_ptr(), grey.data_ptr()]


F, GREY = torch.zeros(2, 5, 4, 4), torch.zeros(2, 1, 4, 4)
ERRORS = [
    ({"features": [0.0]}, TypeError, "features must be a torch.Tensor, got list"),
    ({"features": F.long()}, TypeError, "got torch.int64"),
    ({"features": F[0]}, ValueError, r"features must be \(B,K,H,W\), got 3 dimensions"),
    ({"features": F[:, :0]}, ValueError, r"\(2, 0, 4, 4\)"),
    ({"grey": None}, TypeError, "grey must be a torch.Tensor, got NoneType"),
    ({"grey": F}, ValueError, r"grey must be \(2, 1, 4, 4\), got \(2, 5, 4, 4\)"),
    ({"grey": GREY[:1]}, ValueError, r"grey must be \(2, 1, 4, 4\), got \(1, 1, 4, 4\)"),
    ({"grey": GREY.double()}, TypeError, "grey must be torch.float32 like the features, got torch.float64"),
    ({"grey": GREY.to("meta")}, ValueError, "grey is on meta, features on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="lfi_mask: .*" + message):
        ops.lfi_mask(**{"features": F, "grey": GREY, **change})


def test_bare_op_reads_nothing_out_of_bounds():
    for grey in (F, GREY[:1], GREY[..., :3], GREY[:, 0], GREY.double()):
        with pytest.raises((ValueError, TypeError)):
            OP(F, grey)


def test_bare_op_refuses_to_lose_gradients():
    with pytest.raises(RuntimeError, match=r"not differentiable; call fastcam.ops.lfi_mask"):
        OP(F.clone().requires_grad_(), GREY)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_on_every_run_thread_count_and_batch(backend, layout):
    features, grey = special((4, 700, 7, 7), torch.float32, 16, layout), make((4, 1, 7, 7), torch.float32, 17)
    assert_repeatable(lambda: ops.lfi_mask(features, grey))
    images = [ops.lfi_mask(features[b : b + 1], grey[b : b + 1]) for b in range(4)]
    assert torch.equal(ops.lfi_mask(features, grey), torch.cat(images))


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    torch.library.opcheck(OP, (make((2, 5, 4, 6), dtype, 18, layout), make((2, 1, 4, 6), torch.float32, 19)))
    torch.library.opcheck(OP, (F[:0], GREY[:0]))


def test_compiled_graph_has_values_and_gradients_of_eager():
    def loss(features, grey):
        return ops.lfi_mask(features, grey).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        eager_in = [make((b, 5, 4, 4), torch.float64, 20).requires_grad_(), make((b, 1, 4, 4), torch.float64, 21)]
        graph_in = [eager_in[0].detach().clone().requires_grad_(), eager_in[1]]
        loss(*eager_in).backward()
        compiled(*graph_in).backward()
        torch.testing.assert_close(graph_in[0].grad, eager_in[0].grad)
