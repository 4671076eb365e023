"""Triton's `relevance_combine` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_relevance_combine, relevance_arguments

kernel = importlib.import_module("fastcam.kernels.relevance_combine")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments):
    check_relevance_combine(kernel.launch(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shift", "threshold"), [(True, 0.0), (True, 0.1), (False, 0.0)])
def test_layouts_and_dtypes(shift, threshold, layout, dtype):
    check(*relevance_arguments("relevance_combine", (3, 35, 3, 7), dtype, layout), shift, threshold)


@pytest.mark.parametrize("batch", [1, 3])
def test_parts_in_another_order_than_the_inputs(batch):
    x, parts, budgets = relevance_arguments("relevance_combine", (batch, 5, 4, 6), torch.float32)
    last = {"memory_format": torch.channels_last}
    check(x.contiguous(**last), parts, budgets)
    check(x, parts.contiguous(**last), budgets)


@pytest.mark.parametrize(
    "shape", [(1, 1), (300, 10), (2, 1500), (2, kernel.CHUNK + 1), (2, 5, 8), (1, 2, 3, 4, 5), (2, 2, 1, 1)], ids=str
)
def test_shapes(shape):
    check(*relevance_arguments("relevance_combine", shape, torch.float32))


def test_more_chunks_than_one_block_adds():
    shape = (1, kernel.CHUNK * kernel.FINISH_BLOCK + 5)
    check(*relevance_arguments("relevance_combine", shape, torch.float32))


def test_images_inside_others():
    """Batch as the innermost dimension of the inputs, and so of the result."""
    x, parts, budgets = relevance_arguments("relevance_combine", (4, 300), torch.float32)
    check(x.T.contiguous().T, parts, budgets)


@pytest.mark.parametrize("shift", [False, True])
def test_nothing_to_take_away(shift):
    """Images without active inputs, without shared relevance, without a positive budget; and NaN, which counts."""
    x, parts, budgets = relevance_arguments("relevance_combine", (6, 40), torch.float32)
    x[0] = -x[0].abs()
    parts[1] = 0
    budgets[2, 0] = 0
    budgets[3, 0] = torch.nan
    x[4, :2] = torch.nan
    parts[4, 5:7] = torch.nan
    budgets[4:] = 1
    check(x, parts, budgets, shift)


@pytest.mark.parametrize("shape", [(0, 4, 7), (2, 0, 7)], ids=str)
def test_empty(shape):
    thrice = (3 * shape[0], *shape[1:])
    assert kernel.launch(torch.empty(shape), torch.empty(thrice), torch.ones(shape[0], 2)).shape == shape


def test_same_bits_again_and_in_any_batch():
    x, parts, budgets = relevance_arguments("relevance_combine", (3, 700), torch.float32)
    together = kernel.launch(x, parts, budgets)
    assert torch.equal(together, kernel.launch(x, parts, budgets))
    assert torch.equal(together[1:2], kernel.launch(x[1:2], parts[1::3], budgets[1:2]))


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    arguments = relevance_arguments("relevance_combine", (2, 9, 7), torch.float32)
    run = kernel._combine.run
    monkeypatch.setattr(kernel._combine, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.relevance_combine(*arguments)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.relevance_combine(*arguments))
