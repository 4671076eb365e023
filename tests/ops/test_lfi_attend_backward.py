"""`lfi_attend_backward` against a float64 oracle: the formula, image by image in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcam import ops
from fastcam._testing.ops import DTYPES, LAYOUTS, OPCHECKED, make, to_float64
from fastcam._testing.relevance import assert_elementwise, assert_fresh, assert_refuses_grad, assert_repeatable
from fastcam.ops.lfi_attend_backward import lfi_attend_backward

OP = torch.ops.fastcam.lfi_attend_backward.default
FORWARD = torch.ops.fastcam.lfi_attend.default
MAPS = ("raw", "zeros")


def through_map(a: np.ndarray, p: np.ndarray, size: np.ndarray, constant_map: str) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of P from that of its scaled map, and the size of what it is a sum of."""
    low, high = p.min(), p.max()
    if low == high:
        return (a, size) if constant_map == "raw" else (0 * a, 0 * a)
    d, n, size = a / (high - low), (p - low) / (high - low), size / (high - low)
    found, sizes = d.copy(), size.copy()
    found[p == low] += (d * (n - 1)).sum() / (p == low).sum()
    found[p == high] -= (d * n).sum() / (p == high).sum()
    sizes[(p == low) | (p == high)] += size.sum()
    return found, sizes


def check(grad, given, extra, features, importance, attention, raw, constant_map="raw") -> None:
    results = lfi_attend_backward(grad, given, extra, features, importance, attention, raw, constant_map)
    assert_fresh(results[0], features, grad)
    assert (results[1].dtype, results[1].shape, results[1].is_contiguous()) == (
        importance.dtype,
        importance.shape,
        True,
    )
    for b in range(len(features)):
        f, g, s, p = (to_float64(x[b]) for x in (features, grad, importance, raw[:, 0]))
        a, size = (g * f).sum(0), np.abs(g * f).sum(0)
        if given is not None:
            a, size = a + to_float64(given[b, 0]), size + np.abs(to_float64(given[b, 0]))
        d, size = through_map(a, p, size, constant_map)
        if extra is not None:
            d, size = d + to_float64(extra[b, 0]), size + np.abs(to_float64(extra[b, 0]))
        d[p <= 0], size[p <= 0] = 0, 0
        s, gain = s[:, None, None], 1 + to_float64(attention[b, 0])
        scale = gain * np.abs(g) + np.abs(s) * size
        assert_elementwise(results[0][b], gain * g + s * d, scale, steps=16)
        assert_elementwise(results[1][b], (d * f).sum((1, 2)), (size * np.abs(f)).sum((1, 2)), steps=16)


def arguments(shape, dtype, seed, layout="contiguous", other=None, wide=False, constant_map="raw"):
    """As after the op: an image of ties, if there are two; one without attention, if there are three."""
    acc = torch.promote_types(dtype, torch.float32)
    b, k, h, w = shape
    features, importance = make(shape, dtype, seed, offset=0.2), make((b, k), acc if wide else dtype, seed + 1)
    if b > 1:
        features[1], importance[1] = features[1].round(), importance[1].round()
    if b > 2:
        features[2], importance[2] = features[2].abs(), -importance[2].abs()
    features = LAYOUTS[layout](features)
    _, attention, raw = FORWARD(features, importance, constant_map)
    grad = make(shape, dtype, seed + 2, other or layout)
    maps = [make((b, 1, h, w), acc, seed + 3 + i, other or layout) for i in range(2)]
    return [grad, *maps, features, importance, attention, raw, constant_map]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide", [False, True])
def test_layouts_and_dtypes(backend, wide, layout, dtype):
    check(*arguments((3, 19, 5, 7), dtype, 1, layout, wide=wide))
    check(*arguments((3, 19, 5, 7), dtype, 1, layout, "channels_last", wide, "zeros"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("k", "h", "w"),
    [(1, 7, 7), (3, 1, 1), (5, 1, 3), (63, 7, 7), (130, 13, 17), (2100, 2, 2), (2, 64, 67), (64, 8, 8), (9, 16, 16)],
)
def test_sizes(backend, k, h, w, layout):
    check(*arguments((2, k, h, w), torch.float32, 2, layout))


@pytest.mark.parametrize("constant_map", MAPS)
@pytest.mark.parametrize("left_out", [(1,), (2,), (1, 2)])
def test_gradients_left_out(backend, left_out, constant_map):
    given = arguments((3, 19, 5, 7), torch.float32, 3, constant_map=constant_map)
    check(*(None if i in left_out else x for i, x in enumerate(given)))


@pytest.mark.parametrize("constant_map", MAPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 9, 4, 5), (3, 9, 1, 1)], ids=str)
def test_constant_maps(backend, shape, layout, constant_map):
    given = arguments(shape, torch.float64, 4, layout, constant_map=constant_map)
    given[6][:] = torch.tensor([0.75, 0.0, 2.0]).view(3, 1, 1, 1)
    given[5][:] = given[6] if constant_map == "raw" else 0
    check(*given)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_images_without_finite_maps_have_no_gradient_but_nan(backend, layout):
    features, importance = make((3, 19, 4, 5), torch.float32, 5, layout), torch.ones(3, 19)
    features[0, 3, 1, 2], features[1, 3, 1, 2] = torch.nan, torch.inf
    _, attention, raw = FORWARD(features, importance)
    grads = lfi_attend_backward(make((3, 19, 4, 5), torch.float32, 6), None, None, features, importance, attention, raw)
    for grad in grads:
        assert grad[:2].isnan().all()
        assert grad[2].isfinite().all()


def test_empty_batch(backend):
    found = lfi_attend_backward(
        *(x if isinstance(x, str) else x[:0] for x in arguments((2, 5, 4, 4), torch.float32, 7))
    )
    assert [x.shape for x in found] == [(0, 5, 4, 4), (0, 5)]


NAMES = ("grad_attended", "grad_attention", "grad_raw", "features", "importance", "attention", "raw", "constant_map")
F, MAP, S = torch.zeros(2, 5, 4, 4), torch.zeros(2, 1, 4, 4), torch.zeros(2, 5)
GIVEN = dict(zip(NAMES, (F, MAP, MAP, F, S, MAP, MAP, "raw"), strict=True))
ERRORS = [
    ({"grad_attended": None}, TypeError, "grad_attended must be a torch.Tensor, got NoneType"),
    (
        {"grad_attended": F.half()},
        TypeError,
        "grad_attended must be torch.float32 like the features, got torch.float16",
    ),
    (
        {"grad_attended": F[:1]},
        ValueError,
        r"grad_attended must be \(2, 5, 4, 4\) like the features, got \(1, 5, 4, 4\)",
    ),
    ({"grad_attention": F}, ValueError, r"grad_attention must be \(2, 1, 4, 4\), got \(2, 5, 4, 4\)"),
    ({"grad_raw": MAP[:, 0]}, ValueError, r"grad_raw must be \(2, 1, 4, 4\), got \(2, 4, 4\)"),
    ({"features": F.long()}, TypeError, "got torch.int64"),
    ({"importance": S[:, :4]}, ValueError, r"importance must be \(2, 5\), got \(2, 4\)"),
    ({"attention": None}, TypeError, "attention must be a torch.Tensor, got NoneType"),
    ({"raw": MAP.double()}, TypeError, "raw must be torch.float32 like the features, got torch.float64"),
    ({"constant_map": "zero"}, ValueError, "unknown constant_map 'zero', .* did you mean 'zeros'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="lfi_attend_backward: .*" + message):
        lfi_attend_backward(**{**GIVEN, **change})


def test_maps_have_the_accumulation_dtype():
    half = {name: x.half() if name in ("grad_attended", "features", "raw") else x for name, x in GIVEN.items()}
    with pytest.raises(TypeError, match=r"raw must be torch.float32 for torch.float16 features, got torch.float16"):
        lfi_attend_backward(**half)


@pytest.mark.parametrize("change", range(7))
def test_bare_op_reads_nothing_out_of_bounds(change):
    given = list(GIVEN.values())
    for wrong in (torch.zeros(2, 5, 4, 3), torch.zeros(2, 2, 4, 4), F[0], given[change].double()):
        with pytest.raises((ValueError, TypeError)):
            OP(*(wrong if i == change else x for i, x in enumerate(given)))


def test_inputs_that_require_grad_are_refused(backend):
    for call in (lfi_attend_backward, lambda **given: OP(*(given[name] for name in NAMES))):
        assert_refuses_grad(call, "lfi_attend_backward", GIVEN)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_on_every_run_thread_count_and_batch(backend, layout):
    if backend == "reference":
        pytest.skip("PyTorch's own reductions make no such promise")
    given = arguments((4, 700, 7, 7), torch.float32, 8, layout)
    assert_repeatable(lambda: lfi_attend_backward(*given))
    images = [lfi_attend_backward(*(x if isinstance(x, str) else x[b : b + 1] for x in given)) for b in range(4)]
    for ours, alone in zip(lfi_attend_backward(*given), zip(*images, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(alone))


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    given = arguments((2, 5, 4, 6), dtype, 9, layout, wide=True)
    torch.library.opcheck(OP, tuple(given))
    torch.library.opcheck(OP, (given[0], None, None, *given[3:7], "zeros"))
    torch.library.opcheck(OP, tuple(x if isinstance(x, str) else x[:0] for x in GIVEN.values()))


@pytest.mark.parametrize("loss", [lambda x: x.square().sum(), lambda x: x.sum()], ids=["square", "sum"])
def test_second_derivatives_are_refused(loss):
    """Also where the gradient that comes in is a constant, and only what was saved depends on the features."""
    features, importance = torch.rand(2, 5, 4, 4, requires_grad=True), (S + 1).float().requires_grad_()
    attended, attention = ops.lfi_attend(features, importance)
    given = (features, importance)
    grads = torch.autograd.grad(loss(attended) + attention.sum(), given, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match=r"ops.lfi_attend can be differentiated once"):
            torch.autograd.grad(grad.sum(), features, retain_graph=True, allow_unused=True)
    attended, attention = ops.lfi_attend(features, importance)
    plain = torch.autograd.grad(loss(attended) + attention.sum(), given)
    for grad, other in zip(grads, plain, strict=True):
        assert torch.equal(grad, other)
