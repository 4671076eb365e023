"""Counts of FLOPs, bytes, calls and memory against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastcam
from fastcam import _extension, ops
from fastcam.profiling.counting import count, op_flops, peak_bytes, traffic


def test_traffic_counts_what_is_expanded_once():
    base = torch.zeros(4, 6, 1, 1)
    assert traffic(base) == 4 * 6 * 4
    assert traffic(base.expand(4, 6, 50, 50)) == 4 * 6 * 4
    assert traffic([torch.zeros(3, dtype=torch.float64), None, {"a": torch.zeros(0, 5)}]) == 24


def test_flops_of_convolution_and_linear_are_those_of_the_formula():
    images = torch.randn(2, 3, 8, 10)
    with torch.no_grad():
        found = count(lambda: nn.Conv2d(3, 6, 3, padding=1)(images))
        assert found.flops == 2 * (2 * 6 * 8 * 10) * (3 * 3 * 3)
        assert count(lambda: nn.Linear(7, 5)(torch.ones(4, 7))).flops == 2 * 4 * 7 * 5


def test_calls_and_bytes_leave_views_out():
    x = torch.zeros(10, 10)
    found = count(lambda: (x.t().reshape(100).view(4, 25) + 1).relu_())
    # The copy behind reshape, the sum and the ReLU; each reads 400 bytes and writes 400.
    assert found.calls == 3
    assert found.nbytes == 3 * 800
    assert found.ops == []


def test_ops_are_counted_by_any_backend_with_their_bytes():
    features, weights = torch.randn(2, 8, 4, 4), torch.randn(2, 8)
    for backend in ("reference", "auto"):
        with fastcam.backend(backend):
            found = count(lambda: ops.cam_map(features, weights, size=(8, 8)))
        (one,) = found.ops
        assert one.name == "cam_map"
        # Features and weights in; maps, the raw map and a flag an image out.
        assert one.nbytes == 4 * (2 * 8 * 16 + 2 * 8 + 2 * 64 + 2 * 16) + 2
        assert one.flops == 2 * (2 * 8 * 16) + 8 * (2 * 64)
        assert found.flops >= one.flops
        assert found.calls >= 1


def test_fused_ops_are_one_call():
    if _extension.why_not():
        pytest.skip("needs the C++ extension")
    features, weights = torch.randn(2, 8, 4, 4), torch.randn(2, 8)
    with fastcam.backend("cpp"):
        assert count(lambda: ops.cam_map(features, weights, size=(8, 8))).calls == 1


@pytest.mark.parametrize("name", sorted(fastcam.backends()["ops"]))
def test_every_op_has_a_count(name):
    x = torch.ones(2, 3, 4, 4)
    result = (torch.ones(2, 4, 4),) if name == "cam_map" else x
    assert op_flops(name, (x, torch.ones(2, 3)), {}, result) >= x.numel()
    from fastcam.profiling.counting import _PER_ELEMENT

    assert name == "cam_map" or name in _PER_ELEMENT, f"say in _PER_ELEMENT how many FLOPs an element {name} takes"


def test_peak_memory_is_that_of_the_tensors_alive_together():
    block = 1 << 20

    def call():
        a = torch.zeros(block, dtype=torch.uint8)
        b = torch.zeros(2 * block, dtype=torch.uint8)
        del a
        c = torch.zeros(block, dtype=torch.uint8)
        del b
        return c

    assert block * 3 <= peak_bytes(call, "cpu") < block * 3 + 4096


def test_large_results_of_kernels_are_seen():
    """They come from a pool of their own, which reports to the profiler as torch's allocator does."""
    if _extension.why_not():
        pytest.skip("needs the C++ extension")
    features, weights = torch.randn(1, 2, 7, 7), torch.randn(1, 48, 2)

    def call():
        with fastcam.backend("cpp"):
            return ops.cam_map(features, weights, size=(256, 256))

    expected = 48 * 256 * 256 * 4
    for _ in range(2):  # a new block, then one out of the pool
        assert expected <= peak_bytes(call, "cpu") < expected * 1.02


def test_memory_of_a_network_is_that_of_its_two_largest_neighbours():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(4):
                x = x + 1
            return x

    images = torch.zeros(4, 3, 64, 64)
    with torch.no_grad():
        peak = peak_bytes(lambda: Chain()(images), "cpu")
    assert 2 * images.nbytes <= peak < 2 * images.nbytes + 4096
