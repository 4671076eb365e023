"""Triton's `rescale_multipliers` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_rescale_multipliers, features_like

kernel = importlib.import_module("fastcam.kernels.rescale_multipliers")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments):
    check_rescale_multipliers(kernel.launch(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope", [0.0, 0.01])
@pytest.mark.parametrize("batch", [1, 2])
def test_layouts_and_dtypes(batch, slope, layout, dtype):
    shape = (2, 35, 3, 7)
    multipliers, inputs = (LAYOUTS[layout](features_like(shape, dtype, seed)) for seed in (1, 2))
    check(multipliers, inputs, features_like((batch, *shape[1:]), dtype, 3), slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wide_multipliers(dtype):
    shape = (2, 300)
    check(features_like(shape, torch.float32, 1), features_like(shape, dtype, 2), features_like(shape, dtype, 3), 0.3)


@pytest.mark.parametrize(
    "shape", [(1,), (7,), (3, 10), (2, 5, 8), (2, 1500), (1, 2, 3, 4, 5), (3, 2, 6, 7, 8)], ids=str
)
def test_shapes(shape):
    """With a reference for each image and a shared one: expanded, read again for every image, in several blocks."""
    for batch in (1, shape[0]):
        check(*(features_like((b, *shape[1:]), torch.float32, b) for b in (shape[0], shape[0], batch)), -0.5)


def test_images_inside_others():
    """Batch as the innermost dimension: a shared reference cannot be read run by run."""
    inputs = features_like((300, 4), torch.float32, 1).T
    check(inputs.neg(), inputs, features_like((1, 300), torch.float32, 2), 0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_odd_values(slope, dtype):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
    inputs, reference = torch.broadcast_tensors(odd[:, None], odd[None])
    check(torch.full((7, 7), 3.0, dtype=dtype), inputs, reference, slope)


@pytest.mark.parametrize("shape", [(0, 4, 7), (2, 0, 7), (0,)], ids=str)
def test_empty(shape):
    for batch in (1, shape[0]):
        assert kernel.launch(torch.empty(shape), torch.empty(shape), torch.empty(batch, *shape[1:])).shape == shape


def test_same_bits_again_and_in_any_batch():
    multipliers, inputs = features_like((3, 700), torch.float32), features_like((3, 700), torch.float32, 2)
    reference = features_like((1, 700), torch.float32, 3)
    together = kernel.launch(multipliers, inputs, reference)
    assert torch.equal(together, kernel.launch(multipliers, inputs, reference))
    assert torch.equal(together[1:2], kernel.launch(multipliers[1:2], inputs[1:2], reference))


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    arguments = [features_like((2, 9, 7), torch.float32, seed) for seed in range(3)]
    run = kernel._rescale.run
    monkeypatch.setattr(kernel._rescale, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.rescale_multipliers(*arguments)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.rescale_multipliers(*arguments))
