"""The CUDA kernels themselves, run by an emulator of threads, barriers and shuffles where there is no GPU.

Oracle and tolerances: `fastcam/_testing/kernel_cases.py`. Needs only a C++ compiler (g++ 12 or newer); what it cannot
show is speed, real concurrency and alignment faults, which tests/gpu covers.
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

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
    lfi_attend_oracle,
    lfi_many_channels,
    overlay_arguments,
    perturb_arguments,
    relevance_arguments,
)

HERE = Path(__file__).resolve().parent
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
MODES = ("mean", "sum", "xgrad", "grad_cam_pp")
ALL = tuple(DTYPES)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas",
         "-Wno-unused-variable", f"-I{HERE / 'fake'}", f"-I{HERE.parents[1] / 'csrc'}", str(HERE / "emulate.cpp"),
         "-o", str(library)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def ints(kind, *values):
    return (kind * len(values))(*values)


def dense(x, channels_last):
    if x is None:
        return None
    x = x.flatten(0, 1) if x.dim() == 5 else x
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def cam_map(kernels, features, weights, reference=None, relu=True, normalize=True, size=None, channels_last=False):
    b, k, h, w = features.shape
    acc = torch.float64 if features.dtype == torch.float64 else torch.float32
    positional = weights.dim() >= 4
    lead = weights.shape[: -3 if positional else -1]
    out_h, out_w = size or (h, w)
    maps = torch.full((*lead, out_h, out_w), torch.nan, dtype=acc)
    raw = torch.full((*lead, h, w), torch.nan, dtype=acc)
    finite = torch.zeros(lead, dtype=torch.bool)
    f, r = dense(features, channels_last), dense(reference, channels_last)
    m = dense(weights, channels_last) if positional else weights.to(acc).contiguous()
    shared = reference is not None and reference.shape[0] == 1
    status = kernels.emulate_cam_map(
        DTYPES[features.dtype], pointer(f), pointer(r), pointer(m), pointer(maps), pointer(raw), pointer(finite),
        ints(ctypes.c_int64, b, lead[1] if len(lead) > 1 else 1, k, h, w, out_h, out_w),
        ints(ctypes.c_int, shared, positional, channels_last, relu, normalize),
    )  # fmt: skip
    assert status == 0
    return maps, raw, finite


def channel_weights(kernels, features, multipliers, reference=None, mode="mean", channels_last=False):
    b, k, h, w = features.shape
    acc = torch.float64 if features.dtype == torch.float64 else torch.float32
    lead = multipliers.shape[:-3]
    out = torch.full((*lead, k), torch.nan, dtype=acc)
    f, r, m = (dense(x, channels_last) for x in (features, reference, multipliers))
    shared = reference is not None and reference.shape[0] == 1
    status = kernels.emulate_channel_weights(
        DTYPES[features.dtype], pointer(f), pointer(r), pointer(m), pointer(out),
        ints(ctypes.c_int64, b, lead[1] if len(lead) > 1 else 1, k, h * w),
        ints(ctypes.c_int, shared, channels_last, MODES.index(mode)),
    )  # fmt: skip
    assert status == 0
    return out


def impute_linear(kernels, images, missing, iterations=20):
    out = torch.full(images.shape, torch.nan, dtype=images.dtype)
    status = kernels.emulate_impute_linear(
        DTYPES[images.dtype], pointer(images.contiguous()), pointer(missing), pointer(out),
        ints(ctypes.c_int64, *images.shape, iterations),
    )  # fmt: skip
    assert status == 0
    return out


def mask_by_features(
    kernels, images, features, start=0, count=None, *, noise=None, scale=1.0, order="resize_then_minmax"
):
    channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    k, h, w = features.shape[1:]
    count = features.shape[0] * k - start if count is None else count
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((count, *images.shape[1:]), dtype=images.dtype, memory_format=layout).fill_(torch.nan)
    acc = torch.float64 if images.dtype == torch.float64 else torch.float32
    noise = None if noise is None else noise.to(acc).contiguous()
    status = kernels.emulate_mask_by_features(
        DTYPES[images.dtype], features.dtype != images.dtype, pointer(images), pointer(features), pointer(noise),
        pointer(out), ints(ctypes.c_int64, count, start, k, h, w, *images.shape[2:], images.shape[1]),
        ints(ctypes.c_int64, *features.stride()), ctypes.c_double(scale),
        ints(ctypes.c_int, order == "minmax_then_resize", channels_last),
    )  # fmt: skip
    assert status == 0
    return out


def overlay(kernels, images, maps, table, alpha=0.8, signed=False, *, mean=(0.0,), std=(1.0,)):
    """For contiguous maps and dense images."""
    interleaved = not images.is_contiguous()
    b, c, h, w = images.shape
    out = torch.zeros((*maps.shape, 3), dtype=torch.uint8)
    numbers = [alpha, -1.0 if signed else 0.0, len(table) - 1, *(std * 3)[:3], *(mean * 3)[:3]]
    status = kernels.emulate_overlay(
        DTYPES[images.dtype], maps.dtype != images.dtype, pointers(images, maps, table), pointer(out),
        ints(ctypes.c_int64, b, maps.shape[1] if maps.dim() == 4 else 1, c, h * w), ints(ctypes.c_double, *numbers),
        interleaved,
    )  # fmt: skip
    assert status == 0
    return out


def perturb_by_rank(kernels, images, baseline, ranks, counts, *, keep=False):
    """For dense images; a plain baseline has one pixel."""
    channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    b, c, h, w = images.shape
    shape = (b * len(counts), c, h, w)
    out = torch.empty(shape, dtype=images.dtype, memory_format=layout).fill_(torch.nan)
    plain = baseline.shape[2:] == (1, 1)
    base = baseline.contiguous() if plain else baseline.contiguous(memory_format=layout)
    status = kernels.emulate_perturb_by_rank(
        images.element_size(), ranks.dtype == torch.int64, pointers(images, base, ranks), pointer(counts),
        pointer(out), ints(ctypes.c_int64, b, len(counts), c, h * w, 0 if len(base) == 1 else base[0].numel()),
        ints(ctypes.c_int, plain, channels_last, keep),
    )  # fmt: skip
    assert status == 0
    return out.unflatten(0, (b, -1))


def rescale_multipliers(kernels, multipliers, inputs, reference, negative_slope=0.0):
    """For contiguous tensors; a shared reference is read again for every image."""
    out = torch.full_like(multipliers, torch.nan)
    runs = 1 if reference.shape == inputs.shape else inputs.shape[0]
    status = kernels.emulate_rescale_multipliers(
        DTYPES[inputs.dtype], multipliers.dtype != inputs.dtype, pointer(multipliers), pointer(inputs),
        pointer(reference), pointer(out), ctypes.c_int64(runs), ctypes.c_int64(inputs.numel() // max(runs, 1)),
        ctypes.c_double(negative_slope),
    )  # fmt: skip
    assert status == 0
    return out


def pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def relevance_divide(kernels, relevance, divisor, factor=None, epsilon=1e-6):
    """These are for dense tensors of one memory order."""
    out = torch.full_like(relevance, torch.nan)
    status = kernels.emulate_relevance_divide(
        DTYPES[out.dtype], pointers(relevance, divisor, factor), pointer(out), ctypes.c_int64(out.numel()),
        ctypes.c_double(epsilon),
    )  # fmt: skip
    assert status == 0
    return out


def relevance_add(kernels, relevance, first, second, factor=None, epsilon=1e-6):
    out, other = torch.full_like(relevance, torch.nan), torch.full_like(relevance, torch.nan)
    status = kernels.emulate_relevance_add(
        DTYPES[out.dtype], pointers(relevance, first, second, factor), pointer(out), pointer(other),
        ctypes.c_int64(out.numel()), ctypes.c_double(epsilon),
    )  # fmt: skip
    assert status == 0
    return out, other


def relevance_split(kernels, relevance, output, positive, factor=None, *, rule, first=2.0, second=1.0, epsilon=1e-6):
    batch, channels, *spatial = relevance.shape
    last = not relevance.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty((batch, 2 * channels, *spatial), dtype=relevance.dtype, memory_format=layout).fill_(torch.nan)
    runs = relevance.numel() // channels if last else batch
    status = kernels.emulate_relevance_split(
        DTYPES[out.dtype], pointers(relevance, output, positive, factor), pointer(out),
        ints(ctypes.c_int64, runs, relevance.numel() // max(runs, 1)), RULES.index(rule),
        ints(ctypes.c_double, first, second, epsilon),
    )  # fmt: skip
    assert status == 0
    return out


def images(x):
    return ints(ctypes.c_int64, x.shape[0], x.numel() // max(x.shape[0], 1))


def relevance_budgets(kernels, relevance):
    acc = torch.float64 if relevance.dtype == torch.float64 else torch.float32
    out = torch.full((relevance.shape[0], 2), torch.nan, dtype=acc)
    dtype = DTYPES[relevance.dtype]
    assert kernels.emulate_relevance_budgets(dtype, pointer(relevance), pointer(out), images(relevance)) == 0
    return out


def relevance_equilibrium(kernels, relevance, budgets, divisors, ratio=2.0):
    out = torch.full_like(divisors, torch.nan)
    status = kernels.emulate_relevance_equilibrium(
        DTYPES[out.dtype], pointer(relevance), pointer(budgets), pointer(divisors), pointer(out), images(relevance),
        ctypes.c_double(ratio),
    )  # fmt: skip
    assert status == 0
    return out


def relevance_combine(kernels, inputs, parts, budgets, shift=True, threshold=0.0):
    out = torch.full_like(inputs, torch.nan)
    status = kernels.emulate_relevance_combine(
        DTYPES[out.dtype], pointer(inputs), pointer(parts), pointer(budgets), pointer(out), images(inputs), shift,
        ctypes.c_double(threshold),
    )  # fmt: skip
    assert status == 0
    return out


def similarity_weights(kernels, first, second, term="cosine", weighting="minmax", dissimilarity=False):
    """For embeddings with dense rows; one of them may have a single row."""
    rows, channels = max(len(first), len(second)), first.shape[1]
    acc = torch.float64 if first.dtype == torch.float64 else torch.float32
    contributions, weights = (torch.full((rows, channels), torch.nan, dtype=acc) for _ in range(2))
    total = torch.full((rows,), torch.nan, dtype=acc)
    steps = [0 if len(x) == 1 else x.stride(0) for x in (first, second)]
    status = kernels.emulate_similarity_weights(
        DTYPES[first.dtype], pointer(first), pointer(second), pointer(contributions), pointer(weights), pointer(total),
        ints(ctypes.c_int64, rows, channels, *steps),
        ints(ctypes.c_int, TERMS.index(term), WEIGHTINGS.index(weighting), dissimilarity),
    )  # fmt: skip
    assert status == 0
    return contributions, weights, total


# (B, K, H, W), size: merged packs, one and several shares, odd sizes, one position, maps that need three launches.
SHAPES = [
    ((2, 130, 7, 7), (20, 24)),
    ((1, 512, 7, 7), None),
    ((2, 24, 14, 14), (5, 6)),
    ((1, 6, 17, 17), (33, 40)),
    ((3, 5, 13, 13), (9, 31)),
    ((2, 3, 1, 1), (3, 4)),
    ((2, 1, 3, 40), (6, 13)),
    ((1, 8, 28, 28), (28, 28)),
    ((1, 4, 70, 70), (100, 36)),
    ((1, 2, 66, 63), None),
]


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_cam_map(kernels, shape, size, channels_last, dtype):
    b, k, *_ = shape
    features = features_like(shape, dtype, 1)
    coefficients = features_like((b, k), torch.float32, 2)
    arguments = (features, coefficients, None, True, True, size)
    check_cam_map(cam_map(kernels, *arguments, channels_last=channels_last), *arguments)


#: Every two of height and width, reference, weights, order and dtype meet, and every order, reference and weights.
MIXED = [
    (hw, reference, weights, channels_last, ALL[(i + 2 * j + k + last) % 4])
    for i, hw in enumerate([(7, 7), (8, 6)])
    for j, reference in enumerate([None, 1, 2])
    for k, weights in enumerate(["BTK", "BKHW", "BTKHW"])
    for last, channels_last in enumerate([False, True])
]


@pytest.mark.parametrize(("hw", "reference", "weights", "channels_last", "dtype"), MIXED, ids=str)
def test_cam_map_weights_and_reference(kernels, hw, reference, weights, channels_last, dtype):
    b, k, t = 2, 40, 9
    shapes = {"BTK": (b, t, k), "BKHW": (b, k, *hw), "BTKHW": (b, 3, k, *hw)}
    features = features_like((b, k, *hw), dtype, 1)
    w = features_like(shapes[weights], torch.float32 if weights == "BTK" else dtype, 2)
    r = None if reference is None else features_like((reference, k, *hw), dtype, 3)
    arguments = (features, w, r, False, True, (16, 12))
    check_cam_map(cam_map(kernels, *arguments, channels_last=channels_last), *arguments)


@pytest.mark.parametrize("hw", [(7, 7), (70, 70)], ids=str)
@pytest.mark.parametrize("size", [None, (20, 11)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_cam_map_flat_and_non_finite(kernels, normalize, size, hw):
    features = features_like((6, 4, *hw), torch.float32)
    features[0] = 0.3  # constant, but not its rounded interpolation
    features[1] = 0.0
    features[2, 1, 3, 3] = torch.nan
    features[3, 2, 0, 1] = torch.inf
    features[4, 2, 2, 2] = -torch.inf  # ReLU hides it from raw, not from the flag
    weights = torch.ones(6, 4)
    maps, raw, finite = cam_map(kernels, features, weights, None, True, normalize, size)
    assert finite.tolist() == [True, True, False, False, False, True]
    assert raw[2, 3, 3].isnan()
    assert raw[4].isfinite().all()
    if normalize:
        assert maps[:2].count_nonzero() == 0
        assert maps[2:5].isnan().all()
        check_cam_map((maps[5:], raw[5:], finite[5:]), features[5:], weights[5:], None, True, True, size)


def test_cam_map_is_bit_equal_in_any_batch(kernels):
    features, weights = features_like((3, 300, 7, 7), torch.float32), features_like((3, 300), torch.float32, 2)
    together = cam_map(kernels, features, weights, size=(20, 20))
    alone = cam_map(kernels, features[1:2], weights[1:2], size=(20, 20))
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(2, 90, 7, 7), (2, 9, 14, 14), (1, 4, 17, 20), (2, 67, 1, 1), (1, 3, 65, 70)], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_channel_weights(kernels, mode, shape, channels_last, dtype):
    b, k, h, w = shape
    # Positive features keep the denominators of Grad-CAM++ and XGrad away from their poles.
    features = features_like(shape, dtype, 1).abs()
    targets = 2 if k < 10 else 1
    multipliers = features_like((b, targets, k, h, w), dtype, 2)
    reference = features_like((1, k, h, w), dtype, 3) / 8 if mode == "sum" else None
    arguments = (features, multipliers, reference, mode)
    check_channel_weights(channel_weights(kernels, *arguments, channels_last=channels_last), *arguments)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mode", ["xgrad", "grad_cam_pp"])
def test_channel_weights_guards(kernels, mode, channels_last):
    features, multipliers = torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    features[0, 0, :2] = -1  # S = 0
    features[0, 1] = -0.125  # S = -2, denominator 0
    features[0, 2, :2] = -1
    features[0, 2, 0, 0] += 2**-17  # S = 2^-17, cancellation noise beside a magnitude of 16
    got = channel_weights(kernels, features, multipliers, None, mode, channels_last)
    assert got[0, 0] == (0 if mode == "xgrad" else 8)
    assert got[0, 1] == (1 if mode == "xgrad" else 0)
    assert got[0, 2] == 0 or mode != "xgrad"
    check_channel_weights(got, features, multipliers, None, mode)


# (B, C, H, W), (K, h, w): packs and single elements, one and several tiles, up, down and no resize, single positions.
MASKED = [
    ((2, 3, 24, 20), (5, 7, 6)),
    ((1, 3, 40, 56), (3, 14, 14)),
    ((2, 5, 9, 7), (2, 20, 17)),
    ((1, 20, 33, 33), (2, 4, 4)),
    ((1, 1, 8, 8), (2, 8, 8)),
    ((2, 2, 1, 1), (3, 2, 2)),
    ((1, 3, 5, 6), (2, 1, 1)),
]


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("order", ["resize_then_minmax", "minmax_then_resize"])
@pytest.mark.parametrize(("shape", "maps"), MASKED, ids=str)
def test_mask_by_features(kernels, shape, maps, order, layout, dtype):
    images = LAYOUTS[layout](features_like(shape, dtype, 1))
    other = "channels_last" if layout == "contiguous" else "sliced"
    features = LAYOUTS[other](features_like((shape[0], *maps), dtype, 2))
    noise = features_like((shape[0] * maps[0], *shape[2:]), dtype, 3)
    options = {"noise": noise, "scale": 0.7, "order": order}
    whole = mask_by_features(kernels, images, features, **options)
    check_mask_by_features(whole, images, features, **options)
    wide = features.to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"noise": noise[1:2], "scale": 0.7, "order": order}
    assert torch.equal(mask_by_features(kernels, images, wide, 1, 1, **options), whole[1:2])


@pytest.mark.parametrize("order", ["resize_then_minmax", "minmax_then_resize"])
def test_mask_by_features_flat_and_non_finite(kernels, order):
    images, features = torch.ones(1, 3, 20, 11), features_like((1, 6, 7, 7), torch.float32)
    features[0, 0] = 0.3  # constant, but not its rounded interpolation
    features[0, 1, 3, 3] = torch.nan
    features[0, 2, 0, 1] = torch.inf
    features[0, 3] = -torch.inf
    got = mask_by_features(kernels, images, features, order=order)
    assert got[0].count_nonzero() == 0
    assert got[1:4].isnan().all()
    assert got[4:].amin() >= 0
    assert got[4:].amax() <= 1
    if order == "resize_then_minmax":
        assert got[4:].amin((1, 2, 3)).eq(0).all()
        assert got[4:].amax((1, 2, 3)).eq(1).all()


# Whole packs, partial ones, runs that begin between packs, several blocks.
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.01, -1.5])
@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (3, 5, 7, 7), (2, 3001), (5,)], ids=str)
def test_rescale_multipliers(kernels, shape, slope, wide, dtype):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    multipliers, inputs = features_like(shape, acc if wide else dtype, 1), features_like(shape, dtype, 2)
    for batch in (1, shape[0]):
        arguments = multipliers, inputs, features_like((batch, *shape[1:]), dtype, 3), slope
        check_rescale_multipliers(rescale_multipliers(kernels, *arguments), *arguments)


@pytest.mark.slow
def test_rescale_multipliers_of_more_runs_than_a_grid_is_high(kernels):
    shape = (65537, 2)
    arguments = features_like(shape, torch.float32, 1), features_like(shape, torch.float32, 2), torch.ones(1, 2)
    check_rescale_multipliers(rescale_multipliers(kernels, *arguments), *arguments)


@pytest.mark.parametrize("offset", [1, 2])
def test_rescale_multipliers_off_the_pack_alignment(kernels, offset):
    arguments = [features_like((100 + offset,), torch.float32, seed)[offset:] for seed in range(3)]
    check_rescale_multipliers(rescale_multipliers(kernels, *arguments), *arguments)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_rescale_multipliers_of_odd_values(kernels, slope, dtype):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
    inputs, reference = (x.contiguous() for x in torch.broadcast_tensors(odd[:, None], odd[None]))
    arguments = torch.full_like(inputs, 3.0), inputs, reference, slope
    check_rescale_multipliers(rescale_multipliers(kernels, *arguments), *arguments)


RELEVANCE = {
    "relevance_divide": relevance_divide,
    "relevance_add": relevance_add,
    "relevance_split": relevance_split,
    "relevance_budgets": relevance_budgets,
    "relevance_equilibrium": relevance_equilibrium,
    "relevance_combine": relevance_combine,
}
ELEMENTWISE = ("relevance_divide", "relevance_add", "relevance_split")
# Whole packs, partial ones, runs that begin between packs, several runs a block, several blocks a run, several chunks.
RELEVANCE_SHAPES = [(2, 8, 4, 4), (3, 5, 7, 7), (2, 3001), (70, 10), (1, 1), (2, 3, 54, 53), (2, 40, 2, 3), (1, 8195)]


def relevance_options(op):
    return [{"rule": rule} for rule in RULES] if op == "relevance_split" else [{}]


def check_relevance(kernels, op, *arguments, **options):
    RELEVANCE_CHECKS[op](RELEVANCE[op](kernels, *arguments, **options), *arguments, **options)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("shape", RELEVANCE_SHAPES, ids=str)
@pytest.mark.parametrize("op", RELEVANCE)
def test_relevance(kernels, op, shape, dtype):
    for options in relevance_options(op):
        tensors = relevance_arguments(op, shape, dtype)
        check_relevance(kernels, op, *tensors, **options)
        if op in ELEMENTWISE:
            check_relevance(kernels, op, *tensors, features_like(shape, dtype, 9), **options)
        if op == "relevance_split" and len(shape) == 4:
            last = (x.contiguous(memory_format=torch.channels_last) for x in tensors)
            check_relevance(kernels, op, *last, **options)


@pytest.mark.parametrize("epsilon", [0.0, 0.25])
def test_relevance_with_other_numbers(kernels, epsilon):
    tensors = {op: relevance_arguments(op, (2, 300), torch.float32) for op in RELEVANCE}
    for op in ("relevance_divide", "relevance_add"):
        check_relevance(kernels, op, *tensors[op], None, epsilon)
    for rule in RULES:
        numbers = {"rule": rule, "first": 0.25, "second": 0.1, "epsilon": epsilon}
        check_relevance(kernels, "relevance_split", *tensors["relevance_split"], **numbers)
    check_relevance(kernels, "relevance_equilibrium", *tensors["relevance_equilibrium"], 0.3)
    check_relevance(kernels, "relevance_combine", *tensors["relevance_combine"], epsilon > 0, 0.1)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_relevance_of_odd_values(kernels, dtype):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -0.5], dtype=dtype)
    x, y = (v.contiguous() for v in torch.broadcast_tensors(odd[:, None], odd[None]))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    budgets = features_like((7, 2), acc).abs()
    budgets[0], budgets[1] = 0, torch.nan
    thrice = torch.cat([y, y, y])
    for epsilon in (0.0, 0.5):
        check_relevance(kernels, "relevance_divide", x, y, None, epsilon)
        check_relevance(kernels, "relevance_add", x, y, y.flip(1), None, epsilon)
        for rule in RULES:
            tensors = torch.broadcast_tensors(odd[:, None, None], odd[:, None], odd.abs())
            check_relevance(kernels, "relevance_split", *(v.contiguous() for v in tensors), rule=rule, epsilon=epsilon)
    check_relevance(kernels, "relevance_budgets", x)
    check_relevance(kernels, "relevance_equilibrium", x, budgets, thrice)
    for shift in (False, True):
        check_relevance(kernels, "relevance_combine", x, thrice, budgets, shift, 0.5)


def test_relevance_equilibrium_of_an_image_all_but_gone(kernels):
    """The reciprocals of its budgets would be infinite."""
    small = torch.tensor([[1e-40, 0.0, -2e-40, 3e-41]])
    check_relevance(kernels, "relevance_equilibrium", small, torch.tensor([[1.3e-40, 2e-40]]), torch.ones(3, 4))


@pytest.mark.parametrize("shift", [False, True])
def test_relevance_combine_with_nothing_to_take_away(kernels, shift):
    x, parts, budgets = relevance_arguments("relevance_combine", (4, 40), torch.float32)
    x[0] = -x[0].abs()
    parts[1] = 0
    budgets[2, 0] = 0
    check_relevance(kernels, "relevance_combine", x, parts, budgets, shift)


@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("op", RELEVANCE)
def test_relevance_off_the_pack_alignment(kernels, op, offset):
    aligned = relevance_arguments(op, (2, 120), torch.float32)
    tensors = [torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape) for x in aligned]
    check_relevance(kernels, op, *tensors, **relevance_options(op)[0])


@pytest.mark.parametrize("length", [8192 + 700, 8192 + 701])
def test_relevance_budgets_are_bit_equal_in_any_batch(kernels, length):
    r = features_like((3, length), torch.float32)
    together = relevance_budgets(kernels, r)
    for image in range(3):
        assert torch.equal(together[image : image + 1], relevance_budgets(kernels, r[image : image + 1]))


@pytest.mark.slow
def test_relevance_of_more_runs_than_a_grid_is_high(kernels):
    tensors = relevance_arguments("relevance_split", (65537, 129), torch.float32)  # a block takes one such run
    check_relevance(kernels, "relevance_split", *tensors, rule="rap")


def check_similarity(kernels, *arguments):
    check_similarity_weights(similarity_weights(kernels, *arguments), *arguments)


# A warp a row and a block a row, whole packs and partial ones, more rows than a block takes.
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("shape", [(9, 16), (3, 37), (1, 1), (2, 1024), (2, 1025), (2, 4100)], ids=str)
@pytest.mark.parametrize("term", TERMS)
def test_similarity_weights(kernels, term, shape, dtype):
    u, v = features_like(shape, dtype, 1), features_like(shape, dtype, 2)
    for weighting, dissimilarity in itertools.product(WEIGHTINGS, (False, True)):
        check_similarity(kernels, u, v, term, weighting, dissimilarity)
    check_similarity(kernels, u[:1], v, term)
    check_similarity(kernels, u, v[:1], term)


@pytest.mark.parametrize("channels", [50, 2000])
@pytest.mark.parametrize("term", TERMS)
def test_similarity_weights_of_odd_values(kernels, term, channels):
    u, v = (features_like((8, channels), torch.float32, seed) for seed in (1, 2))
    u[0, 3], v[1, 4], u[2, 5] = torch.nan, torch.inf, -torch.inf
    v[2, 5] = -torch.inf
    u[3] = 0
    u[4] = v[4]
    u[5, 1::2] = v[5, ::2] = 0
    u[6], v[6] = u[6] * 1e25, v[6] * 1e-25
    u[7], v[7] = u[7] * 1e18, v[7] * 1e18
    for weighting, dissimilarity in itertools.product(WEIGHTINGS, (False, True)):
        check_similarity(kernels, u, v, term, weighting, dissimilarity)


@pytest.mark.parametrize("channels", [40, 41, 2048, 2051])
def test_similarity_weights_are_bit_equal_in_any_batch_and_off_the_pack_alignment(kernels, channels):
    u, v = features_like((1, channels), torch.float32, 1), features_like((3, channels), torch.float32, 2)
    together = similarity_weights(kernels, u, v)
    shifted = torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape)
    wide = torch.cat([v, v], 1)[:, :channels]
    for same in ((u.expand_as(v).contiguous(), v), (u, shifted), (u, wide)):
        assert all(torch.equal(a, b) for a, b in zip(together, similarity_weights(kernels, *same), strict=True))
    for row in range(3):
        alone = similarity_weights(kernels, u, v[row : row + 1])
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(("inner", "outer"), [(7, 224), (7, 20), (14, 5), (31, 31), (224, 7), (1, 9), (9, 1), (97, 61)])
def test_first_output_inverts_the_source_row(kernels, inner, outer):
    rows = [kernels.source_row_f32(output, inner, outer) for output in range(outer)]
    for cell in range(inner + 1):
        assert kernels.first_output_f32(cell, inner, outer) == sum(row < cell for row in rows)


def lfi(kernels, op, *arguments):
    """For dense features and gradients of one memory order; maps and importances are widened as bindings do."""
    *given, constant_map = arguments if isinstance(arguments[-1], str) else (*arguments, None)
    like = {"lfi_mask_backward": (0, 1), "lfi_attend_backward": (0, 3)}.get(op, (0,))
    features = given[like[-1]]
    acc = torch.float64 if features.dtype == torch.float64 else torch.float32
    tensors = [x if x is None or i in like else x.to(acc) for i, x in enumerate(given)]
    b, k, h, w = features.shape
    results = [torch.full_like(features, torch.nan)]
    if op == "lfi_attend":
        results += [torch.full((b, 1, h, w), torch.nan, dtype=acc) for _ in range(2)]
    if op == "lfi_attend_backward":
        results.append(torch.full((b, k), torch.nan, dtype=acc))
    status = getattr(kernels, f"emulate_{op}")(
        DTYPES[features.dtype], pointers(*tensors), pointers(*results), ints(ctypes.c_int64, b, k, h * w),
        not features.is_contiguous(), *([] if "mask" in op else [constant_map != "zeros"]),
    )  # fmt: skip
    assert status == 0
    return results if len(results) > 1 else results[0]


# Whole packs, odd sizes, more channels than a block's, a map of several shares, one channel, one position.
LFI_SHAPES = [
    (3, 12, 4, 4),
    (3, 35, 7, 7),
    (2, 130, 7, 7),
    (2, 9, 14, 13),
    (1, 40, 17, 20),
    (2, 1, 3, 5),
    (3, 67, 1, 1),
]


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 5, 7), (1, 3, 1, 1), (1, 3, 33, 40)], ids=str)
def test_overlay(kernels, shape, layout, dtype):
    for targets, signed in itertools.product((0, 2), (False, True)):
        images, maps, table = overlay_arguments(shape, dtype, targets=targets, signed=signed)
        images = LAYOUTS[layout](images)
        options = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        for given, more in (((images, maps), {}), ((images[:, :1].contiguous(), maps.to(table.dtype)), options)):
            arguments = (*given, table, 0.7, signed)
            check_overlay(overlay(kernels, *arguments, **more), *arguments, **more)


# Whole packs and partial ones, one pixel, many channels, several blocks of an image.
@pytest.mark.parametrize("ranks", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 5, 7), (3, 1, 1, 1), (1, 20, 4, 4), (1, 3, 33, 40)], ids=str)
def test_perturb_by_rank(kernels, shape, layout, dtype, ranks):
    for plain, keep in itertools.product((False, True), repeat=2):
        arguments = perturb_arguments(shape, dtype, layout, plain, ranks)
        check_perturb_by_rank(perturb_by_rank(kernels, *arguments, keep=keep), *arguments, keep=keep)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_perturb_by_rank_off_the_pack_alignment_and_with_one_baseline_for_all(kernels, layout):
    images, baseline, ranks, counts = perturb_arguments((2, 3, 4, 8), torch.float32, layout, False)
    shifted = torch.cat([ranks.new_zeros(1), ranks.flatten()])[1:].view(ranks.shape)
    for given in ((images, baseline[:1], ranks, counts), (images, baseline[1:], shifted, counts[:3])):
        check_perturb_by_rank(perturb_by_rank(kernels, *given), *given)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", LFI_SHAPES, ids=str)
@pytest.mark.parametrize("op", LFI_CHECKS)
def test_lfi(kernels, op, shape, layout, dtype):
    arguments = list(lfi_arguments(op, shape, dtype, layout))
    if op == "lfi_attend_backward":  # importances as the kernels return their gradients
        arguments[4] = arguments[4].to(arguments[5].dtype)
    LFI_CHECKS[op](lfi(kernels, op, *arguments), *arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("channels", "side"), [(512, 14), (2048, 7)])
def test_lfi_many_channels_cost_no_digits(kernels, channels, side, layout):
    features, importance = lfi_many_channels(channels, side, side, layout)
    attention = lfi(kernels, "lfi_attend", features, importance, "raw")[1]
    torch.testing.assert_close(attention.double(), lfi_attend_oracle(features, importance)[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("constant_map", ["raw", "zeros"])
def test_lfi_constant_and_non_finite(kernels, constant_map):
    features, importance = lfi_arguments("lfi_attend", (4, 5, 4, 6), torch.float32)
    features[2], importance[2] = 0.5, 1.0
    features[0, 1, 2, 3], features[3, 2, 1, 1] = torch.nan, torch.inf
    importance[0], importance[3] = 1.0, 1.0
    found = lfi(kernels, "lfi_attend", features, importance, constant_map)
    LFI_CHECKS["lfi_attend"](found, features, importance, constant_map)
    assert found[1].isnan().flatten(1).all(1).tolist() == [True, False, False, True]
    masks = lfi(kernels, "lfi_mask", features, features[:, :1].nan_to_num(posinf=1))
    assert masks.isnan().flatten(2).all(2).nonzero().tolist() == [[0, 1]]
    grad, *maps, _, _, _, _ = lfi_arguments("lfi_attend_backward", (4, 5, 4, 6), torch.float32)
    arguments = [grad[1:3], None, None, features[1:3], importance[1:3], found[1][1:3], found[2][1:3], constant_map]
    LFI_CHECKS["lfi_attend_backward"](lfi(kernels, "lfi_attend_backward", *arguments), *arguments)
    odd = [grad, *maps, features, importance, found[1], found[2], constant_map]
    assert lfi(kernels, "lfi_attend_backward", *odd)[0][[0, 3]].isnan().all()


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 9, 12), (1, 3, 3, 1), (2, 1, 17, 40)], ids=str)
def test_impute_linear(kernels, shape, dtype):
    images, missing = features_like(shape, dtype, 1), holes(shape[0], *shape[2:], 0)
    check_impute_linear(impute_linear(kernels, images, missing), images, missing)


def test_impute_linear_of_one_channel_alone_and_of_odd_values(kernels):
    images, missing = features_like((2, 3, 9, 12), torch.float32, 2), holes(2, 9, 12, 1)
    missing[:, 0] = False
    whole = impute_linear(kernels, images, missing)
    assert torch.equal(impute_linear(kernels, images[1:, 2:], missing[1:]), whole[1:, 2:])
    images[0, 1, 0, 11] = torch.inf
    images[1, 0][missing[1]] = torch.nan
    got = impute_linear(kernels, images, missing)
    assert got[0, 1][missing[0]].isnan().all()
    assert torch.equal(got[0, ::2], whole[0, ::2])
    assert torch.equal(got[1], whole[1])


@pytest.mark.parametrize("op", LFI_CHECKS)
def test_lfi_is_bit_equal_in_any_batch(kernels, op):
    arguments = lfi_arguments(op, (3, 300, 7, 7), torch.float32)
    together, alone = (lfi(kernels, op, *x) for x in (arguments, [x[1:2] for x in arguments]))
    pairs = zip(together, alone, strict=True) if isinstance(together, list) else [(together, alone)]
    assert all(torch.equal(a[1:2], b) for a, b in pairs)
