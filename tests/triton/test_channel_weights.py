"""Triton's `channel_weights` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_channel_weights, features_like

kernel = importlib.import_module("fastcam.kernels.channel_weights")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODES = ("mean", "sum", "xgrad", "grad_cam_pp")


def check(*arguments):
    check_channel_weights(kernel.launch(*arguments), *arguments)


def positive(shape, dtype, seed=1):
    """Keeps the denominators of Grad-CAM++ and XGrad away from their poles."""
    return features_like(shape, dtype, seed).abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layouts_and_dtypes(mode, layout, dtype):
    shape = (2, 35, 7, 7)
    arguments = LAYOUTS[layout](positive(shape, dtype)), LAYOUTS[layout](features_like(shape, dtype, 2))
    check(*arguments, None, mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_wide_multipliers(mode, dtype):
    check(positive((2, 5, 7, 7), dtype), features_like((2, 3, 5, 7, 7), torch.float32, 2), None, mode)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 3, 13, 17), (2, 65, 8, 8), (1, 9, 20, 19), (1, 2049, 2, 3)], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_shapes(mode, shape):
    check(positive(shape, torch.float32), features_like(shape, torch.float32, 2), None, mode)


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("reference", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_targets_and_reference(mode, reference, targets):
    shape = (2, 17, 6, 7)
    multipliers = features_like((2, targets, *shape[1:]) if targets else shape, torch.float32, 2)
    check(
        1 + positive(shape, torch.float32), multipliers, positive((reference, *shape[1:]), torch.float32, 3) / 8, mode
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_several_chunks(mode, layout):
    """More positions than a program takes, for two targets."""
    shape = (1, 5, 65, 67)
    multipliers = LAYOUTS[layout](features_like((1, 2, *shape[1:]), torch.float32, 2))
    check(LAYOUTS[layout](positive(shape, torch.float32)), multipliers, None, mode)


def test_every_config():
    seen = set()
    for last, side in ((False, 7), (False, 14), (False, 20), (True, 7)):
        shape = (1, 10, side, side)
        features = LAYOUTS["channels_last" if last else "contiguous"](features_like(shape, torch.float32))
        row = kernel.tile(shape[1], side * side, 1 if last else side * side)
        seen |= {name for name, known in kernel.TILES.items() if known is row}
        check(features, features_like(shape, torch.float32, 2), None, "sum")
    assert seen == set(kernel.TILES)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_guards(layout):
    features, multipliers = torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    features[0, 0, :2] = -1  # S = 0
    features[0, 1] = -0.125  # S = -2, denominator 0
    features[0, 2, :2] = -1
    features[0, 2, 0, 0] += 2**-17  # S = 2^-17, cancellation noise beside a magnitude of 16
    features = LAYOUTS[layout](features)
    assert kernel.launch(features, multipliers, None, "xgrad")[0].tolist() == [0, 1, 0]
    assert kernel.launch(features, multipliers, None, "grad_cam_pp")[0, :2].tolist() == [8, 0]


@pytest.mark.parametrize("mode", MODES)
def test_non_finite_values_stay_in_their_channel(mode):
    features, multipliers = positive((2, 4, 7, 7), torch.float32), features_like((2, 4, 7, 7), torch.float32, 2)
    features[0, 1, 2, 3] = torch.inf
    multipliers[1, 2, 3, 4] = torch.nan
    got = kernel.launch(features, multipliers, None, mode)
    assert got[1, 2].isnan()
    keep = torch.ones(2, 4, dtype=torch.bool)
    keep[1, 2] = keep[0, 1] = False
    assert got[keep].isfinite().all()
    check_channel_weights(got, features, multipliers, None, mode)


@pytest.mark.parametrize(("features", "multipliers"), [((0, 4, 7, 7), (0, 4, 7, 7)), ((2, 4, 7, 7), (2, 0, 4, 7, 7))])
def test_empty(features, multipliers):
    assert kernel.launch(torch.empty(features), torch.empty(multipliers), None, "sum").shape == multipliers[:-2]


def test_same_bits_again_and_in_any_batch():
    features, multipliers = positive((3, 40, 7, 7), torch.float32), features_like((3, 40, 7, 7), torch.float32, 2)
    for mode in MODES:
        together = kernel.launch(features, multipliers, None, mode)
        assert torch.equal(together, kernel.launch(features, multipliers, None, mode))
        assert torch.equal(together[1:2], kernel.launch(features[1:2], multipliers[1:2], None, mode))


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    features, multipliers = positive((2, 9, 7, 7), torch.float32), features_like((2, 9, 7, 7), torch.float32, 2)
    run = kernel._reduce.run
    monkeypatch.setattr(kernel._reduce, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.channel_weights(features, multipliers, mode="sum")
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.channel_weights(features, multipliers, mode="sum"))
