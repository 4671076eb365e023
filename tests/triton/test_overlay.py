"""Triton's `overlay` under the interpreter. Oracle, byte by byte: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_overlay, overlay_arguments

kernel = importlib.import_module("fastcam.kernels.overlay")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def check(*arguments, **options):
    check_overlay(kernel.launch(*arguments, **options), *arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("signed", [False, True])
def test_layouts_and_dtypes(signed, layout, dtype):
    images, maps, table = overlay_arguments((2, 3, 9, 13), dtype, layout, 2, signed)
    check(images, maps, table, 0.7, signed)
    check(images[:, :1], maps[:, 0], table, 1.0, signed, **IMAGENET)
    check(images, maps.to(table.dtype), table, 0.3, signed, mean=(0.5,), std=(0.25,))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 1, 5, 7), (1, 3, 40, 41)], ids=str)
def test_shapes(shape):
    check(*overlay_arguments(shape, torch.float32))


def test_rounds_to_the_nearest():
    eighths = torch.arange(-16, 2064)
    images = (eighths[eighths % 8 != 4] / 8 / 255).view(1, 1, 1, -1)
    shown = kernel.launch(images, torch.zeros(1, 1, images.shape[-1]), torch.zeros(1, 3))
    assert torch.equal(shown[0, 0, :, 2], (images.flatten().clamp(0, 1) * 255).round().to(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 5, 6)])
def test_empty(shape):
    assert kernel.launch(torch.zeros(shape[0], 3, 5, 6), torch.zeros(shape), torch.zeros(4, 3)).shape == (*shape, 3)


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    arguments = overlay_arguments((2, 3, 9, 7), torch.float32)
    run = kernel._overlay.run
    monkeypatch.setattr(kernel._overlay, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.overlay(*arguments)
    assert calls
    check_overlay(got, *arguments)
