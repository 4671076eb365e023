"""Smooth Grad-CAM++ against its written formula in float64 loops, and where it is Grad-CAM++."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models
from fastcam.program.session import CapturedSession

NETS = {"gap": models.gap_linear, "vgg": models.vgg_like, "residual": models.residual}
CLASSES = [4, 0, 2]


def images(size=(11, 14), batch=3, seed=0) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    return {name: build().double() for name, build in NETS.items()}


def explain(net, x, targets=CLASSES, method="smooth_grad_cam_pp", layer="features", **options):
    return fastcam.attribute(net, x, method, targets=targets, layer=layer, **options)


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


def written(oracle, net, x, score, n=4, noise_std=0.3, seed=0, layer="features"):
    """(B, K): alpha of the written formula, element by element in Python numbers."""
    a, _, _ = oracle.tap(net, layer, x, score)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        noise = torch.randn((1, *x.shape[1:]), generator=generator).to(x.dtype)
        found.append(oracle.tap(net, layer, x + noise_std * noise, score)[1])
    alphas = torch.zeros(a.shape[:2], dtype=torch.float64)
    for b in range(a.shape[0]):
        for k in range(a.shape[1]):
            total = float(a[b, k].sum())
            samples = torch.stack([g[b, k].flatten() for g in found], dim=1).tolist()
            for gs in samples:
                first, second, third = (sum(g**power for g in gs) / n for power in (1, 2, 3))
                bottom = 2 * second + total * third
                if second > 0 and abs(bottom / second) >= 1e-6:
                    alphas[b, k] += second / bottom * max(first, 0)
    return a, alphas


@pytest.mark.parametrize("options", [{}, {"n": 1, "noise_std": 1.0}, {"n": 7, "noise_std": 0.05, "seed": 3}], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_written_formula(nets, oracle, name, options):
    a, alpha = written(oracle, nets[name], images(), oracle.logit(CLASSES), **options)
    got = explain(nets[name], images(), **options)
    close(got.weights, alpha)
    raw = (alpha[..., None, None] * a).sum(1).clamp(min=0)
    assert raw.amax((1, 2)).min() > 0
    close(got.raw, raw)
    torch.testing.assert_close(got.maps, oracle.min_max(oracle.resized(raw, (11, 14))), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", ["features.0.conv", "features.1.conv"])
def test_written_formula_at_signed_layers(nets, oracle, layer):
    _, alpha = written(oracle, nets["vgg"], images(), oracle.logit(CLASSES), layer=layer)
    close(explain(nets["vgg"], images(), layer=layer).weights, alpha, 1e-11)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_dimensions(oracle, rank):
    net, x = models.vgg_like(rank=rank).double(), images((9, 8, 10)[:rank], batch=2)
    _, alpha = written(oracle, net, x, oracle.logit([1, 3]), n=2)
    close(explain(net, x, [1, 3], n=2).weights, alpha)


# --- where it is Grad-CAM++ ---


def test_closed_heads_are_grad_cam_pp_without_extra_passes(nets, monkeypatch):
    seen = []
    forward = CapturedSession.forward
    monkeypatch.setattr(CapturedSession, "forward", lambda *args, **kw: seen.append(1) or forward(*args, **kw))
    got = explain(nets["gap"], images(), n=50)
    assert len(seen) == 1
    w = nets["gap"].head[2].weight.detach()[CLASSES]
    a = nets["gap"].features(images()).detach()
    close(got.weights, w.clamp(min=0) / (2 + w * a.mean((2, 3))))
    close(got.raw, explain(nets["gap"], images(), method="grad_cam_pp").raw)


def test_closed_form_is_the_long_way(nets):
    """The same head behind a callable target, which takes the passes."""
    want = explain(nets["gap"], images(), 2)
    got = explain(nets["gap"], images(), lambda y: y[:, 2])
    close(got.weights, want.weights)
    close(got.raw, want.raw)


@pytest.mark.parametrize("name", NETS)
def test_one_copy_without_noise(nets, name):
    got, want = (explain(nets[name], images(), 1, method=m, **o) for m, o in PAIR)
    close(got.weights, want.weights)
    close(got.raw, want.raw)


PAIR = (("smooth_grad_cam_pp", {"n": 1, "noise_std": 0.0}), ("grad_cam_pp", {}))


# --- seeds, batches, targets ---


def test_noise_follows_its_seed_alone(nets):
    net = nets["vgg"]
    first, again, other = (explain(net, images(), seed=seed).weights for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert float((first - other).abs().max()) > 1e-3 * float(first.abs().max())
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert torch.equal(explain(net, images()).weights, first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batch_is_a_loop(nets):
    for net in nets.values():
        together = explain(net, images())
        for b in range(3):
            alone = explain(net, images()[b : b + 1], CLASSES[b : b + 1])
            close(together.weights[b], alone.weights[0])
            torch.testing.assert_close(together.maps[b], alone.maps[0], rtol=0, atol=1e-11)


def test_several_targets_are_a_loop(nets):
    classes = torch.tensor([[4, 0], [1, 2], [0, 3]])
    for net in nets.values():
        together = explain(net, images(), classes)
        assert together.maps.shape == (3, 2, 11, 14)
        for t in range(2):
            alone = explain(net, images(), classes[:, t])
            close(together.weights[:, t], alone.weights)
            close(together.raw[:, t], alone.raw)


def test_default_target_is_the_clean_image_s(nets):
    net = nets["vgg"]
    best = net(images()).argmax(1)
    noisy = images() + 5 * torch.randn((1, 3, 11, 14), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(net(noisy).argmax(1), best)
    got = explain(net, images(), None, noise_std=5.0)
    assert torch.equal(got.targets, best)
    assert torch.equal(got.weights, explain(net, images(), best, noise_std=5.0).weights)


def test_callable(nets, oracle):
    def score(y):
        return y.softmax(1)[:, 1]

    for name in NETS:
        _, alpha = written(oracle, nets[name], images(), score)
        close(explain(nets[name], images(), score).weights, alpha)


def test_networks_that_cannot_be_captured(oracle, caplog):
    class Branching(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.features, self.head = net.features, net.head

        def forward(self, x):
            return self.head(self.features(x if bool(x.sum() > -1e9) else -x))

    net = Branching(models.vgg_like(act="inplace")).double().eval()
    before = copy.deepcopy(net.state_dict())
    with caplog.at_level(logging.INFO, logger="fastcam"):
        got = explain(net, images(), layer="features.1.conv")
    assert "through a forward hook" in caplog.text
    _, alpha = written(oracle, net, images(), oracle.logit(CLASSES), layer="features.1.conv")
    close(got.weights, alpha, 1e-11)
    assert not any(module._forward_hooks for module in net.modules())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


# --- at the edge ---


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_powers_of_tiny_and_huge_gradients(nets, scale):
    """float32 holds neither the cube of 1e-18 nor of 1e18; alpha is then sum relu(<G>) / 2, and 1 / S where G > 0."""
    net = copy.deepcopy(nets["vgg"]).float()
    wide = copy.deepcopy(nets["vgg"])
    for one in (net, wide):
        one.head[-1].weight.data.mul_(scale)
        one.head[-1].bias.data.mul_(scale)
    want = explain(wide, images()).weights
    got = explain(net, images().float()).weights
    assert float(want.abs().max()) > 0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_dead_head_is_zeros(nets):
    net = copy.deepcopy(nets["vgg"])
    net.head[-1].weight.data.zero_()
    got = explain(net, images())
    assert not got.weights.any()
    assert not got.maps.any()
    assert got.valid.all()


def test_cancelling_denominator(nets):
    """2 + S G = 0 exactly at a signed feature: a = 0 there, not infinity."""
    net = models.by_hand([[1.0], [0.0]]).double()  # G = 1/4 on 2 x 2 positions
    x = torch.tensor([[[[-8.0, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
    got = explain(net, x, lambda y: y[:, 0], noise_std=0.0, relu=False)
    assert not got.weights.any()
    assert got.valid.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must"),
        ({"n": 2.5}, "n must"),
        ({"noise_std": -0.1}, "noise_std must"),
        ({"noise_std": float("nan")}, "noise_std must"),
    ],
)
def test_wrong_options(nets, options, message):
    with pytest.raises(ValueError, match=message):
        explain(nets["vgg"], images(), **options)
    with pytest.raises(TypeError, match="n, noise_std, seed"):
        explain(nets["vgg"], images(), samples=3)


def test_score_that_does_not_depend_on_the_layer(nets):
    with pytest.raises(RuntimeError, match="does not depend on layer 'features'"):
        explain(nets["vgg"], images(), lambda y: y[:, 1].detach())
