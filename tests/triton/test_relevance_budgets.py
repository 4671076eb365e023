"""Triton's `relevance_budgets` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_relevance_budgets, features_like, relevance_arguments

kernel = importlib.import_module("fastcam.kernels.relevance_budgets")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(relevance):
    check_relevance_budgets(kernel.launch(relevance), relevance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(layout, dtype):
    check(*relevance_arguments("relevance_budgets", (2, 35, 3, 7), dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 10), (2, kernel.CHUNK), (2, kernel.CHUNK + 1), (2, 3, 100, 101), (1, 2, 3, 4, 5)], ids=str
)
def test_shapes(shape, dtype):
    check(*relevance_arguments("relevance_budgets", shape, dtype))


def test_more_chunks_than_one_block_adds():
    check(features_like((2, kernel.CHUNK * kernel.FINISH_BLOCK + 5), torch.float32))


def test_odd_values():
    r = features_like((6, 50), torch.float32)
    r[0, 3] = torch.nan
    r[1, 4] = torch.inf
    r[2, 5] = -torch.inf
    r[3] = r[3].abs()
    r[4] = 0
    check(r)


@pytest.mark.parametrize("shape", [(0, 4, 7), (2, 0, 7), (0, 0)], ids=str)
def test_empty(shape):
    got = kernel.launch(torch.empty(shape))
    assert got.shape == (shape[0], 2)
    assert got.count_nonzero() == 0


def test_same_bits_again_and_in_any_batch():
    r = features_like((3, kernel.CHUNK + 701), torch.float32)
    together = kernel.launch(r)
    assert torch.equal(together, kernel.launch(r))
    assert torch.equal(together[1:2], kernel.launch(r[1:2]))


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    (r,) = relevance_arguments("relevance_budgets", (2, 9, 7), torch.float32)
    run = kernel._add_chunk.run
    monkeypatch.setattr(kernel._add_chunk, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.relevance_budgets(r)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.relevance_budgets(r))
