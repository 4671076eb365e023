"""The CUDA and Triton implementations on a real GPU: values, layouts, streams, graphs, devices, determinism.

Oracle and tolerances: `fastcam/_testing/kernel_cases.py`. `-k small` is the part to run under compute-sanitizer.
"""

import pytest
import torch

import fastcam
from fastcam._testing import fuzz
from fastcam._testing.imputation import check_impute_linear, holes
from fastcam._testing.kernel_cases import (
    LAYOUTS,
    LFI_CHECKS,
    RELEVANCE_CHECKS,
    RULES,
    TERMS,
    WEIGHTINGS,
    check_cam_map,
    check_channel_weights,
    check_mask_by_features,
    check_overlay,
    check_perturb_by_rank,
    check_rescale_multipliers,
    check_similarity_weights,
    features_like,
    lfi_arguments,
    overlay_arguments,
    perturb_arguments,
    relevance_arguments,
)
from fastcam.backends import implementation as implementation_of

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODES = ("mean", "sum", "xgrad", "grad_cam_pp")
ORDERS = ("resize_then_minmax", "minmax_then_resize")


@pytest.fixture(params=["cuda", "triton"])
def implementation(request):
    """Forces one of them; a machine without it skips and says why, as does one where the other is in force."""
    facts = fastcam.backends()
    reason = facts["available"][request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    if facts["chosen"] not in ("auto", request.param):
        pytest.skip(f"FASTCAM_BACKEND={facts['chosen']}")
    with fastcam.backend(request.param):
        yield request.param


def values(shape, dtype=torch.float32, seed=0, layout="contiguous", device="cuda"):
    return LAYOUTS[layout](features_like(shape, dtype, seed, device))


def cam_map(features, weights, reference=None, relu=True, normalize=True, size=None):
    return fastcam.ops.cam_map_with_raw(features, weights, reference, relu, normalize, size)


def channel_weights(features, multipliers, reference=None, mode="mean"):
    return fastcam.ops.channel_weights(features, multipliers, reference, mode)


SHAPES = [
    (1, 1, 1, 1), (3, 3, 13, 17), (1, 512, 7, 7), (8, 2048, 7, 7), (2, 100, 14, 14), (2, 31, 17, 17), (1, 2049, 2, 3),
    (2, 64, 28, 28), (1, 16, 65, 63), (1, 3, 130, 110), (3, 20, 31, 31),
]  # fmt: skip


NATIVE = ("contiguous", "channels_last")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [None, (224, 224), (5, 9)], ids=str)
def test_cam_map(implementation, shape, size, layout, dtype):
    arguments = (values(shape, dtype, 1, layout), values(shape[:2], seed=2), None, True, True, size)
    check_cam_map(cam_map(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 65, 7, 7), (2, 100, 14, 14)], ids=str)
def test_small_cam_map_layouts_and_dtypes(implementation, shape, layout, dtype):
    weights = values(shape[:2], torch.float64 if dtype == torch.float64 else torch.float32, 2)
    arguments = (values(shape, dtype, 1, layout), weights, None, True, True, (20, 24))
    check_cam_map(cam_map(*arguments), *arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("weights", ["BK", "BTK", "BKHW", "BTKHW"])
@pytest.mark.parametrize("reference", [None, 1])
@pytest.mark.parametrize("hw", [(7, 7), (12, 8), (66, 66)], ids=str)
def test_small_cam_map_weights(implementation, hw, reference, weights, layout, dtype):
    b, k = 2, 72
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    shape = {"BK": (b, k), "BTK": (b, 10, k), "BKHW": (b, k, *hw), "BTKHW": (b, 3, k, *hw)}[weights]
    w = values(shape, acc, 2) if len(shape) < 4 else values(shape, dtype, 2, layout)
    r = None if reference is None else values((reference, k, *hw), dtype, 3)
    arguments = (values((b, k, *hw), dtype, 1, layout), w, r, False, True, (20, 24))
    check_cam_map(cam_map(*arguments), *arguments)


@pytest.mark.parametrize("hw", [(7, 7), (70, 70)], ids=str)
@pytest.mark.parametrize("size", [None, (20, 11)], ids=str)
def test_small_flat_and_non_finite_maps(implementation, size, hw):
    features = values((5, 4, *hw))
    features[0] = 0.3
    features[1, 1, 3, 3] = torch.nan
    features[2, 2, 0, 1] = torch.inf
    features[3, 2, 2, 2] = -torch.inf
    maps, raw, finite = cam_map(features, torch.ones(5, 4, device="cuda"), size=size)
    assert finite.tolist() == [True, False, False, False, True]
    assert maps[0].count_nonzero() == 0
    assert maps[1:4].isnan().all()
    assert raw[1, 3, 3].isnan()
    assert maps[4].amin() == 0
    assert maps[4].amax() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_small_channel_weights_layouts_and_dtypes(implementation, mode, layout, dtype):
    arguments = (values((2, 65, 7, 7), dtype, 1, layout).abs(), values((2, 65, 7, 7), dtype, 2, layout), None, mode)
    check_channel_weights(channel_weights(*arguments), *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_channel_weights(implementation, mode, shape, layout, dtype):
    b, k, h, w = shape
    # Positive features keep the denominators of Grad-CAM++ and XGrad away from their poles.
    features = values(shape, dtype, 1, layout).abs()
    multipliers = values((b, 2, k, h, w) if k < 100 else shape, dtype, 2, layout)
    reference = values((1, k, h, w), dtype, 3) / 8 if mode == "sum" else None
    check_channel_weights(
        channel_weights(features, multipliers, reference, mode), features, multipliers, reference, mode
    )


@pytest.mark.parametrize("mode", MODES)
def test_small_channel_weights_with_wide_multipliers(implementation, mode):
    features, multipliers = values((2, 9, 7, 7), torch.bfloat16, 1).abs(), values((2, 9, 7, 7), seed=2)
    check_channel_weights(channel_weights(features, multipliers, None, mode), features, multipliers, None, mode)


mask_by_features = fastcam.ops.mask_by_features


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_small_mask_by_features_layouts_and_dtypes(implementation, order, layout, dtype):
    images, features = values((2, 3, 20, 24), dtype, 1, layout), values((2, 5, 7, 6), dtype, 2, layout)
    wide = features.to(torch.float64 if dtype == torch.float64 else torch.float32)
    noise = values((4, 20, 24), dtype, 3, layout)
    for arguments, options in (((features,), {}), ((wide, 3, 4), {"noise": noise, "scale": 1 / 3})):
        got = mask_by_features(images, *arguments, **options, order=order)
        check_mask_by_features(got, images, *arguments, **options, order=order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("image", "maps"),
    [
        ((3, 224, 224), (64, 7, 7)), ((3, 224, 224), (3, 56, 56)), ((1, 1, 1), (2, 1, 1)), ((3, 33, 17), (9, 4, 4)),
        ((3, 32, 32), (2, 130, 110)), ((40, 14, 14), (3, 14, 14)), ((5, 3, 400), (4, 7, 7)),
    ],
    ids=str,
)  # fmt: skip
def test_mask_by_features(implementation, image, maps, order, layout, dtype):
    images, features = values((2, *image), dtype, 1, layout), values((2, *maps), dtype, 2, layout)
    check_mask_by_features(mask_by_features(images, features, order=order), images, features, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_small_flat_and_non_finite_masks(implementation, order):
    images, features = torch.ones(1, 3, 20, 11, device="cuda"), values((1, 6, 7, 7))
    features[0, 0] = 0.3
    features[0, 1, 3, 3] = torch.nan
    features[0, 2, 0, 1] = torch.inf
    features[0, 3] = -torch.inf
    got = mask_by_features(images, features, order=order)
    assert got[0].count_nonzero() == 0
    assert got[1:4].isnan().all()
    assert got[4:].amin() >= 0
    assert got[4:].amax() <= 1
    if order == "resize_then_minmax":
        assert got[4:].amin((1, 2, 3)).eq(0).all()
        assert got[4:].amax((1, 2, 3)).eq(1).all()


@pytest.mark.parametrize("layout", NATIVE)
def test_masked_chunks_are_slices_of_the_whole(implementation, layout):
    images, features = values((3, 3, 65, 64), seed=1, layout=layout), values((3, 20, 14, 14), seed=2)
    whole = mask_by_features(images, features)
    for _ in range(20):
        assert torch.equal(whole, mask_by_features(images, features))
    assert torch.equal(whole[13:47], mask_by_features(images, features, 13, 34))


def test_small_bare_op_takes_its_keywords(implementation):
    """Through the dispatcher, whichever implementation is on the CUDA key."""
    images, features = values((1, 3, 20, 20), seed=1), values((1, 4, 7, 7), seed=2)
    options = {"noise": values((2, 20, 20), seed=3), "scale": 0.5, "order": "minmax_then_resize"}
    got = torch.ops.fastcam.mask_by_features(images, features, 1, 2, **options)
    check_mask_by_features(got, images, features, 1, 2, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 12, 14), (1, 3, 33, 17), (1, 3, 224, 224)], ids=str)
def test_small_overlay(implementation, shape, layout, dtype):
    options = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    for targets, signed in ((0, False), (3, True)):
        images, maps, table = (x.cuda() for x in overlay_arguments(shape, dtype, "contiguous", targets, signed))
        images, maps = LAYOUTS[layout](images), LAYOUTS[layout](maps.unsqueeze(1)).squeeze(1)
        for given, more in (((images, maps), {}), ((images[:, :1], maps.to(table.dtype)), options)):
            arguments = (*given, table, 0.7, signed)
            check_overlay(fastcam.ops.overlay(*arguments, **more), *arguments, **more)


perturb_by_rank = fastcam.ops.perturb_by_rank


@pytest.mark.parametrize("ranks", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plain", [False, True])
def test_small_perturb_by_rank_layouts_and_dtypes(implementation, plain, layout, dtype, ranks):
    arguments = [x.cuda() for x in perturb_arguments((2, 3, 12, 14), dtype, "contiguous", plain, ranks)]
    arguments[0] = LAYOUTS[layout](arguments[0])
    for keep in (False, True):
        check_perturb_by_rank(perturb_by_rank(*arguments, keep=keep), *arguments, keep=keep)


@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("shape", [(2, 3, 224, 224), (1, 512, 7, 7), (3, 1, 1, 1), (2, 3, 33, 17)], ids=str)
def test_perturb_by_rank(implementation, shape, layout):
    images, *others = (x.cuda() for x in perturb_arguments(shape, torch.float32))
    images = LAYOUTS[layout](images)
    check_perturb_by_rank(perturb_by_rank(images, *others), images, *others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope", [0.0, 0.01])
@pytest.mark.parametrize("batch", [1, 3])
def test_small_rescale_multipliers_layouts_and_dtypes(implementation, batch, slope, layout, dtype):
    shape = (3, 65, 7, 7)
    inputs, reference = values(shape, dtype, 1, layout), values((batch, *shape[1:]), dtype, 2, layout)
    for multipliers in (
        values(shape, dtype, 3, layout),
        values(shape, seed=3).to(torch.promote_types(dtype, torch.float32)),
    ):
        arguments = multipliers, inputs, reference, slope
        check_rescale_multipliers(fastcam.ops.rescale_multipliers(*arguments), *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(5,), (64, 10), (33, 4096), (2, 197, 768), (1, 3, 5, 6, 7), (70000, 300), *SHAPES], ids=str
)
def test_rescale_multipliers(implementation, shape, dtype):
    for batch in (1, shape[0]):
        arguments = values(shape, dtype, 1), values(shape, dtype, 2), values((batch, *shape[1:]), dtype, 3), 0.01
        check_rescale_multipliers(fastcam.ops.rescale_multipliers(*arguments), *arguments)


def test_small_rescale_multipliers_of_odd_values(implementation):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0], device="cuda")
    arguments = torch.full((7, 7), 3.0, device="cuda"), odd[:, None].expand(7, 7), odd[None].expand(7, 7), 0.25
    check_rescale_multipliers(fastcam.ops.rescale_multipliers(*arguments), *arguments)


def check_relevance(op, *arguments, **options):
    RELEVANCE_CHECKS[op](getattr(fastcam.ops, op)(*arguments, **options), *arguments, **options)


def relevance_options(op):
    return [{"rule": rule} for rule in RULES] if op == "relevance_split" else [{}]


ELEMENTWISE = ("relevance_divide", "relevance_add", "relevance_split")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", RELEVANCE_CHECKS)
def test_small_relevance_layouts_and_dtypes(implementation, op, layout, dtype):
    shape = (3, 65, 7, 7)
    for options in relevance_options(op):
        tensors = relevance_arguments(op, shape, dtype, layout, device="cuda")
        check_relevance(op, *tensors, **options)
        if op in ELEMENTWISE:
            check_relevance(op, *tensors, values(shape, dtype, 9), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("op", RELEVANCE_CHECKS)
def test_relevance(implementation, op, layout, dtype):
    for shape in SHAPES:
        for options in relevance_options(op):
            check_relevance(op, *relevance_arguments(op, shape, dtype, layout, device="cuda"), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 10), (2, 197, 768), (1, 3, 5, 6, 7), (70000, 30), (1, 8192 * 300 + 5)], ids=str)
@pytest.mark.parametrize("op", RELEVANCE_CHECKS)
def test_relevance_of_other_than_images(implementation, op, shape, dtype):
    for options in relevance_options(op):
        check_relevance(op, *relevance_arguments(op, shape, dtype, device="cuda"), **options)


def test_small_relevance_of_odd_values(implementation):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -0.5], device="cuda")
    x, y = odd[:, None].expand(7, 7), odd[None].expand(7, 7)
    budgets = values((7, 2)).abs()
    budgets[0], budgets[1] = 0, torch.nan
    for epsilon in (0.0, 0.5):
        check_relevance("relevance_divide", x, y, None, epsilon)
        check_relevance("relevance_add", x, y, y.flip(1), None, epsilon)
        for rule in RULES:
            tensors = torch.broadcast_tensors(odd[:, None, None], odd[:, None], odd.abs())
            check_relevance("relevance_split", *tensors, rule=rule, epsilon=epsilon)
    check_relevance("relevance_budgets", x)
    check_relevance("relevance_equilibrium", x, budgets, torch.cat([y, y, y]))
    for shift in (False, True):
        check_relevance("relevance_combine", x, torch.cat([y, y, y]), budgets, shift, 0.5)


def lfi(op, *arguments):
    return implementation_of(op, "cuda")(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", LFI_CHECKS)
def test_small_lfi_layouts_and_dtypes(implementation, op, layout, dtype):
    for wide in (False, True):
        tensors = lfi_arguments(op, (3, 65, 7, 7), dtype, layout, wide, device="cuda")
        LFI_CHECKS[op](lfi(op, *tensors), *tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize(
    "shape", [(32, 64, 8, 8), (4, 512, 14, 14), (4, 2048, 7, 7), (2, 3, 65, 70), (3, 67, 1, 1)], ids=str
)
@pytest.mark.parametrize("op", LFI_CHECKS)
def test_lfi(implementation, op, shape, layout, dtype):
    tensors = lfi_arguments(op, shape, dtype, layout, device="cuda")
    LFI_CHECKS[op](lfi(op, *tensors), *tensors)
    alone = [x[1:2] for x in tensors]
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (lfi(op, *tensors), lfi(op, *alone))), strict=True)
    assert all(torch.equal(a[1:2], b) for a, b in pairs)


@pytest.mark.parametrize("shape", [(8, 512, 28, 28), (3, 100001)], ids=str)
def test_relevance_has_the_same_bits_fifty_times_and_in_any_batch(implementation, shape):
    r = values(shape, seed=1)
    x, parts, budgets = relevance_arguments("relevance_combine", shape, torch.float32, device="cuda")
    totals, combined = fastcam.ops.relevance_budgets(r), fastcam.ops.relevance_combine(x, parts, budgets)
    for _ in range(50):
        assert torch.equal(totals, fastcam.ops.relevance_budgets(r))
        assert torch.equal(combined, fastcam.ops.relevance_combine(x, parts, budgets))
    one = slice(1, 2)
    assert torch.equal(totals[one], fastcam.ops.relevance_budgets(r[one]))
    alone = fastcam.ops.relevance_combine(x[one], parts[1 :: len(x)], budgets[one])
    assert torch.equal(combined[one], alone)


def check_similarity(*arguments):
    check_similarity_weights(fastcam.ops.similarity_weights(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "channels_last"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("term", TERMS)
def test_small_similarity_weights_layouts_and_dtypes(implementation, term, weighting, layout, dtype):
    for shape in ((3, 40), (3, 37), (2, 2051)):
        u, v = values(shape, dtype, 1, layout), values(shape, dtype, 2, layout)
        for arguments in ((u, v), (u[:1], v), (u, v[1:2])):
            check_similarity(*arguments, term, weighting)
            check_similarity(*arguments, term, weighting, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (70001, 3), (1000, 2048), (64, 512), (5, 1024), (3, 1025), (2, 100003)], ids=str
)
def test_similarity_weights(implementation, shape, dtype):
    for term in TERMS:
        check_similarity(values(shape, dtype, 1), values(shape, dtype, 2), term)
        check_similarity(values((1, shape[1]), dtype, 1), values(shape, dtype, 2), term)


def test_small_similarity_weights_of_odd_values(implementation):
    for channels in (50, 3000):
        u, v = values((7, channels), seed=1), values((7, channels), seed=2)
        u[0, 3], v[1, 4], u[2, 5] = torch.nan, torch.inf, -torch.inf
        u[3] = 0
        u[4] = v[4]
        u[5], v[5] = u[5] * 1e25, v[5] * 1e-25
        for term in TERMS:
            for weighting in WEIGHTINGS:
                check_similarity(u, v, term, weighting)


@pytest.mark.parametrize("shape", [(33, 37), (64, 512), (33, 2051), (8, 4096)], ids=str)
def test_similarity_weights_have_the_same_bits_fifty_times_and_in_any_batch(implementation, shape):
    u, v = values((1, shape[1]), seed=1), values(shape, seed=2)
    for term in TERMS:
        together = fastcam.ops.similarity_weights(u, v, term)
        for _ in range(50):
            again = fastcam.ops.similarity_weights(u, v, term)
            assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
        expanded = fastcam.ops.similarity_weights(u.expand_as(v).contiguous(), v, term)
        assert all(torch.equal(a, b) for a, b in zip(together, expanded, strict=True))
        for one in (slice(1, 2), slice(3, 6)):
            alone = fastcam.ops.similarity_weights(u, v[one], term)
            assert all(torch.equal(a[one], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_impute_linear_layouts_and_dtypes(implementation, layout, dtype):
    for shape in ((5, 3, 13, 18), (6, 1, 33, 24), (5, 2, 3, 40)):
        images, missing = values(shape, dtype, 1, layout), holes(shape[0], *shape[2:], 0).cuda()
        check_impute_linear(fastcam.ops.impute_linear(images, missing, 20), images, missing)


def test_impute_linear_of_photographs_has_the_same_bits_in_any_batch(implementation):
    """More systems than are solved at once, a harmonic function of the known pixels."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 224, device="cuda")] * 2, indexing="ij")
    images = torch.stack([x + 2 * y, x * y, x - y]).expand(100, 3, 224, 224).contiguous()
    missing = (x.square() + y.square() < 0.9).expand(100, 224, 224).contiguous()
    got = fastcam.ops.impute_linear(images.where(~missing.unsqueeze(1), torch.nan), missing)
    assert (got - images).abs().max() < 2e-3
    assert torch.equal(got, got[:1].expand_as(got))
    assert torch.equal(fastcam.ops.impute_linear(images[:1, 1:2], missing[:1]), got[:1, 1:2])


@pytest.mark.parametrize("op", fuzz.CASES)
def test_fuzz(implementation, op):
    for seed in range(40):
        fuzz.run(op, seed, implementation)


def test_small_empty_batch(implementation):
    maps, raw, finite = cam_map(values((0, 4, 7, 7)), values((0, 3, 4)), size=(9, 8))
    assert (maps.shape, raw.shape, finite.shape) == ((0, 3, 9, 8), (0, 3, 7, 7), (0, 3))
    assert channel_weights(values((2, 4, 7, 7)), values((2, 0, 4, 7, 7))).shape == (2, 0, 4)
    assert mask_by_features(values((2, 3, 9, 9)), values((2, 4, 7, 7)), 8).shape == (0, 3, 9, 9)

    similarity = fastcam.ops.similarity_weights(values((1, 5)), values((0, 5)))
    assert [x.shape for x in similarity] == [(0, 5), (0, 5), (0,)]
    for shape in ((0, 4, 7, 7), (2, 0, 3)):
        empty = values(shape)
        assert fastcam.ops.rescale_multipliers(empty, empty, values((1, *shape[1:]))).shape == shape
        thrice, budgets = values((3 * shape[0], *shape[1:])), values((shape[0], 2))
        assert fastcam.ops.relevance_divide(empty, empty).shape == shape
        assert fastcam.ops.relevance_add(empty, empty, empty)[1].shape == shape
        assert fastcam.ops.relevance_split(empty, empty, empty, rule="rap").shape == (
            shape[0],
            2 * shape[1],
            *shape[2:],
        )
        assert torch.equal(fastcam.ops.relevance_budgets(empty), torch.zeros(shape[0], 2, device="cuda"))
        assert fastcam.ops.relevance_equilibrium(empty, budgets, thrice).shape == thrice.shape
        assert fastcam.ops.relevance_combine(empty, thrice, budgets).shape == shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_fifty_times_and_in_any_batch(implementation, layout):
    features, weights = values((8, 2048, 7, 7), seed=1, layout=layout), values((8, 2048), seed=2)
    first = cam_map(features, weights, size=(224, 224))
    coefficients = channel_weights(features, features, None, "xgrad")
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, cam_map(features, weights, size=(224, 224)), strict=True))
        assert torch.equal(coefficients, channel_weights(features, features, None, "xgrad"))
    one = cam_map(LAYOUTS[layout](features[3:4]), weights[3:4], size=(224, 224))
    assert all(torch.equal(a[3:4], b) for a, b in zip(first, one, strict=True))


def every_op(features, weights):
    maps, raw, finite = cam_map(features, weights, size=(32, 32))
    masked = mask_by_features(maps.unsqueeze(1), features, 200, 120, scale=0.5)
    rescaled = fastcam.ops.rescale_multipliers(features, features - 0.5, features[:1] - 1, 0.01)
    coefficients = channel_weights(features, features, None, "grad_cam_pp")
    similarity = fastcam.ops.similarity_weights(weights[:1], weights)
    return (
        maps,
        raw,
        finite,
        coefficients,
        masked,
        rescaled,
        *similarity,
        *every_relevance_op(features),
        *every_lfi_op(features),
    )


def every_relevance_op(x):
    message = fastcam.ops.relevance_divide(x - 0.5, x + 0.5, x)
    one, other = fastcam.ops.relevance_add(message, x, x + 1)
    both = fastcam.ops.relevance_split(one, x - 0.25, x, rule="alpha_beta")
    budgets = fastcam.ops.relevance_budgets(message)
    parts = fastcam.ops.relevance_equilibrium(message, budgets, torch.cat([x, x + 1, x + 2]))
    return message, one, other, both, budgets, parts, fastcam.ops.relevance_combine(x - 0.5, parts, budgets)


def every_lfi_op(x):
    grey, s = x[:, :1] + 1, x[:, :, 0, 0] - 0.5
    attended, attention, raw = lfi("lfi_attend", x, s)
    grads = lfi("lfi_attend_backward", x, attention, raw, x, s, attention, raw)
    return lfi("lfi_mask", x, grey), lfi("lfi_mask_backward", x, x, grey), attended, attention, raw, *grads


def test_graph_capture(implementation):
    features, weights = values((4, 256, 7, 7), seed=1).abs(), values((4, 256), seed=2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates outside the graph
        every_op(features, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every_op(features, weights)
    for seed in (3, 4):
        features.copy_(values((4, 256, 7, 7), seed=seed).abs())
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, every_op(features, weights), strict=True))


def test_current_stream(implementation):
    """The kernels must queue behind what the caller's stream still has to do."""
    source, weights = values((4, 256, 7, 7), seed=1).abs(), values((4, 256), seed=2)
    expected = every_op(source, weights)
    features = torch.full_like(source, torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        features.copy_(source)
        got = every_op(features, weights)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_no_synchronisation(implementation):
    features, weights = values((4, 256, 7, 7), seed=1).abs(), values((4, 256), seed=2)
    every_op(features, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        # on_nonfinite handling is the callers'; the ops themselves must not wait for the device.
        every_op(features, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_other_device_than_the_current_one(implementation):
    features, weights = values((2, 64, 7, 7), device="cuda:1", seed=1).abs(), values((2, 64), device="cuda:1", seed=2)
    got = every_op(features, weights)
    assert all(x.device == features.device for x in got)
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, every_op(features.to("cuda:0"), weights.to("cuda:0")), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(implementation):
    """12 GB: the last image starts beyond 2^31 elements and must equal itself alone."""
    features = torch.zeros((3, 2048, 724, 724), dtype=torch.float16, device="cuda")
    features[2].normal_()
    weights = values((3, 2048), seed=2)
    maps, raw, _ = cam_map(features, weights, size=(724, 724))
    one = cam_map(features[2:], weights[2:], size=(724, 724))
    assert torch.equal(maps[2:], one[0])
    assert torch.equal(raw[2:], one[1])
    assert raw[:2].count_nonzero() == 0
    sums = channel_weights(features, features, None, "sum")
    assert torch.equal(sums[2:], channel_weights(features[2:], features[2:], None, "sum"))
    alone = fastcam.ops.rescale_multipliers(features[2:], features[2:], features[:1])
    assert torch.equal(fastcam.ops.rescale_multipliers(features, features, features[:1])[2:], alone)
    assert torch.equal(fastcam.ops.relevance_budgets(features)[2:], fastcam.ops.relevance_budgets(features[2:]))
    alone = fastcam.ops.relevance_divide(features[2:], features[2:])
    assert torch.equal(fastcam.ops.relevance_divide(features, features)[2:], alone)


@pytest.mark.slow
@pytest.mark.parametrize("layout", NATIVE)
def test_relevance_of_results_beyond_2_to_the_31_elements(implementation, layout):
    """15 GB: the last image's results lie there and must equal those of the image alone."""
    features = torch.zeros((2, 2048, 600, 600), dtype=torch.float16, device="cuda")
    features[1].normal_()
    x = LAYOUTS[layout](features)
    split = fastcam.ops.relevance_split(x, x, x, rule="gamma")
    assert torch.equal(split[1:], fastcam.ops.relevance_split(x[1:], x[1:], x[1:], rule="gamma"))
    x = LAYOUTS[layout](features[:, :1024])
    del features, split
    budgets, divisors = torch.ones(2, 2, device="cuda"), torch.cat([x, x, x])
    parts = fastcam.ops.relevance_equilibrium(x, budgets, divisors)
    assert torch.equal(parts[1::2], fastcam.ops.relevance_equilibrium(x[1:], budgets[1:], divisors[1::2]))
    del divisors
    alone = fastcam.ops.relevance_combine(x[1:], parts[1::2], budgets[1:])
    assert torch.equal(fastcam.ops.relevance_combine(x, parts, budgets)[1:], alone)
