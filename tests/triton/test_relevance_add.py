"""Triton's `relevance_add` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_relevance_add, features_like, relevance_arguments

kernel = importlib.import_module("fastcam.kernels.relevance_add")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments):
    check_relevance_add(kernel.launch(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("with_factor", [False, True])
def test_layouts_and_dtypes(with_factor, epsilon, layout, dtype):
    shape = (2, 35, 3, 7)
    tensors = relevance_arguments("relevance_add", shape, dtype, layout)
    check(*tensors, features_like(shape, dtype, 9) if with_factor else None, epsilon)


@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (2, 1500), (2, 5, 8), (1, 2, 3, 4, 5), (2, 2, 1, 1)], ids=str)
def test_shapes(shape):
    check(*relevance_arguments("relevance_add", shape, torch.float32))


def test_summands_that_cancel():
    """Nothing where they do so exactly and there is no epsilon; NaN and infinity come through."""
    r, a = features_like((3, 40), torch.float32, 1), features_like((3, 40), torch.float32, 2)
    b = -a
    b[1] *= 1 + 2**-20
    a[2, :3], b[2, 1:4] = torch.nan, torch.inf
    check(r, a, b, None, 0.0)
    check(r, a, b, None, 1e-3)


@pytest.mark.parametrize("shape", [(0, 4, 7), (2, 0, 7), (0, 0)], ids=str)
def test_empty(shape):
    got = kernel.launch(*(torch.empty(shape) for _ in range(4)))
    assert [x.shape for x in got] == [shape, shape]


def test_same_bits_again_and_in_any_batch():
    tensors = relevance_arguments("relevance_add", (3, 700), torch.float32)
    together, alone = kernel.launch(*tensors), kernel.launch(*(x[1:2] for x in tensors))
    for whole, again, one in zip(together, kernel.launch(*tensors), alone, strict=True):
        assert torch.equal(whole, again)
        assert torch.equal(whole[1:2], one)


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    arguments = relevance_arguments("relevance_add", (2, 9, 7), torch.float32)
    run = kernel._divide_among.run
    monkeypatch.setattr(kernel._divide_among, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.relevance_add(*arguments)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.relevance_add(*arguments))
