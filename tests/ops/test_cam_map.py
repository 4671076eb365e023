"""`cam_map` against a float64 oracle: numpy einsum and explicit interpolation matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import fastcam
from fastcam import ops
from fastcam._testing.ops import DTYPES, LAYOUTS, assert_rms, make, to_float64, usable_backends

BACKENDS = usable_backends()
OP = torch.ops.fastcam.cam_map.with_raw


def interpolation(size_in: int, size_out: int) -> np.ndarray:
    """(out, in) matrix of linear interpolation between pixel centres, edges held."""
    matrix = np.zeros((size_out, size_in))
    for row in range(size_out):
        centre = max((row + 0.5) * size_in / size_out - 0.5, 0.0)
        left = min(int(centre), size_in - 1)
        share = centre - left
        matrix[row, left] += 1 - share
        matrix[row, min(left + 1, size_in - 1)] += share
    return matrix


def oracle(features, weights, reference=None, relu=True, normalize=True, size=None):
    """(maps, raw) in float64 with a target dimension; finite inputs."""
    d = to_float64(features) - (0 if reference is None else to_float64(reference))
    w = to_float64(weights)
    if weights.dim() in (2, 4):
        w = w[:, None]
    m = np.einsum("btk,bkhw->bthw", w, d) if w.ndim == 3 else np.einsum("btkhw,bkhw->bthw", w, d)
    raw = np.maximum(m, 0) if relu else m
    u = raw
    if size is not None:
        u = interpolation(raw.shape[2], size[0]) @ raw @ interpolation(raw.shape[3], size[1]).T
    if normalize:
        low, high = u.min((2, 3), keepdims=True), u.max((2, 3), keepdims=True)
        flat = (low == high) | (raw.min((2, 3), keepdims=True) == raw.max((2, 3), keepdims=True))
        u = np.where(flat, 0, (u - low) / np.where(flat, 1, high - low))
    return u, raw


def check(features, weights, reference=None, relu=True, normalize=True, size=None) -> None:
    """Values, dtype and layout of maps and raw against the oracle."""
    maps, raw, finite = ops.cam_map_with_raw(features, weights, reference, relu, normalize, size)
    acc = torch.float64 if features.dtype == torch.float64 else torch.float32
    for result in (maps, raw):
        assert result.dtype == acc
        assert result.is_contiguous()
    assert finite.dtype == torch.bool
    assert finite.all()
    if weights.dim() in (2, 4):
        maps, raw = maps.unsqueeze(1), raw.unsqueeze(1)
    expected_maps, expected_raw = oracle(features, weights, reference, relu, normalize, size)
    if relu and expected_raw.size and not expected_raw.any():
        assert not raw.any()  # every sum was negative
    # A ReLU or a sum that cancels leaves small values: measure against the sum of magnitudes instead.
    magnitudes = oracle(features.abs(), weights.abs(), None if reference is None else -reference.abs(), False, False)[1]
    # 1e-6 per 64 terms of the magnitudes' RMS, the house rate for a reduction.
    rate = {torch.float64: 1e-12, torch.float32: 1e-6}[acc] * max(1, features.shape[1] / 64) ** 0.5
    error = np.abs(to_float64(raw) - expected_raw)
    assert (error <= rate * magnitudes).all(), (
        f"raw: {(error / magnitudes).max():.3g} of the magnitude, limit {rate:.3g}"
    )
    if not normalize:
        assert_rms("maps", maps, expected_maps, features.shape[1], factor=8)
        return
    # Scaling divides the error of u by the map's span; one more rounding each for difference, inverse, product.
    span = (expected_raw if size is None else oracle(features, weights, reference, relu, False, size)[0]).reshape(
        *expected_raw.shape[:2], -1
    )
    span = (span.max(2) - span.min(2))[..., None, None]
    epsilon = torch.finfo(acc).eps
    peak = magnitudes.max((2, 3), keepdims=True)
    # Source coordinates are rounded too, by epsilon times the layer's extent, moving a value by at most a span a pixel.
    limit = 4 * rate * peak / np.where(span > 0, span, np.inf) + 4 * epsilon * max(features.shape[2:])
    error = np.abs(to_float64(maps) - expected_maps)
    assert (error <= limit).all(), f"maps: error {error.max():.3g}, limit {limit.min():.3g}"
    assert to_float64(maps).min(initial=0) >= 0
    assert to_float64(maps).max(initial=0) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", ["K", "TK", "KHW", "TKHW"])
def test_layouts_and_dtypes(backend, weights, layout, dtype):
    b, t, k, h, w = 2, 9, 67, 7, 9
    features = make((b, k, h, w), dtype, 1, layout)
    shape = {"K": (b, k), "TK": (b, t, k), "KHW": (b, k, h, w), "TKHW": (b, t, k, h, w)}[weights]
    values = make(shape, dtype, 2, layout if len(shape) > 3 else "contiguous")
    reference = make((1, k, h, w), dtype, 3, layout)
    check(features, values, size=(20, 31))
    check(features, values, reference, relu=False, normalize=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("k", "h", "w"),
    [(1, 7, 7), (3, 1, 1), (63, 7, 7), (64, 14, 14), (512, 13, 17), (2049, 7, 7), (2, 224, 224), (300, 33, 40)],
)
def test_sizes(backend, k, h, w, layout):
    features = make((3, k, h, w), torch.float32, 4, layout)
    for weights in (make((3, k), torch.float32, 5), make((3, 2, k), torch.float32, 6)):
        check(features, weights)
        check(features, weights, size=(2 * h + 1, 3 * w))


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (5, 9), (3, 4), (8, 10), (224, 224), (7, 100)])
def test_resize_up_down_and_identity(backend, size):
    check(make((2, 5, 7, 9), torch.float32, 7), make((2, 5), torch.float32, 8), relu=False, size=size)
    check(make((2, 5, 7, 9), torch.float64, 7), make((2, 3, 5), torch.float64, 8), size=size, normalize=False)


@pytest.mark.parametrize("shape", [(0, 5), (0, 2, 5), (3, 0, 5), (0, 5, 4, 4), (3, 0, 5, 4, 4)])
def test_empty_batch_or_targets(backend, shape):
    features = torch.zeros(shape[0], 5, 4, 4)
    maps, raw, finite = ops.cam_map_with_raw(features, torch.zeros(shape), size=(8, 9))
    lead = shape[:1] if len(shape) in (2, 4) else shape[:2]
    assert maps.shape == (*lead, 8, 9)
    assert raw.shape == (*lead, 4, 4)
    assert finite.shape == lead


F = torch.zeros(2, 5, 4, 4)
ERRORS = [
    ({"features": [1]}, TypeError, "features must be a torch.Tensor, got list"),
    ({"features": F.int()}, TypeError, r"got torch.int32; convert with .float\(\)"),
    ({"features": F[0]}, ValueError, r"\(B,K,H,W\), got 3 dimensions: \(5, 4, 4\)"),
    ({"features": F[:, :0]}, ValueError, r"at least one channel, row and column, got .* \(2, 0, 4, 4\)"),
    ({"features": F[..., :0]}, ValueError, r"\(2, 5, 4, 0\)"),
    ({"features": F.to_sparse()}, TypeError, r"torch.sparse_coo; convert with .to_dense\(\)"),
    ({"weights": torch.zeros(2, 6)}, ValueError, r"weights must be \(2, 5\) or .* got \(2, 6\)"),
    ({"weights": torch.zeros(3, 5)}, ValueError, r"got \(3, 5\)"),
    ({"weights": torch.zeros(5)}, ValueError, r"got \(5,\)"),
    ({"weights": torch.zeros(2, 5, 4, 3)}, ValueError, r"got \(2, 5, 4, 3\)"),
    ({"weights": torch.zeros(2, 5).double()}, TypeError, "weights must be torch.float32 .* got torch.float64"),
    ({"weights": torch.zeros(2, 5, device="meta")}, ValueError, "weights is on meta, features on cpu"),
    ({"reference": torch.zeros(3, 5, 4, 4)}, ValueError, r"reference must be .* got \(3, 5, 4, 4\)"),
    ({"reference": F.half()}, TypeError, "reference must be torch.float32 .* got torch.float16"),
    ({"size": (0, 3)}, ValueError, r"two positive integers, got \(0, 3\)"),
    ({"size": (3,)}, ValueError, r"\(height, width\), got \(3,\)"),
    ({"size": 224}, ValueError, r"\(height, width\), got 224"),
    ({"size": (3.5, 3)}, TypeError, r"two integers, got \(3.5, 3\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match=message):
        ops.cam_map(**{"features": F, "weights": torch.zeros(2, 5), **change})


@pytest.mark.skipif("cpp" not in BACKENDS, reason="extension not built")
@pytest.mark.parametrize("weights", [(2, 6), (3, 5), (5,), (2, 5, 4, 3), (2, 3, 5, 4)])
def test_bare_op_checks_shapes_too(weights):
    with pytest.raises(ValueError, match="weights"):
        OP(F, torch.zeros(weights))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_non_finite_values_are_flagged_and_contained(backend, layout, bad, relu):
    features = make((3, 5, 7, 7), torch.float32, 9, layout)
    clean = ops.cam_map_with_raw(features, torch.ones(3, 5), relu=relu, size=(20, 20))
    features[1, 2, 3, 4] = bad
    maps, raw, finite = ops.cam_map_with_raw(features, torch.ones(3, 5), relu=relu, size=(20, 20))
    assert finite.tolist() == [True, False, True]
    assert maps[1].isnan().all()
    expected = 0.0 if relu and bad == -torch.inf else bad
    assert np.array_equal(raw[1, 3, 4].numpy(), np.float32(expected), equal_nan=True)
    for image in (0, 2):
        assert torch.equal(maps[image], clean[0][image])
    assert raw[1].isfinite().sum() >= 48


@pytest.mark.parametrize("size", [None, (20, 33)])
@pytest.mark.parametrize("value", [0.0, -3.0, 0.3, 1e-40])
def test_flat_map_becomes_zeros(backend, value, size):
    maps = ops.cam_map(torch.full((1, 1, 7, 7), value), torch.ones(1, 1), relu=False, size=size)
    assert torch.equal(maps, torch.zeros_like(maps))


@pytest.mark.parametrize("size", [None, (14, 14)])
def test_subnormal_span_scales_to_unit_range(backend, size):
    features = torch.zeros(1, 1, 7, 7)
    features[0, 0, 3, 3] = 1e-40  # 1 / span overflows
    maps = ops.cam_map(features, torch.ones(1, 1), size=size)
    assert maps.max() == 1
    assert maps.min() == 0


def test_extremes_are_exactly_zero_and_one(backend):
    for seed in range(20):
        maps = ops.cam_map(make((4, 3, 7, 7), torch.float32, seed), make((4, 3), torch.float32, -seed), size=(31, 224))
        assert maps.amin((1, 2)).eq(0).all()
        assert maps.amax((1, 2)).eq(1).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_on_every_run_thread_count_and_batch(backend, layout):
    if backend == "reference":
        pytest.skip("PyTorch's own reductions make no such promise")
    features, weights = make((4, 700, 14, 14), torch.float32, 10, layout), make((4, 3, 700), torch.float32, 11)
    first = ops.cam_map(features, weights, size=(50, 50))
    assert all(torch.equal(first, ops.cam_map(features, weights, size=(50, 50))) for _ in range(50))
    assert torch.equal(first[2:3], ops.cam_map(features[2:3], weights[2:3], size=(50, 50)))
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, ops.cam_map(features, weights, size=(50, 50)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_more_elements_than_int32(backend):
    if backend == "reference":
        pytest.skip("would materialise 8 GiB")
    k = 2**29 + 8  # times 4 positions: beyond 2^31 elements in a tensor that holds one channel
    features = torch.tensor([1.0, 2.0, 3.0, 4.0]).bfloat16().view(1, 1, 2, 2).expand(1, k, 2, 2)
    weights = torch.zeros(1, k)
    weights[0, -1] = 3.0
    raw = ops.cam_map_with_raw(features, weights)[1]
    assert raw.flatten().tolist() == [3.0, 6.0, 9.0, 12.0]


def test_constant_multipliers_are_read_as_coefficients(backend):
    features, coefficients = make((2, 5, 4, 4), torch.float32, 12), make((2, 3, 5), torch.float32, 13)
    multipliers = coefficients[..., None, None].expand(2, 3, 5, 4, 4)
    assert torch.equal(ops.cam_map(features, multipliers), ops.cam_map(features, coefficients))
    leaf = multipliers.clone().requires_grad_()
    maps = ops.cam_map(features, leaf, normalize=False)
    (grad,) = torch.autograd.grad(maps.sum(), leaf)
    assert grad.shape == multipliers.shape  # a gradient per position
    assert torch.allclose(
        grad, (ops.cam_map(features, coefficients, normalize=False) > 0)[:, :, None] * features[:, None]
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [None, (5, 7), (3, 2)])
@pytest.mark.parametrize("weights", [(2, 3), (2, 2, 3), (2, 3, 4, 4), (2, 2, 3, 4, 4)])
def test_gradcheck(backend, weights, size, normalize):
    tensors = [make(s, torch.float64, i).requires_grad_() for i, s in enumerate([(2, 3, 4, 4), weights, (1, 3, 4, 4)])]
    assert gradcheck(lambda *x: ops.cam_map_with_raw(*x, True, normalize, size)[:2], tensors)


def test_gradient_shares_ties_as_eager_does():
    values = torch.tensor([0.0, 0, 1, 2, 2, 2], dtype=torch.float64).view(1, 1, 2, 3)
    one = torch.ones(1, 1, dtype=torch.float64)
    upstream = make((1, 2, 3), torch.float64, 14)
    ours, eager = values.clone().requires_grad_(), values.clone().requires_grad_()
    ops.cam_map(ours, one, relu=False).backward(upstream)
    u = eager[:, 0]
    low, high = u.amin((1, 2), keepdim=True), u.amax((1, 2), keepdim=True)
    ((u - low) / (high - low)).backward(upstream)
    assert torch.allclose(ours.grad, eager.grad, rtol=1e-12)


def test_flat_map_has_zero_gradient():
    features = torch.full((1, 1, 3, 3), 0.3, requires_grad=True)
    ops.cam_map(features, torch.ones(1, 1), size=(7, 7)).sum().backward()
    assert torch.equal(features.grad, torch.zeros(1, 1, 3, 3))


def test_bare_op_refuses_to_lose_gradients():
    features = F.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"not differentiable; call fastcam.ops.cam_map"):
        OP(features, torch.zeros(2, 5))
    with torch.no_grad():
        OP(features, torch.zeros(2, 5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced channels"])
@pytest.mark.parametrize("weights", [(2, 5), (2, 3, 5), (2, 5, 4, 6), (2, 0, 5)])
def test_opcheck(weights, layout):
    features = make((2, 5, 4, 6), torch.float32, 15, layout)
    torch.library.opcheck(OP, (features, make(weights, torch.float32, 16)), {"size": [7, 9]})
    torch.library.opcheck(torch.ops.fastcam.cam_map.default, (features, make(weights, torch.float32, 16), features[:1]))


def test_compiled_graph_has_values_and_gradients_of_eager():
    def loss(features, weights):
        return (ops.cam_map(features, weights, size=(9, 9)) * torch.linspace(0, 1, 9)).sum()

    graphs = []

    def backend_with_count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        eager_in = [
            make((b, 5, 4, 4), torch.float32, 17).requires_grad_(),
            make((b, 5), torch.float32, 18).requires_grad_(),
        ]
        graph_in = [x.detach().clone().requires_grad_() for x in eager_in]
        eager, graph = loss(*eager_in), compiled(*graph_in)
        torch.testing.assert_close(graph, eager)
        eager.backward()
        graph.backward()
        for ours, expected in zip(graph_in, eager_in, strict=True):
            torch.testing.assert_close(ours.grad, expected.grad)
    counted = torch.compile(loss, fullgraph=True, backend=backend_with_count, dynamic=True)
    for b in (2, 3, 4):
        counted(make((b, 5, 4, 4), torch.float32, 17), make((b, 5), torch.float32, 18))
    assert len(graphs) == 1, "another batch size compiled again"


@pytest.mark.skipif("cpp" not in BACKENDS, reason="extension not built")
@pytest.mark.parametrize("side", [7, 10, 19, 67])
@pytest.mark.parametrize("targets", [1, 3])
def test_equal_features_have_equal_sums_in_all_shapes(side, targets):
    """Exactly: what rounding tells positions apart by, min-max scaling would stretch over the whole map."""
    generator = torch.Generator().manual_seed(side)
    for channels in (61, 140, 512):
        values, weights = (torch.randn(n, channels, generator=generator) for n in (2, 2 * targets))
        features = values[:, :, None, None].expand(2, channels, side, side).contiguous()
        for layout in (torch.contiguous_format, torch.channels_last):
            for reference in (None, torch.zeros_like(features[:1])):
                given = (features.contiguous(memory_format=layout), weights.view(2, targets, channels), reference)
                with fastcam.backend("cpp"):
                    maps, raw, _ = ops.cam_map_with_raw(*given, relu=False)
                assert torch.equal(raw, raw[..., :1, :1].expand_as(raw))
                assert not maps.any()
