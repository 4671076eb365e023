"""Triton's `mask_by_features` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_mask_by_features, features_like

kernel = importlib.import_module("fastcam.kernels.mask_by_features")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ORDERS = ("resize_then_minmax", "minmax_then_resize")


def check(*arguments, **options):
    check_mask_by_features(kernel.launch(*arguments, **options), *arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_layouts_and_dtypes(order, layout, dtype):
    images, features = (LAYOUTS[layout](features_like(s, dtype, 1)) for s in ((2, 3, 20, 24), (2, 4, 7, 6)))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    check(images, features, order=order)
    check(images, features.to(acc), 1, 4, noise=features_like((4, 20, 24), dtype, 2), scale=0.3, order=order)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("image", "maps"),
    [
        ((1, 1, 1), (2, 1, 1)),
        ((2, 1, 1), (2, 7, 7)),
        ((3, 5, 9), (2, 1, 1)),
        ((1, 8, 8), (2, 8, 8)),
        ((7, 9, 13), (2, 40, 33)),  # downwards; several chunks of cells, two blocks of channels
        ((3, 40, 41), (1, 7, 7)),  # several tiles of pixels
    ],
    ids=str,
)
def test_sizes(image, maps, order, layout):
    images, features = features_like((2, *image), torch.float32, 1), features_like((2, *maps), torch.float32, 2)
    check(LAYOUTS[layout](images), LAYOUTS[layout](features), order=order)


def test_usual_upscaling():
    check(features_like((1, 3, 224, 224), torch.float32, 1), features_like((1, 2, 14, 14), torch.float32, 2))


def test_digits_of_a_float64_scale():
    check(features_like((1, 3, 9, 9), torch.float64, 1), features_like((1, 2, 4, 4), torch.float64, 2), scale=1 / 3)


@pytest.mark.parametrize("order", ORDERS)
def test_flat_and_non_finite_maps(order):
    images, features = torch.ones(1, 3, 20, 11), features_like((1, 7, 7, 7), torch.float32)
    features[0, 0] = 0.3  # constant, but not its rounded interpolation
    features[0, 1, 3, 3] = torch.nan
    features[0, 2, 0, 1] = torch.inf
    features[0, 3] = -torch.inf
    got = kernel.launch(images, features, order=order)
    assert got[0].count_nonzero() == 0
    assert got[1:4].isnan().all()
    assert got[4:].isfinite().all()
    noise = features_like((1, 20, 11), torch.float32, 3)
    torch.testing.assert_close(
        kernel.launch(images, features, 0, 1, noise=noise, scale=2.0, order=order)[0], 2 * noise.expand(3, 20, 11)
    )
    if order == "resize_then_minmax":
        assert got[4:].amin((1, 2, 3)).eq(0).all()
        assert got[4:].amax((1, 2, 3)).eq(1).all()


def test_images_of_a_sliced_channels_last_batch():
    """Together they are neither layout, the chunk's only image is channels_last by itself."""
    images = LAYOUTS["channels_last"](features_like((4, 3, 6, 8), torch.float32, 1))[::2]
    check(images, features_like((2, 3, 4, 4), torch.float32, 2), 3, 2)


def test_empty():
    images, features = torch.empty(2, 3, 9, 8), torch.empty(2, 4, 7, 7)
    for empty in (kernel.launch(images[:0], features[:0]), kernel.launch(images, features, 5, 0)):
        assert empty.shape == (0, 3, 9, 8)


@pytest.mark.parametrize("order", ORDERS)
def test_same_bits_again_and_in_any_chunk(order):
    images, features = features_like((3, 3, 20, 20), torch.float32, 1), features_like((3, 4, 7, 7), torch.float32, 2)
    whole = kernel.launch(images, features, order=order)
    assert torch.equal(whole, kernel.launch(images, features, order=order))
    assert torch.equal(whole[3:9], kernel.launch(images, features, 3, 6, order=order))
    assert torch.equal(whole[4:8], kernel.launch(images[1:2], features[1:2], order=order))


def test_inputs_are_left_alone():
    images, features = features_like((2, 3, 9, 9), torch.float32, 1), features_like((2, 4, 7, 7), torch.float32, 2)
    before = images.clone(), features.clone()
    kernel.launch(images, features)
    assert torch.equal(images, before[0])
    assert torch.equal(features, before[1])


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    images, features = features_like((2, 3, 9, 9), torch.float32, 1), features_like((2, 4, 7, 7), torch.float32, 2)
    run = kernel._multiply.run
    monkeypatch.setattr(kernel._multiply, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    options = {"noise": torch.ones(3, 9, 9), "scale": 0.5, "order": "minmax_then_resize"}
    with fastcam.backend("triton"):
        got = fastcam.ops.mask_by_features(images, features, 2, 3, **options)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.mask_by_features(images, features, 2, 3, **options))
