"""Triton's `perturb_by_rank` under the interpreter. Oracle, bit by bit: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_perturb_by_rank, features_like, perturb_arguments

kernel = importlib.import_module("fastcam.kernels.perturb_by_rank")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments, **options):
    check_perturb_by_rank(kernel.launch(*arguments, **options), *arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plain", [False, True])
def test_layouts_and_dtypes(plain, layout, dtype):
    check(*perturb_arguments((2, 3, 9, 13), dtype, layout, plain))
    check(*perturb_arguments((2, 3, 9, 13), dtype, layout, plain, torch.int32), keep=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 60, 5, 7), (1, 3, 40, 41)], ids=str)
def test_shapes(shape, layout):
    check(*perturb_arguments(shape, torch.float32, layout, False))


def test_baseline_of_one_row_and_ranks_that_are_not_dense():
    images, _, ranks, counts = perturb_arguments((2, 3, 6, 8), torch.float32)
    check(images, features_like((2, 3, 1, 8), torch.float32, 4), ranks[:1].expand(2, -1, -1), counts)


def test_counts_beyond_int32():
    images, baseline, ranks, _ = perturb_arguments((1, 2, 4, 4), torch.float32)
    ranks = ranks * 2**33
    check(images, baseline, ranks, torch.tensor([2**33, 2**33 + 1, 2**62, -(2**62)]))


@pytest.mark.parametrize(("batch", "steps"), [(0, 3), (2, 0)])
def test_empty(batch, steps):
    images, baseline, ranks, counts = perturb_arguments((2, 3, 4, 5), torch.float32)
    assert kernel.launch(images[:batch], baseline, ranks[:batch], counts[:steps]).shape == (batch, steps, 3, 4, 5)


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    arguments = perturb_arguments((2, 3, 9, 7), torch.float32)
    run = kernel._perturb.run
    monkeypatch.setattr(kernel._perturb, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.perturb_by_rank(*arguments)
    assert calls
    check_perturb_by_rank(got, *arguments)
