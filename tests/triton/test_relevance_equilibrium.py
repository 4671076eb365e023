"""Triton's `relevance_equilibrium` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_relevance_equilibrium, features_like, relevance_arguments

kernel = importlib.import_module("fastcam.kernels.relevance_equilibrium")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments):
    check_relevance_equilibrium(kernel.launch(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [2.0, 0.3])
def test_layouts_and_dtypes(ratio, layout, dtype):
    check(*relevance_arguments("relevance_equilibrium", (2, 35, 3, 7), dtype, layout), ratio)


@pytest.mark.parametrize("batch", [1, 3])
def test_relevance_in_another_order_than_the_divisors(batch):
    r, budgets, z = relevance_arguments("relevance_equilibrium", (batch, 5, 4, 6), torch.float32)
    last = {"memory_format": torch.channels_last}
    check(r.contiguous(**last), budgets, z)
    check(r, budgets, z.contiguous(**last))


@pytest.mark.parametrize("shape", [(1, 1), (300, 10), (2, 1500), (2, 5, 8), (1, 2, 3, 4, 5), (2, 2, 1, 1)], ids=str)
def test_shapes(shape):
    check(*relevance_arguments("relevance_equilibrium", shape, torch.float32))


def test_images_inside_others():
    """Batch as the innermost dimension of divisors, and so of the result."""
    r, budgets, z = relevance_arguments("relevance_equilibrium", (4, 300), torch.float32)
    check(r, budgets, z.T.contiguous().T)


def test_odd_values():
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -0.5])
    r, z = (x.contiguous() for x in torch.broadcast_tensors(odd[:, None], odd[None]))
    budgets = features_like((7, 2), torch.float32).abs()
    budgets[0], budgets[1] = 0, torch.nan
    check(r, budgets, torch.cat([z, z, z]))
    # Of an image all but gone; its reciprocals would be infinite.
    small = torch.tensor([[1e-40, 0.0, -2e-40, 3e-41]])
    check(small, torch.tensor([[1.3e-40, 2e-40]]), torch.ones(3, 4))


@pytest.mark.parametrize("shape", [(0, 4, 7), (2, 0, 7)], ids=str)
def test_empty(shape):
    thrice = (3 * shape[0], *shape[1:])
    assert kernel.launch(torch.empty(shape), torch.ones(shape[0], 2), torch.empty(thrice)).shape == thrice


def test_same_bits_again_and_in_any_batch():
    r, budgets, z = relevance_arguments("relevance_equilibrium", (3, 700), torch.float32)
    together = kernel.launch(r, budgets, z)
    assert torch.equal(together, kernel.launch(r, budgets, z))
    assert torch.equal(together[1::3], kernel.launch(r[1:2], budgets[1:2], z[1::3]))


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    arguments = relevance_arguments("relevance_equilibrium", (2, 9, 7), torch.float32)
    run = kernel._equilibrium.run
    monkeypatch.setattr(kernel._equilibrium, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.relevance_equilibrium(*arguments)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.relevance_equilibrium(*arguments))
