"""Passes of which only scores count: batch norms folded, bound once, never stale."""

from __future__ import annotations

import copy

import pytest
import torch

import fastcam
from fastcam._testing import models
from fastcam.program.capture import capture
from fastcam.program.cut import cut
from fastcam.program.layers import find_layer
from fastcam.program.session import Bindings


def images(dtype) -> torch.Tensor:
    return torch.randn(3, 3, 11, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def session_of(net, x, bindings):
    program = capture(net, x)
    return bindings.session(program, *find_layer(program, net, "features", 2), x.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folded_runs_equal_the_plain_ones_to_rounding(dtype):
    net, x = models.residual().to(dtype), images(dtype)
    bindings = Bindings(net, None, False, False)
    session = session_of(net, x, bindings)
    with torch.no_grad():
        want = models.residual().double()(x.double())
        plain, folded = session.output(x), session.output(x, folded=True)
        assert torch.equal(plain, net(x))
    assert folded.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert float((folded - want).abs().max()) <= 2 * float((plain - want).abs().max()) + 8 * eps * float(
        want.abs().max()
    )
    assert len(bindings._kept) == 2
    session_of(net, x, bindings).output(x, folded=True)
    assert len(bindings._kept) == 2  # nothing is bound again
    program = session.cut.program
    assert cut(program, session.cut.feature, session.layer, folded=True) in bindings._kept


def test_folded_runs_see_changed_weights():
    net, x = models.residual(), images(torch.float32)
    explainer = fastcam.Explainer(net, "score_cam", layer="features", weight_norm="none")
    before = explainer(x, 1).weights
    with torch.no_grad():
        net.features.norm1.running_mean += 0.5
        net.head[-1].weight.data.mul_(2)
    after = explainer(x, 1).weights
    fresh = fastcam.Explainer(copy.deepcopy(net), "score_cam", layer="features", weight_norm="none")(x, 1).weights
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh, rtol=1e-5, atol=1e-6)


def test_a_norm_behind_a_linear_layer_is_folded_too():
    def build() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(),
            torch.nn.Linear(16, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 5),
        )  # fmt: skip

    net = models.seeded(build).double()
    x = images(torch.float64)
    program = capture(net, x)
    session = Bindings(net, None, False, False).session(program, *find_layer(program, net, "1", 2), x.dtype, fold=True)
    kinds = [node.kind for node in session.cut.program.nodes if node.kind == "folded"]
    assert len(kinds) == 2  # weight and bias
    with torch.no_grad():
        torch.testing.assert_close(session.output(x), net(x), rtol=1e-12, atol=1e-12)
