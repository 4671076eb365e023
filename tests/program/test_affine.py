"""Closed-form heads: which qualify, and that their gradients equal autograd's to rounding in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam.program.affine import AffineHead
from fastcam.program.capture import capture
from fastcam.program.cut import cut
from fastcam.program.layers import find_layer
from fastcam.program.session import Bound
from fastcam.program.targets import resolve_targets

K = 6


class Net(nn.Module):
    """A trunk (`body`) and the head under test."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, K, 3, padding=1), nn.ReLU())
        self.head = head

    def forward(self, x):
        return self.head(self.body(x))


class Fn(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def gap() -> nn.Module:
    return nn.AdaptiveAvgPool2d(1)


#: name -> (head, qualifies, pooled, uniform over positions)
HEADS = {
    "pool flatten linear": (lambda: nn.Sequential(gap(), nn.Flatten(), nn.Linear(K, 4)), True, True, True),
    "mean linear": (lambda: Fn(lambda s, x: s.fc(x.mean((2, 3))), fc=nn.Linear(K, 4)), True, True, True),
    "mean of mean": (lambda: Fn(lambda s, x: s.fc(x.mean(3).mean(2)), fc=nn.Linear(K, 4)), True, False, True),
    "dropout": (lambda: nn.Sequential(gap(), nn.Flatten(), nn.Dropout(), nn.Linear(K, 4)), True, True, True),
    "no bias": (lambda: nn.Sequential(gap(), nn.Flatten(), nn.Linear(K, 4, bias=False)), True, True, True),
    "two linears": (lambda: nn.Sequential(gap(), nn.Flatten(), nn.Linear(K, 5), nn.Linear(5, 4)), True, False, True),
    "neck": (lambda: nn.Sequential(gap(), nn.Flatten(), nn.BatchNorm1d(K), nn.Linear(K, 4)), True, False, True),
    "conv pool": (lambda: nn.Sequential(nn.Conv2d(K, 4, 1), gap(), nn.Flatten()), True, False, True),
    "3x3 conv": (lambda: nn.Sequential(nn.Conv2d(K, 4, 3, padding=1), gap(), nn.Flatten()), True, False, False),
    "flatten linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(K * 30, 4)), True, False, False),
    "coarse pool": (lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(K * 6, 4)), True, False, False),
    "scaled": (
        lambda: Fn(
            lambda s, x: s.fc(x.mean((2, 3)) / 3 * s.w), fc=nn.Linear(K, 4), w=nn.ParameterList([torch.ones(K) * 2])[0]
        ),
        True,
        False,
        True,
    ),
    "skip": (lambda: Fn(lambda s, x: s.fc(x.mean((2, 3)) + x.sum((2, 3))), fc=nn.Linear(K, 4)), True, False, True),
    "cat": (
        lambda: Fn(lambda s, x: s.fc(torch.cat([x.mean((2, 3)), x[:, :, 0, 0]], 1)), fc=nn.Linear(2 * K, 4)),
        True,
        False,
        False,
    ),
    "matmul": (lambda: Fn(lambda s, x: x.mean((2, 3)) @ s.fc.weight.t(), fc=nn.Linear(K, 4)), True, False, True),
    "constant output": (lambda: Fn(lambda s, x: s.fc(x.mean((2, 3)) * 0 + 1), fc=nn.Linear(K, 4)), True, False, True),
    "relu": (lambda: nn.Sequential(gap(), nn.Flatten(), nn.ReLU(), nn.Linear(K, 4)), False, False, False),
    "max pool": (lambda: nn.Sequential(nn.MaxPool2d(2), gap(), nn.Flatten(), nn.Linear(K, 4)), False, False, False),
    "gate": (lambda: Fn(lambda s, x: s.fc((x * x.sigmoid()).mean((2, 3))), fc=nn.Linear(K, 4)), False, False, False),
    "square": (lambda: Fn(lambda s, x: s.fc((x * x).mean((2, 3))), fc=nn.Linear(K, 4)), False, False, False),
    "layer norm": (lambda: nn.Sequential(gap(), nn.Flatten(), nn.LayerNorm(K), nn.Linear(K, 4)), False, False, False),
    "softmax": (lambda: nn.Sequential(gap(), nn.Flatten(), nn.Linear(K, 4), nn.Softmax(1)), False, False, False),
    "normalise": (
        lambda: Fn(lambda s, x: s.fc(functional.normalize(x.mean((2, 3)))), fc=nn.Linear(K, 4)),
        False,
        False,
        False,
    ),
    "reciprocal": (lambda: Fn(lambda s, x: s.fc(1 / (1 + x.mean((2, 3)))), fc=nn.Linear(K, 4)), False, False, False),
}


def made(name: str):
    torch.manual_seed(0)
    model = Net(HEADS[name][0]()).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    program = capture(model, images)
    index, layer = find_layer(program, model, "body", 2)
    made_cut = cut(program, index, layer)
    return made_cut, Bound(made_cut, model, torch.float64).session(), images, model


@pytest.mark.parametrize("name", list(HEADS))
def test_closed_form_equals_autograd(name):
    made_cut, session, images, _ = made(name)
    _, qualifies, pooled, uniform = HEADS[name]
    assert (made_cut.affine is not None) == qualifies
    closed = session.forward(images, "gradients")
    graph = session.forward(images, "gradients", closed_form=False)
    assert torch.equal(closed.output, graph.output)
    for classes in ([1, 3, 1], [[0, 1], [2, 2], [3, 0]]):
        targets = resolve_targets(classes, closed.output, 3)
        graph = session.forward(images, "gradients", closed_form=False)
        found, expected = closed.gradients(targets) if qualifies else None, graph.gradients(targets)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
            assert (found.stride(-1) == 0) == uniform
    if qualifies:
        assert made_cut.affine.pooled == pooled
        assert closed.uniform == uniform


@pytest.mark.parametrize("name", ["pool flatten linear", "mean linear", "flatten linear", "two linears", "relu"])
def test_callable_targets_agree_with_autograd(name):
    def score(output):
        return output.log_softmax(1)[:, 2] - output[:, 0] ** 2

    _, session, images, _ = made(name)
    found = session.forward(images, "gradients", by_index=False)
    graph = session.forward(images, "gradients", by_index=False, closed_form=False)
    targets = resolve_targets(score, found.output, 3)
    torch.testing.assert_close(found.gradients(targets), graph.gradients(targets), rtol=1e-12, atol=1e-14)


def test_closed_forms_read_the_weights_of_the_call():
    made_cut, _, images, model = made("two linears")
    bound = Bound(made_cut, model, torch.float64)
    for _ in range(2):
        with torch.no_grad():
            model.head[3].weight.normal_()
        session = bound.session()
        closed = session.forward(images, "gradients")
        graph = session.forward(images, "gradients", closed_form=False)
        targets = resolve_targets([0, 1, 2], closed.output, 3)
        torch.testing.assert_close(closed.gradients(targets), graph.gradients(targets), rtol=1e-12, atol=1e-14)


def test_a_wrong_analysis_is_caught_by_the_verification(monkeypatch, caplog):
    """A head that is not affine but was taken for one falls back to autograd, with a line in the log."""
    made_cut, session, images, _ = made("square")
    assert made_cut.affine is None
    monkeypatch.setattr(made_cut, "affine", AffineHead(None, 30, False))
    found = session.forward(images, "gradients")
    graph = session.forward(images, "gradients", closed_form=False)
    targets = resolve_targets([0, 1, 2], found.output, 3)
    torch.testing.assert_close(found.gradients(targets), graph.gradients(targets), rtol=1e-12, atol=1e-14)
    assert not found.uniform
    assert "looks affine is not" in caplog.text


def test_the_verification_leaves_the_random_state_alone():
    _, session, images, _ = made("pool flatten linear")
    before = torch.get_rng_state()
    session.forward(images, "gradients")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_skip_connection_around_the_layer_is_not_closed_form():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, K, 3, padding=1)
            self.body = nn.Conv2d(K, K, 1)
            self.fc = nn.Linear(K, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.fc((x + self.body(x)).mean((2, 3)))

    torch.manual_seed(0)
    model = Around().double().eval()
    images = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    program = capture(model, images)
    index, layer = find_layer(program, model, "body", 2)
    made_cut = cut(program, index, layer)
    assert made_cut.affine is None
    session = Bound(made_cut, model, torch.float64).session()
    passed = session.forward(images, "gradients")
    found = passed.gradients(resolve_targets([0, 1, 2], passed.output, 3))
    expected = (model.fc.weight[[0, 1, 2]] / 30)[..., None, None].expand_as(found)
    torch.testing.assert_close(found, expected)


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module, wrap):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, x):
        return self.wrap(self.net(x))


@pytest.mark.parametrize("method", ["lift_cam", "cam", "grad_cam", "xgrad_cam", "layer_cam"])
@pytest.mark.parametrize(
    ("wrap", "score"),
    [(lambda z: {"scores": z}, lambda out: out["scores"][:, 1]), (lambda z: (z,), lambda out: out[0][:, 1])],
    ids=["dict", "tuple"],
)
def test_structures_of_one_tensor(wrap, score, method):
    """A callable target on an output that holds its one tensor in a structure: the maps are the plain network's."""
    torch.manual_seed(0)
    net = Net(nn.Sequential(gap(), nn.Flatten(), nn.Linear(K, 4))).eval().double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    wrapped = fastcam.attribute(Wrapped(net, wrap).eval(), x, method, targets=score)
    torch.testing.assert_close(wrapped.maps, fastcam.attribute(net, x, method, targets=1).maps, rtol=0, atol=1e-12)
