"""Triton's `relevance_split` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, RULES, check_relevance_split, features_like, relevance_arguments

kernel = importlib.import_module("fastcam.kernels.relevance_split")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments, **options):
    check_relevance_split(kernel.launch(*arguments, **options), *arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_factor", [False, True])
def test_layouts_and_dtypes(with_factor, rule, layout, dtype):
    shape = (2, 35, 3, 7)
    tensors = relevance_arguments("relevance_split", shape, dtype, layout)
    check(*tensors, features_like(shape, dtype, 9) if with_factor else None, rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("numbers", [(2.0, 1.0, 0.0), (1.0, 0.0, 1e-6), (0.25, 0.1, 0.5)], ids=str)
def test_numbers(numbers, rule):
    first, second, epsilon = numbers
    tensors = relevance_arguments("relevance_split", (2, 300), torch.float32)
    check(*tensors, rule=rule, first=first, second=second, epsilon=epsilon)


@pytest.mark.parametrize(
    "shape", [(1, 1), (70, 10), (2, 1500), (2, 5, 8), (2, 20, 4, 4), (1, 1025, 2, 2), (2, 1, 5, 5), (2, 3, 4, 4, 5)],
    ids=str,
)  # fmt: skip
def test_shapes(shape):
    """Runs that share a tile, fill one, need several; as images and, where there are four dimensions, as pixels."""
    tensors = relevance_arguments("relevance_split", shape, torch.float32)
    check(*tensors, rule="alpha_beta")
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    if last is not None:
        check(*(x.contiguous(memory_format=last) for x in tensors), rule="alpha_beta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_odd_values(rule, dtype):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -0.5], dtype=dtype)
    tensors = torch.broadcast_tensors(odd[:, None, None], odd[:, None], odd.abs())
    check(*tensors, rule=rule, epsilon=0.5)
    check(*tensors, rule=rule, epsilon=0.0)


@pytest.mark.parametrize("shape", [(0, 4, 7), (2, 0, 7), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    got = kernel.launch(*(torch.empty(shape) for _ in range(4)), rule="rap")
    assert got.shape == (shape[0], 2 * shape[1], *shape[2:])


def test_same_bits_again_and_in_any_batch():
    tensors = relevance_arguments("relevance_split", (3, 700), torch.float32)
    together = kernel.launch(*tensors, rule="gamma")
    assert torch.equal(together, kernel.launch(*tensors, rule="gamma"))
    assert torch.equal(together[1:2], kernel.launch(*(x[1:2] for x in tensors), rule="gamma"))


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    arguments = relevance_arguments("relevance_split", (2, 9, 7), torch.float32)
    run = kernel._split.run
    monkeypatch.setattr(kernel._split, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.relevance_split(*arguments, rule="rap")
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.relevance_split(*arguments, rule="rap"))
