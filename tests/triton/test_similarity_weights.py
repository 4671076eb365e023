"""Triton's `similarity_weights` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib
import itertools

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, TERMS, WEIGHTINGS, check_similarity_weights, features_like

kernel = importlib.import_module("fastcam.kernels.similarity_weights")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SWITCHES = list(itertools.product(TERMS, WEIGHTINGS, (False, True)))


def check(*arguments):
    check_similarity_weights(kernel.launch(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "channels_last"])
def test_layouts_and_dtypes(layout, dtype):
    u, v = (LAYOUTS[layout](features_like((3, 37), dtype, seed)) for seed in (1, 2))
    for switches in SWITCHES:
        check(u, v, *switches)
        check(u[:1], v, *switches)
        check(u, v[2:], *switches)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("channels", [1, 2, 255, 256, 1000, kernel.BLOCK, kernel.BLOCK + 1, 3 * kernel.BLOCK - 5])
def test_lengths(channels, term):
    u, v = features_like((2, channels), torch.float32, 1), features_like((2, channels), torch.float32, 2)
    for weighting in WEIGHTINGS:
        check(u, v, term, weighting)


@pytest.mark.parametrize("term", TERMS)
def test_odd_values(term):
    u, v = features_like((8, 50), torch.float32, 1), features_like((8, 50), torch.float32, 2)
    u[0, 3], v[1, 4], u[2, 5] = torch.nan, torch.inf, -torch.inf
    v[2, 5] = -torch.inf
    u[3] = 0
    u[4] = v[4]
    u[5, 1::2] = v[5, ::2] = 0
    u[6], v[6] = u[6] * 1e25, v[6] * 1e-25
    u[7], v[7] = u[7] * 1e18, v[7] * 1e18
    for weighting, dissimilarity in itertools.product(WEIGHTINGS, (False, True)):
        check(u, v, term, weighting, dissimilarity)


def test_empty():
    for first, second in ((0, 0), (0, 1), (1, 0)):
        got = kernel.launch(torch.empty(first, 5), torch.empty(second, 5))
        assert [x.shape for x in got] == [(0, 5), (0, 5), (0,)]


@pytest.mark.parametrize("term", TERMS)
def test_same_bits_again_and_in_any_batch(term):
    u, v = features_like((1, kernel.BLOCK + 77), torch.float32), features_like((3, kernel.BLOCK + 77), torch.float32, 1)
    together = kernel.launch(u, v, term)
    for others in (kernel.launch(u, v, term), kernel.launch(u.expand_as(v), v, term)):
        assert all(torch.equal(a, b) for a, b in zip(together, others, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, kernel.launch(u, v[1:2], term), strict=True))


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam

    calls = []
    u, v = features_like((2, 9), torch.float32), features_like((2, 9), torch.float32, 1)
    run = kernel._weigh_similarity.run
    monkeypatch.setattr(kernel._weigh_similarity, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = fastcam.ops.similarity_weights(u, v)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, fastcam.ops.similarity_weights(u, v))
