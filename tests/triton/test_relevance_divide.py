"""Triton's `relevance_divide` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_relevance_divide, features_like, relevance_arguments

kernel = importlib.import_module("fastcam.kernels.relevance_divide")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments):
    check_relevance_divide(kernel.launch(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.25])
@pytest.mark.parametrize("with_factor", [False, True])
def test_layouts_and_dtypes(with_factor, epsilon, layout, dtype):
    shape = (2, 35, 3, 7)
    tensors = relevance_arguments("relevance_divide", shape, dtype, layout)
    check(*tensors, features_like(shape, dtype, 9) if with_factor else None, epsilon)


@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (2, 1500), (2, 5, 8), (1, 2, 3, 4, 5), (2, 2, 1, 1)], ids=str)
def test_shapes(shape):
    check(*relevance_arguments("relevance_divide", shape, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_odd_values(epsilon, dtype):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -0.5], dtype=dtype)
    check(*torch.broadcast_tensors(odd[:, None], odd[None]), None, epsilon)


@pytest.mark.parametrize("shape", [(0, 4, 7), (2, 0, 7), (0, 0)], ids=str)
def test_empty(shape):
    assert kernel.launch(torch.empty(shape), torch.empty(shape), torch.empty(shape)).shape == shape


def test_same_bits_again_and_in_any_batch():
    r, d = relevance_arguments("relevance_divide", (3, 700), torch.float32)
    together = kernel.launch(r, d)
    assert torch.equal(together, kernel.launch(r, d))
    assert torch.equal(together[1:2], kernel.launch(r[1:2], d[1:2]))


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    arguments = relevance_arguments("relevance_divide", (2, 9, 7), torch.float32)
    run = kernel._divide.run
    monkeypatch.setattr(kernel._divide, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.relevance_divide(*arguments)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.relevance_divide(*arguments))
