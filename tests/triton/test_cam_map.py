"""Triton's `cam_map` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_cam_map, features_like

kernel = importlib.import_module("fastcam.kernels.cam_map")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments):
    check_cam_map(kernel.launch(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(layout, dtype):
    features = LAYOUTS[layout](features_like((2, 70, 7, 7), dtype, 1))
    weights = features_like((2, 70), torch.float64, 2).to(torch.float64 if dtype == torch.float64 else torch.float32)
    check(features, weights, None, True, True, (20, 24))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 3, 13, 17), (2, 65, 8, 8), (1, 300, 14, 14), (1, 2049, 2, 3)], ids=str
)
@pytest.mark.parametrize("size", [None, (5, 5), (20, 33), (1, 40)], ids=str)
def test_shapes_and_sizes(shape, size):
    check(features_like(shape, torch.float32, 1), features_like(shape[:2], torch.float32, 2), None, True, True, size)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reference", [None, 1, 2])
@pytest.mark.parametrize("weights", ["BK", "BTK", "BKHW", "BTKHW"])
def test_weights_reference_and_options(weights, reference, normalize, relu):
    b, k, h, w = 2, 33, 7, 6
    shape = {"BK": (b, k), "BTK": (b, 5, k), "BKHW": (b, k, h, w), "BTKHW": (b, 3, k, h, w)}[weights]
    r = None if reference is None else features_like((reference, k, h, w), torch.float32, 3)
    check(
        features_like((b, k, h, w), torch.float32, 1),
        features_like(shape, torch.float32, 2),
        r,
        relu,
        normalize,
        (9, 13),
    )


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_multipliers_in_another_layout_than_features(layout):
    features = features_like((2, 20, 7, 7), torch.float32, 1)
    check(features, LAYOUTS[layout](features_like((2, 2, 20, 7, 7), torch.float32, 2)), None, True, True, None)


def test_every_config():
    """Each row of the table is reached by the inputs it is for, and gives the right values there."""
    seen = set()
    for last, (h, w), targets in (
        (False, (7, 7), 1),
        (False, (14, 14), 1),
        (True, (7, 7), 1),
        (False, (7, 7), 5),
        (True, (7, 7), 5),
    ):
        channels = 40
        features = LAYOUTS["channels_last" if last else "contiguous"](features_like((1, channels, h, w), torch.float32))
        tile, _ = kernel.reduce_config(channels, h * w, targets, 1 if last else h * w, False)
        seen |= {name for name, row in kernel.REDUCE.items() if row is tile}
        weights = features_like((1, targets, channels) if targets > 1 else (1, channels), torch.float32, 2)
        check(features, weights, None, False, True, None)
    assert seen == set(kernel.REDUCE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_map_in_several_chunks_and_shares(layout):
    """More cells than one `_collect` program has, more outputs than one `_write` program."""
    features = LAYOUTS[layout](features_like((1, 260, 35, 33), torch.float32, 1))
    check(features, features_like((1, 260), torch.float32, 2), None, True, True, (70, 300))


def test_usual_upscaling():
    check(
        features_like((1, 64, 7, 7), torch.float32, 1),
        features_like((1, 64), torch.float32, 2),
        None,
        True,
        True,
        (224, 224),
    )


@pytest.mark.parametrize("size", [None, (20, 11)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_flat_and_non_finite_maps(normalize, size):
    features = features_like((6, 4, 7, 7), torch.float32)
    features[0] = 0.3  # constant, but not its rounded interpolation
    features[1] = -1.0
    features[2, 1, 3, 3] = torch.nan
    features[3, 2, 0, 1] = torch.inf
    features[4, 2, 2, 2] = -torch.inf  # ReLU hides it from raw, not from the flag
    weights = torch.ones(6, 4)
    maps, raw, finite = kernel.launch(features, weights, None, True, normalize, size)
    assert finite.tolist() == [True, True, False, False, False, True]
    assert raw[2, 3, 3].isnan()
    assert raw[3, 0, 1].isposinf()
    assert raw[4].isfinite().all()
    if normalize:
        assert maps[:2].count_nonzero() == 0
        assert maps[2:5].isnan().all()
        check_cam_map((maps[5:], raw[5:], finite[5:]), features[5:], weights[5:], None, True, True, size)


@pytest.mark.parametrize(
    ("features", "weights"), [((0, 4, 7, 7), (0, 4)), ((0, 4, 7, 7), (0, 3, 4)), ((2, 4, 7, 7), (2, 0, 4))]
)
def test_empty(features, weights):
    maps, raw, finite = kernel.launch(torch.empty(features), torch.empty(weights), None, True, True, (9, 8))
    assert maps.shape == (*weights[:-1], 9, 8)
    assert raw.shape == (*weights[:-1], 7, 7)
    assert finite.shape == weights[:-1]


def test_same_bits_again_and_in_any_batch():
    features, weights = features_like((3, 300, 7, 7), torch.float32, 1), features_like((3, 300), torch.float32, 2)
    together = kernel.launch(features, weights, None, True, True, (20, 20))
    for other in (kernel.launch(features, weights, None, True, True, (20, 20)) for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(together, other, strict=True))
    alone = kernel.launch(features[1:2], weights[1:2], None, True, True, (20, 20))
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def test_inputs_are_left_alone():
    features, weights = features_like((2, 9, 7, 7), torch.float32, 1), features_like((2, 9), torch.float32, 2)
    before = features.clone(), weights.clone()
    kernel.launch(features, weights, features[:1], True, True, (9, 9))
    assert torch.equal(features, before[0])
    assert torch.equal(weights, before[1])


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    features, weights = features_like((2, 9, 7, 7), torch.float32, 1), features_like((2, 9), torch.float32, 2)
    run = kernel._reduce.run
    monkeypatch.setattr(kernel._reduce, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        maps = fastcam.ops.cam_map(features, weights, size=(9, 9))
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(maps, fastcam.ops.cam_map(features, weights, size=(9, 9)))
