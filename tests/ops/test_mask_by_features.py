"""`mask_by_features` against the float64 oracle of `fastcam/_testing/kernel_cases.py`: pair by pair, by matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastcam import _extension, ops
from fastcam._testing.kernel_cases import check_mask_by_features
from fastcam._testing.ops import DTYPES, LAYOUTS, make, usable_backends

BACKENDS = usable_backends()
ORDERS = ("resize_then_minmax", "minmax_then_resize")
OPCHECKED = (("contiguous", ORDERS[0]), ("channels_last", ORDERS[1]), ("sliced channels", ORDERS[0]))
OP = torch.ops.fastcam.mask_by_features.default


def check(images, features, *arguments, **options) -> None:
    """Values, dtype and layout, and that nothing but a fresh result came of it."""
    before = images.clone(), features.clone()
    result = ops.mask_by_features(images, features, *arguments, **options)
    check_mask_by_features(result, images, features, *arguments, **options)
    assert torch.equal(images, before[0])
    assert torch.equal(features, before[1])
    inputs = {x.untyped_storage().data_ptr() for x in (images, features) if x.numel()}
    assert not result.numel() or result.untyped_storage().data_ptr() not in inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_layouts_and_dtypes(backend, order, layout, dtype):
    images, features = make((2, 3, 19, 23), dtype, 1, layout), make((2, 5, 7, 6), dtype, 2, layout)
    check(images, features, order=order)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    noise = make((4, 19, 23), acc, 3, layout)
    check(images, features.to(acc), 3, 4, noise=noise, scale=0.3, order=order)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("image", "maps"),
    [
        ((3, 33, 17), (4, 7, 7)),
        ((1, 8, 8), (2, 8, 8)),  # no resize
        ((3, 5, 9), (2, 1, 1)),
        ((2, 1, 1), (2, 7, 7)),
        ((1, 1, 1), (1, 1, 1)),
        ((3, 9, 13), (2, 40, 33)),  # downwards
        ((3, 40, 5), (2, 7, 20)),  # up and down
        ((50, 6, 7), (2, 3, 3)),  # channels in vectors of their own
        ((31, 4, 40), (2, 3, 2)),
        ((3, 224, 224), (2, 14, 14)),
    ],
)
def test_sizes(backend, image, maps, order, layout):
    check(make((2, *image), torch.float32, 4, layout), make((2, *maps), torch.float32, 5, layout), order=order)


def test_formula_as_packages_write_it(backend):
    """`interpolate`, min-max and product, in PyTorch's own float64."""
    images, features = make((2, 3, 30, 40), torch.float64, 6), make((2, 4, 7, 7), torch.float64, 7)
    for b in range(2):
        for k in range(4):
            u = F.interpolate(features[b, k][None, None], (30, 40), mode="bilinear", align_corners=False)[0]
            expected = images[b] * (u - u.min()) / (u.max() - u.min())
            torch.testing.assert_close(ops.mask_by_features(images, features, 4 * b + k, 1)[0], expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("order", ORDERS)
def test_chunk_is_the_slice_of_the_whole(backend, order, layout):
    images, features = make((3, 3, 21, 22), torch.float32, 8, layout), make((3, 5, 7, 7), torch.float32, 9)
    noise = make((15, 21, 22), torch.float32, 10)
    whole = ops.mask_by_features(images, features, noise=noise, order=order)
    for start, count in ((0, 15), (0, 1), (4, 2), (7, 6), (14, 1), (10, None), (15, None), (3, 0)):
        rows = slice(start, 15 if count is None else start + count)
        chunk = ops.mask_by_features(images, features, start, count, noise=noise[rows], order=order)
        assert torch.equal(chunk, whole[rows])
        assert chunk.stride() == whole[rows].stride() or count is None or count <= 1


def test_images_of_a_sliced_channels_last_batch(backend):
    """Together they are neither layout, the chunk's only image is channels_last by itself."""
    images = make((4, 3, 6, 8), torch.float32, 11, "channels_last")[::2]
    check(images, make((2, 3, 4, 4), torch.float32, 12), 3, 2)


@pytest.mark.parametrize("value", [0.0, -3.0, 0.3, 1e-40])
@pytest.mark.parametrize("order", ORDERS)
def test_mask_of_a_constant_map_is_zero_before_noise(backend, order, value):
    images, features = make((1, 3, 20, 33), torch.float32, 13), torch.full((1, 2, 7, 7), value)
    result = ops.mask_by_features(images, features, order=order)
    assert torch.equal(result, torch.zeros_like(result))
    noise = make((2, 20, 33), torch.float32, 14)
    result = ops.mask_by_features(images, features, noise=noise, scale=0.5, order=order)
    torch.testing.assert_close(result, images * 0.5 * noise[:, None])


@pytest.mark.parametrize("shape", [(7, 7), (31, 224), (5, 3)])
def test_extremes_are_exactly_zero_and_one(backend, shape):
    for seed in range(20):
        masks = ops.mask_by_features(torch.ones(1, 1, *shape), make((1, 6, 7, 7), torch.float32, seed))
        assert masks.amin((1, 2, 3)).eq(0).all()
        assert masks.amax((1, 2, 3)).eq(1).all()


@pytest.mark.parametrize("order", ORDERS)
def test_subnormal_span_scales_to_unit_range(backend, order):
    features = torch.zeros(1, 1, 7, 7)
    features[0, 0, 3, 3] = 1e-40  # 1 / span overflows
    masks = ops.mask_by_features(torch.ones(1, 1, 7, 7), features, order=order)
    assert masks.max() == 1
    assert masks.min() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [(20, 20), (7, 7), (3, 3)])
@pytest.mark.parametrize("order", ORDERS)
def test_non_finite_map_makes_its_row_nan_and_no_other(backend, order, size, bad):
    images, features = make((2, 3, *size), torch.float32, 15), make((2, 3, 7, 7), torch.float32, 16)
    clean = ops.mask_by_features(images, features, order=order)
    features[0, 2, 3, 4] = bad
    features[1, 1] = bad  # constant as well
    result = ops.mask_by_features(images, features, order=order)
    assert result[[2, 4]].isnan().all()
    others = [0, 1, 3, 5]
    assert torch.equal(result[others], clean[others])


def test_non_finite_pixels_stay_where_they_are(backend):
    images, features = make((1, 3, 9, 9), torch.float32, 17), make((1, 2, 4, 4), torch.float32, 18)
    images[0, 1, 2, 3] = torch.nan
    result = ops.mask_by_features(images, features)
    assert result.isnan().nonzero().tolist() == [[0, 1, 2, 3], [1, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half_results_are_rounded_once_and_to_nearest_even(backend, layout, dtype):
    """Powers of two from below the subnormals to beyond the largest number, ties, infinities and NaN."""
    magnitudes = 2.0 ** torch.linspace(-30, 18, 1024, dtype=torch.float64)
    specials = torch.tensor([0.0, 65504.0, 1e38, torch.inf, torch.nan, 2.0**-24, 6.1e-5, 1.0], dtype=torch.float64)
    values = torch.cat([magnitudes, specials, -magnitudes, -specials]).to(dtype)
    images = LAYOUTS[layout](values.view(1, 3, -1, 8))
    features, noise = make((1, 1, 7, 7), dtype, 19), torch.full((1, *images.shape[2:]), 1 + 2.0**-9)
    features = features * 0  # a constant map: the mask is the noise
    for scale in (1.0, 1.5, 2.0**-9, 3.7):
        result = ops.mask_by_features(images, features, noise=noise, scale=scale)
        wide = ops.mask_by_features(images.float(), features.float(), noise=noise, scale=scale)
        expected = wide.to(dtype)
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),
                           expected.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf))  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty_batch_or_chunk(backend, layout):
    images = make((2, 3, 8, 9), torch.float32, 20, layout)
    features = make((2, 5, 4, 4), torch.float32, 21)
    for empty in (
        ops.mask_by_features(images[:0], features[:0]),
        ops.mask_by_features(images, features, 4, 0, noise=torch.zeros(0, 8, 9)),
        ops.mask_by_features(images, features, 10),
    ):
        assert empty.shape == (0, 3, 8, 9)
        assert empty.dtype == torch.float32


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_on_every_run_thread_count_and_batch(backend, layout):
    images, features = make((3, 3, 40, 41), torch.float32, 22, layout), make((3, 16, 14, 14), torch.float32, 23)
    first = ops.mask_by_features(images, features)
    assert all(torch.equal(first, ops.mask_by_features(images, features)) for _ in range(20))
    assert torch.equal(first[16:32], ops.mask_by_features(images[1:2], features[1:2]))
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, ops.mask_by_features(images, features))
    finally:
        torch.set_num_threads(threads)


def test_more_elements_than_int32(backend):
    """The last pair of features that hold one map lies beyond 2^31 elements."""
    k = 2**28 + 8
    features = make((1, 1, 2, 4), torch.bfloat16, 24).expand(1, k, 2, 4)
    images = make((1, 3, 4, 4), torch.bfloat16, 25)
    assert torch.equal(
        ops.mask_by_features(images, features, k - 1), ops.mask_by_features(images, features[:, :1], 0, 1)
    )


X, A = torch.zeros(2, 3, 8, 9), torch.zeros(2, 5, 4, 4)
ERRORS = [
    ({"images": [1]}, TypeError, "images must be a torch.Tensor, got list"),
    ({"images": X.int()}, TypeError, r"images must be .* got torch.int32; convert with .float\(\)"),
    ({"images": X[0]}, ValueError, r"images must be \(B,C,H,W\), got 3 dimensions: \(3, 8, 9\)"),
    ({"images": X[:, :0]}, ValueError, r"images need at least one .* got \(B,C,H,W\) = \(2, 0, 8, 9\)"),
    ({"images": X.to_sparse()}, TypeError, r"images must be a strided .* convert with .to_dense\(\)"),
    ({"features": A[..., :0]}, ValueError, r"features need at least one .* \(2, 5, 4, 0\)"),
    ({"features": A[:1]}, ValueError, r"one batch size, got images \(2, 3, 8, 9\) and features \(1, 5, 4, 4\)"),
    ({"features": A.double()}, TypeError, "features must be torch.float32 like the images, got torch.float64"),
    (
        {"images": X.half(), "features": A.bfloat16()},
        TypeError,
        "features must be torch.float16 or torch.float32 like the images, got torch.bfloat16",
    ),
    ({"features": A.to("meta")}, ValueError, "features is on meta, images on cpu"),
    ({"start": -1}, ValueError, r"start must be in 0..10, the number of \(image, channel\) pairs, got -1"),
    ({"start": 11}, ValueError, r"start must be in 0..10, .* got 11"),
    ({"start": 1.0}, TypeError, "start must be an integer, got 1.0"),
    ({"start": None}, TypeError, "start must be an integer, got None"),
    ({"count": "3"}, TypeError, "count must be an integer, got '3'"),
    ({"count": True}, TypeError, "count must be an integer, got True"),
    ({"start": 4, "count": 7}, ValueError, r"count must be None or in 0..6, .* start = 4 on, of 10 in all, got 7"),
    ({"count": -1}, ValueError, r"count must be None or in 0..10, .* got -1"),
    ({"count": 2, "noise": torch.zeros(3, 8, 9)}, ValueError, r"noise must be \(2, 8, 9\), got \(3, 8, 9\)"),
    ({"count": 2, "noise": torch.zeros(2, 9, 8)}, ValueError, r"noise must be \(2, 8, 9\), got \(2, 9, 8\)"),
    ({"noise": torch.zeros(10, 8, 9).half()}, TypeError, "noise must be torch.float32 like the images"),
    ({"noise": 0.5}, TypeError, "noise must be a torch.Tensor, got float"),
    ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"scale": "1"}, TypeError, "scale must be a number, got '1'"),
    ({"order": "resize_then_min_max"}, ValueError, "unknown order .* did you mean 'resize_then_minmax'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match=message):
        ops.mask_by_features(**{"images": X, "features": A, **change})


BARE = [
    ({"features": A[:1]}, "one batch size, got 2 and 1"),
    ({"start": 11}, r"start must be in 0..10, got 11"),
    ({"start": 9, "count": 2}, r"count must be in 0..1, got 2"),
    ({"count": -1}, r"count must be in 0..10, got -1"),
    ({"noise": torch.zeros(9, 8, 9)}, r"noise must be \(10, 8, 9\), got \[9, 8, 9\]"),
    ({"scale": float("inf")}, "scale must be finite, got inf"),
    ({"order": "minmax"}, "unknown order 'minmax', expected resize_then_minmax or minmax_then_resize"),
]


@pytest.mark.skipif("cpp" not in BACKENDS, reason="extension not built")
@pytest.mark.parametrize(("change", "message"), BARE)
def test_bare_op_checks_too(change, message):
    with pytest.raises(ValueError, match=message):
        OP(**{"images": X, "features": A, **change})


@pytest.mark.parametrize("name", ["images", "features", "noise"])
def test_inputs_that_require_grad_are_refused(backend, name):
    inputs = {"images": X.clone(), "features": A.clone(), "noise": torch.zeros(10, 8, 9)}
    inputs[name].requires_grad_()
    message = r"not differentiable; detach the inputs, or call under torch.no_grad\(\)"
    for call in (ops.mask_by_features, OP):
        with pytest.raises(RuntimeError, match=message):
            call(**inputs)
        with torch.no_grad():
            call(**inputs)
        call(**{key: value.detach() for key, value in inputs.items()})


@pytest.mark.parametrize(("layout", "order"), OPCHECKED)
def test_opcheck(layout, order):
    images, features = make((2, 3, 9, 8), torch.float32, 26, layout), make((2, 5, 4, 6), torch.float32, 27, layout)
    noise = make((3, 9, 8), torch.float32, 28)
    torch.library.opcheck(OP, (images, features), {"order": order})
    torch.library.opcheck(OP, (images, features, 4, 3), {"noise": noise, "scale": 0.5, "order": order})
    torch.library.opcheck(OP, (images.half(), features, 4, 0), {"order": order})


def test_compiled_graph_is_whole_and_serves_other_chunks():
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def masked(images, features, start, count):
        return ops.mask_by_features(images, features, start, count) + 1

    compiled = torch.compile(masked, fullgraph=True, backend=counted, dynamic=True)
    for b, start, count in ((2, 3, 4), (3, 5, 7), (4, 2, 5)):
        images, features = make((b, 3, 9, 8), torch.float32, 29), make((b, 5, 4, 4), torch.float32, 30)
        torch.testing.assert_close(compiled(images, features, start, count), masked(images, features, start, count))
    assert len(graphs) == 1, "another chunk compiled again"


@pytest.mark.skipif(_extension.why_not() is not None, reason="extension not built")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 16), (torch.bfloat16, 32)])
def test_large_results_go_past_the_caches_and_their_memory_is_used_again(dtype, count, layout):
    """Odd sizes: no row but the first begins where a line of the caches does."""
    images = torch.randn(1, 3, 301, 299).to(dtype).contiguous(memory_format=layout)
    features = torch.randn(1, count, 5, 7).to(dtype)
    whole = ops.mask_by_features(images, features)
    assert whole.nbytes > 2**24
    for start in (0, 1, count // 2, count - 1):
        assert torch.equal(whole[start], ops.mask_by_features(images, features, start, 1)[0])
    where = whole.data_ptr()
    del whole
    assert ops.mask_by_features(images, features).data_ptr() == where
