"""Cases worked out by hand, and the closed forms on pooled linear heads against the written formulas and autograd."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing import models
from fastcam.program.capture import capture
from fastcam.program.cut import Cut
from fastcam.program.layers import find_layer
from fastcam.program.session import Bound, CapturedSession
from fastcam.program.targets import resolve_targets

# Two channels, Z = 4 positions:  A1 = 1 2   A2 = 4 0   S = (10, 4), mean(A) = (5/2, 1)
#                                      3 4        0 0
# Scores y_c = W[c] mean(A) + b_c with W = [[2, -1], [1, 3]], b = (1/2, -2):  y = (9/2, 7/2), so class 0 wins.
# Gradients G = W / Z: class 0 (1/2, -1/4), class 1 (1/4, 3/4), the same at every position.
A = torch.tensor([[[[1.0, 2], [3, 4]], [[4, 0], [0, 0]]]], dtype=torch.float64)
RAW = {
    # 2 A1 - A2, no ReLU
    ("cam", 0): [[-2, 4], [6, 8]],
    # A1 + 3 A2
    ("cam", 1): [[13, 2], [3, 4]],
    # relu(A1 / 2 - A2 / 4): Grad-CAM, XGrad-CAM and HiResCAM are CAM / Z on this head
    **{(name, 0): [[0, 1], [3 / 2, 2]] for name in ("grad_cam", "xgrad_cam", "hires_cam")},
    # A1 / 4 + 3 A2 / 4
    **{(name, 1): [[13 / 4, 1 / 2], [3 / 4, 1]] for name in ("grad_cam", "xgrad_cam", "hires_cam")},
    # relu(G2) = 0, so A1 / 2 remains
    ("layer_cam", 0): [[1 / 2, 1], [3 / 2, 2]],
    ("layer_cam", 1): [[13 / 4, 1 / 2], [3 / 4, 1]],
    # alpha1 = 4 (1/2) / (2 + 10/2) = 2/7, alpha2 = 0
    ("grad_cam_pp", 0): [[2 / 7, 4 / 7], [6 / 7, 8 / 7]],
    # alpha1 = 4 (1/4) / (2 + 10/4) = 2/9, alpha2 = 4 (3/4) / (2 + 3) = 3/5
    ("grad_cam_pp", 1): [[2 / 9 + 12 / 5, 4 / 9], [6 / 9, 8 / 9]],
}
WEIGHTS = {
    ("cam", 0): (2, -1),
    ("grad_cam", 0): (1 / 2, -1 / 4),
    ("xgrad_cam", 0): (1 / 2, -1 / 4),
    ("grad_cam_pp", 0): (2 / 7, 0),
    ("grad_cam_pp", 1): (2 / 9, 3 / 5),
}


def hand_net(weight=((2.0, -1.0), (1.0, 3.0)), bias=(0.5, -2.0)) -> nn.Module:
    return models.by_hand([list(row) for row in weight], list(bias)).double()


@pytest.mark.parametrize(("method", "target"), RAW, ids=str)
def test_two_channels_by_hand(method, target):
    got = fastcam.attribute(hand_net(), A, method, targets=target, layer="features")
    want = torch.tensor([RAW[method, target]], dtype=torch.float64)
    torch.testing.assert_close(got.raw, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(got.scores, torch.tensor([[4.5, 3.5]], dtype=torch.float64), rtol=0, atol=1e-14)
    low, high = want.min(), want.max()
    torch.testing.assert_close(got.maps, (want - low) / (high - low), rtol=0, atol=1e-14)  # layer size = image size
    if (method, target) in WEIGHTS:
        alpha = torch.tensor([WEIGHTS[method, target]], dtype=torch.float64)
        torch.testing.assert_close(got.weights, alpha, rtol=0, atol=1e-14)


def test_resize_by_hand():
    # raw Grad-CAM map 0    1    to 4 x 4, align_corners=False: weights (1, 0), (3/4, 1/4), (1/4, 3/4), (0, 1) on rows
    #                  3/2  2    and columns: value = 3/2 r + 1 c - (1/2) r c, r and c in {0, 1/4, 3/4, 1}; max 2, min 0
    got = fastcam.attribute(hand_net(), A, "grad_cam", targets=0, layer="features", size=(4, 4))
    r = torch.tensor([0, 1 / 4, 3 / 4, 1], dtype=torch.float64)
    want = (1.5 * r[:, None] + r[None] - 0.5 * r[:, None] * r[None]) / 2
    torch.testing.assert_close(got.maps[0], want, rtol=0, atol=1e-14)


# Columns built from their singular vectors: X = p v1' + q v2', v1 = (3/5, 4/5), v2 = (-4/5, 3/5), p = (15, -5, -5, -5),
# q = (0, 5, -5, 0), p . q = 0, both of mean 0, |p|^2 = 300 > |q|^2 = 50. Columns (9, -7, 1, -3) and (12, -1, -7, -4),
# shifted by 8 so that only centring finds p again. |max p| > |min p|, so p keeps its sign.
EIGEN = torch.tensor([[[[17.0, 1], [9, 5]], [[20, 7], [1, 4]]]], dtype=torch.float64)
P = torch.tensor([[[15.0, -5], [-5, -5]]], dtype=torch.float64)


@pytest.mark.parametrize("sign", [1, -1])
def test_eigen_cam_by_hand(sign):
    got = fastcam.attribute(hand_net(), sign * EIGEN, "eigen_cam", layer="features", relu=False)
    torch.testing.assert_close(got.raw, P, rtol=0, atol=1e-12)  # -X has the same p after the sign rule
    got = fastcam.attribute(hand_net(), sign * EIGEN, "eigen_cam", layer="features")
    torch.testing.assert_close(got.raw, P.clamp(min=0), rtol=0, atol=1e-12)


def test_eigen_cam_uncentred_by_hand():
    # Rank one: A1 = 3 s, A2 = 4 s with s = (1, 2, 2, 4), |s| = 5: v1 = (3/5, 4/5), X v1 = 5 s, without centring.
    s = torch.tensor([[1.0, 2], [2, 4]], dtype=torch.float64)
    got = fastcam.attribute(hand_net(), torch.stack([3 * s, 4 * s])[None], "eigen_cam", layer="features", center=False)
    torch.testing.assert_close(got.raw, 5 * s[None], rtol=0, atol=1e-12)


def test_eigen_grad_cam_by_hand():
    # W[0] = (4, 2), Z = 4: G * A = (A1, A2 / 2), so channels (17, 1, 9, 5) and 2 (20, 7, 1, 4) give p again.
    net = hand_net(weight=((4.0, 2.0), (1.0, 1.0)))
    images = EIGEN * torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None, None]
    got = fastcam.attribute(net, images, "eigen_grad_cam", targets=0, layer="features", relu=False)
    torch.testing.assert_close(got.raw, P, rtol=0, atol=1e-12)


# --- The GAP+Linear column of the table, float64, 1e-12 ---

SCORES = {
    "logit": lambda y: y[:, 1],
    "probability": lambda y: y.softmax(1)[:, 1],
    "log_probability": lambda y: y.log_softmax(1)[:, 3],
    "margin": lambda y: 2 * y[:, 0] - y.logsumexp(1),
    "energy": lambda y: y.square().sum(1),
}


def images(size=(11, 14), batch=3, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return models.gap_linear().double()


def column(method: str, a: torch.Tensor, w: torch.Tensor, oracle) -> torch.Tensor:
    """(B, h, w) before ReLU from features and w = t W: the last column of the table."""
    z, (wide, mean) = a[0, 0].numel(), (w[..., None, None], a.mean((2, 3)))
    if method in ("cam", "grad_cam", "xgrad_cam", "hires_cam"):
        return (wide * a).sum(1) / (1 if method == "cam" else z)
    if method == "layer_cam":
        return (wide.relu() * a).sum(1) / z
    if method == "grad_cam_pp":
        return ((w.relu() / (2 + w * mean))[..., None, None] * a).sum(1)
    scaled = a if method == "eigen_cam" else wide / z * a
    return torch.stack([oracle.principal(one) for one in scaled])


def slopes(score, logits: torch.Tensor) -> torch.Tensor:
    """t = d T / d logits, (B, C)."""
    free = logits.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(score(free).sum(), free)[0]


def by_index(kind: str, score):
    """The score as a user passes it: the logit as a class index, the rest as callables."""
    return 1 if kind == "logit" else score


METHODS = ["cam", "grad_cam", "grad_cam_pp", "xgrad_cam", "hires_cam", "layer_cam", "eigen_cam", "eigen_grad_cam"]


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("method", METHODS)
def test_pooled_linear_column(net, oracle, method, kind):
    x, score = images(), SCORES[kind]
    a, _, logits = oracle.tap(net, "features", x, score)
    want = column(method, a, slopes(score, logits) @ net.head[2].weight.detach(), oracle)
    got = fastcam.attribute(net, x, method, targets=by_index(kind, score), layer="features", relu=False)
    torch.testing.assert_close(got.raw, want, rtol=0, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("method", METHODS[1:])
def test_closed_form_is_the_autograd_path(net, monkeypatch, method, kind):
    x, targets = images(), by_index(kind, SCORES[kind])
    closed = fastcam.attribute(net, x, method, targets=targets, layer="features")
    taken = []
    original = CapturedSession.forward

    @functools.wraps(original)
    def by_autograd(self, *args, **kwargs):
        passed = original(self, *args, **{**kwargs, "closed_form": False})
        taken.append(passed.uniform)
        return passed

    monkeypatch.setattr(CapturedSession, "forward", by_autograd)
    graph = fastcam.attribute(net, x, method, targets=targets, layer="features")
    assert taken == [False]
    scale = float(graph.raw.max())
    assert scale > 0
    torch.testing.assert_close(closed.raw, graph.raw, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(closed.maps, graph.maps, rtol=0, atol=1e-12)


# --- Affine heads of other shapes: which are recognised, and that what is recognised is right ---


class Scaled(nn.Module):
    def forward(self, x):
        return (x / 4 + 1.5).neg()


class MeanOverChannels(nn.Module):
    """Looks like a pool that leaves (B, K) when h w = K."""

    def forward(self, x):
        return x.mean(1).flatten(1)


def heads(k=6, h=2, w=3):
    """name -> (head on (B, k, h, w), whether its gradient is the same at all positions)"""
    pool, flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return {
        "pool_linear": ([pool, flat, nn.Linear(k, 5)], True),
        "no_bias": ([pool, flat, nn.Linear(k, 5, bias=False)], True),
        "two_linears": ([pool, flat, nn.Linear(k, 4), nn.Linear(4, 5)], True),
        "norm_dropout": ([nn.BatchNorm2d(k), pool, flat, nn.Dropout(), nn.Linear(k, 5)], True),
        "conv_then_pool": ([nn.Conv2d(k, 5, 1), pool, flat], True),
        "scaled": ([pool, flat, nn.Linear(k, 5), Scaled()], True),
        "flatten_linear": ([flat, nn.Linear(k * h * w, 5)], False),
        "wide_conv": ([nn.Conv2d(k, 5, 3, padding=1), pool, flat], False),
        "small_pool": ([nn.AvgPool2d(2, 1), flat, nn.Linear(k * (h - 1) * (w - 1), 5)], False),
        "mean_over_channels": ([MeanOverChannels(), nn.Linear(h * w, 5)], False),
    }


def with_head(name: str) -> nn.Module:
    def build():
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh()), nn.Sequential(*heads()[name][0]))

    return models.seeded(build).double()


@pytest.mark.parametrize("name", heads())
def test_affine_heads(oracle, name):
    model, uniform = with_head(name), heads()[name][1]
    x, classes = images((2, 3)), torch.tensor([[4, 0], [1, 1], [2, 3]])
    with torch.no_grad():
        program = capture(model, x)
        made = Cut(program, *find_layer(program, model, "0", 2))
        session = Bound(made, model, x.dtype).session()
        closed = session.forward(x, "gradients")
        graph = session.forward(x, "gradients", closed_form=False)
        targets = resolve_targets(classes, closed.output, 3)
        got, want = closed.gradients(targets), graph.gradients(targets)
    assert made.affine is not None
    assert closed.uniform == uniform
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for column_, c in enumerate(classes.T):
        torch.testing.assert_close(want[:, column_], oracle.tap(model, "0", x, oracle.logit(c))[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "head",
    [
        [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)],
        [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 5)],
        [nn.LayerNorm((6, 2, 3)), nn.Flatten(), nn.Linear(36, 5)],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.Softmax(1)],
    ],
    ids=["relu", "max_pool", "layer_norm", "softmax"],
)
def test_heads_that_are_not_affine(oracle, head):
    model = models.seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(*head))).double()
    x = images((2, 3))
    program = capture(model, x)
    assert Cut(program, *find_layer(program, model, "0", 2)).affine is None
    got = fastcam.attribute(model, x, "hires_cam", targets=2, layer="0", relu=False)
    want = oracle.raw_maps("hires_cam", *oracle.tap(model, "0", x, oracle.logit([2] * 3))[:2], relu=False)
    torch.testing.assert_close(got.raw, want, rtol=0, atol=1e-12)


def test_uniform_head_is_decided_for_every_class(oracle):
    """Class 0 weighs all positions alike, class 1 does not."""
    model = with_head("flatten_linear")
    with torch.no_grad():
        model[1][1].weight[0] = 0.5
    x = images((2, 3))
    for c in (0, 1):
        got = fastcam.attribute(model, x, "hires_cam", targets=c, layer="0", relu=False)
        want = oracle.raw_maps("hires_cam", *oracle.tap(model, "0", x, oracle.logit([c] * 3))[:2], relu=False)
        torch.testing.assert_close(got.raw, want, rtol=0, atol=1e-12)


def test_head_analysis_follows_the_weights(oracle):
    """A head explained at its zero initialisation and again after training."""
    model = with_head("flatten_linear")
    trained = model[1][1].weight.detach().clone()
    with torch.no_grad():
        model[1][1].weight.zero_()
    x = images((2, 3))
    assert not fastcam.attribute(model, x, "hires_cam", targets=1, layer="0", relu=False).raw.any()
    with torch.no_grad():
        model[1][1].weight.copy_(trained)
    got = fastcam.attribute(model, x, "hires_cam", targets=1, layer="0", relu=False)
    want = oracle.raw_maps("hires_cam", *oracle.tap(model, "0", x, oracle.logit([1] * 3))[:2], relu=False)
    torch.testing.assert_close(got.raw, want, rtol=0, atol=1e-12)


def test_cam_reads_the_weights_of_a_linear_layer():
    """W[c] itself, to the last bit, whatever Z is."""
    net = models.gap_linear()
    got = fastcam.attribute(net, images((13, 9)).float(), "cam", targets=[0, 3, 4], layer="features")
    torch.testing.assert_close(got.weights, net.head[2].weight.detach()[[0, 3, 4]], rtol=2e-7, atol=0)


def test_two_calls_of_the_functional_spelling_agree():
    """Pool + linear written with functions is the same program."""

    class Functional(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.features, self.fc = net.features, net.head[2]

        def forward(self, x):
            return functional.linear(self.features(x).mean(dim=(-2, -1)), self.fc.weight, self.fc.bias)

    net, x = models.gap_linear().double(), images()
    for method in METHODS:
        one = fastcam.attribute(net, x, method, targets=2, layer="features").raw
        two = fastcam.attribute(Functional(net).eval(), x, method, targets=2, layer="features").raw
        torch.testing.assert_close(one, two, rtol=0, atol=1e-13)
        assert math.isfinite(float(one.sum()))
