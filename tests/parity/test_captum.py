"""Against Captum 0.9.0: Grad-CAM and gradient x activation, which follow the papers, and DeepLIFT, which does on some
networks of modules that each run once. The tests called c1 to c5 (docs/parity.md) show what it does on others.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing import models
from fastcam._testing.heads import head_net
from fastcam._testing.rescale import draw

pytestmark = pytest.mark.peers
peer = pytest.importorskip("captum.attr", reason="needs captum, extra 'peers'")


def grad_cam(net, layer, images, targets, **options) -> torch.Tensor:
    """(B, h, w)"""
    found = peer.LayerGradCam(net, layer).attribute(images, target=torch.tensor(targets), **options)
    return found.squeeze(1).detach()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("relu", [False, True])
def test_grad_cam(case, close, relu, batch):
    x, classes = case.images(batch), case.classes(batch)
    ours = fastcam.attribute(case.net, x, "grad_cam", targets=classes, layer=case.layer, relu=relu).raw
    close(ours, grad_cam(case.peer, case.peer_layer, x, classes, relu_attributions=relu))


@pytest.mark.parametrize("batch", [1, 3])
def test_hires_cam_is_gradient_times_activation_over_channels(case, close, batch):
    x, classes = case.images(batch), case.classes(batch)
    product = peer.LayerGradientXActivation(case.peer, case.peer_layer).attribute(x, target=torch.tensor(classes))
    ours = fastcam.attribute(case.net, x, "hires_cam", targets=classes, layer=case.layer, relu=False).raw
    close(ours, product.detach().sum(1))


def test_resize(case, oracle):
    """Its helper in bilinear mode is our resize; its default is the nearest neighbour."""
    x, classes = case.images(2), case.classes(2)
    found = peer.LayerGradCam(case.peer, case.peer_layer).attribute(x, target=torch.tensor(classes)).detach()
    resized = peer.LayerAttribution.interpolate(found, tuple(x.shape[2:]), interpolate_mode="bilinear").squeeze(1)
    ours = fastcam.attribute(
        case.net, x, "grad_cam", targets=classes, layer=case.layer, relu=False, normalize=False
    ).maps
    tolerance = 1e-4 if case.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(ours, resized, rtol=0, atol=tolerance * float(resized.abs().max()))


@pytest.mark.parametrize("act", ["module", "inplace", "functional"])
def test_in_place_twins_agree_in_both(act, oracle, close):
    net = models.vgg_like(act=act).double()
    x = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want = oracle.explain(net, "features.1.conv", x, "grad_cam", oracle.logit([1] * 3))[1]
    close(fastcam.attribute(net, x, "grad_cam", targets=1, layer="features.1.conv").raw, want)
    close(grad_cam(net, net.features[1].conv, x, [1] * 3, relu_attributions=True), want)


# --- DeepLIFT ---


def images(batch=3, seed=1) -> torch.Tensor:
    return draw(batch, 3, 12, 12, seed=seed)


OTHER = images(seed=2)
CLASSES = torch.tensor([3, 0, 4])


def ours(net, x, base, layer=None, targets=CLASSES):
    """Contributions (B, K, *spatial) and the residual."""
    options = {"reference": base, "layer": layer, "return_contributions": True, "targets": targets[: len(x)]}
    found = fastcam.attribute(net, x, "deep_lift", **options)
    return found.extra["contributions"], found.delta


def theirs(net, x, base, layer=None, targets=CLASSES):
    net = copy.deepcopy(net)
    method = peer.DeepLift(net) if layer is None else peer.LayerDeepLift(net, net.get_submodule(layer))
    found, delta = method.attribute(x, base, target=targets[: len(x)], return_convergence_delta=True)
    return found.detach(), delta.detach()


def of_modules(activation: type[nn.Module]) -> nn.Module:
    """Pools, batch norm and hidden layers; each activation a module of its own, no two such steps in a row."""

    def build() -> nn.Module:
        trunk = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), activation(), nn.BatchNorm2d(6), nn.MaxPool2d(2))
        head = (nn.Conv2d(6, 8, 3, padding=1), activation(), nn.AvgPool2d(2), nn.Flatten())
        return models.Net(trunk, *head, nn.Linear(72, 12), activation(), nn.Linear(12, 5))

    return models.seeded(build).double()


@pytest.mark.parametrize("layer", [None, "features", "features.0", "head.0"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus])
def test_deep_lift_on_networks_of_modules(activation, layer, close):
    net, x = of_modules(activation), images()
    for base in (OTHER, torch.zeros_like(x)):
        found, delta = ours(net, x, base, layer)
        expected, their_delta = theirs(net, x, base, layer)
        close(found, expected)
        assert delta.abs().max() < 1e-12
        assert their_delta.abs().max() < 1e-6  # in float32, whatever the network


@pytest.mark.parametrize("name", ["vgg", "gap", "no bias"])
def test_lift_cam_from_its_layer_deep_lift(name, close):
    """Against features of zero: its LayerDeepLift at the input of the head alone."""
    net, x = head_net(name), images()
    features = net.features(x).detach()
    expected, _ = theirs(net.head, features, torch.zeros_like(features))
    close(fastcam.attribute(net, x, "lift_cam", layer="features", targets=CLASSES).weights, expected.sum((2, 3)))


@pytest.mark.parametrize("stride", [1, 2])
def test_c1_overlapping_max_pools_lose_contributions(stride):
    """Windows that share a pixel overwrite each other there; the sum is then off by tens of percent."""

    def build() -> nn.Module:
        return models.Net(nn.Conv2d(3, 6, 3), nn.MaxPool2d(3, stride), nn.Flatten(), nn.LazyLinear(5))

    torch.manual_seed(0)
    net = build().double()
    net(images(1))
    net.eval()
    x = images()
    found, delta = ours(net, x, OTHER)
    with torch.no_grad():
        change = (net(x) - net(OTHER)).gather(1, CLASSES[:, None])[:, 0]
    torch.testing.assert_close(found.sum((1, 2, 3)), change, rtol=0, atol=1e-12)
    assert delta.abs().max() < 1e-12
    expected, _ = theirs(net, x, OTHER)
    lost = (expected.sum((1, 2, 3)) - change).abs() / change.abs()
    assert lost.max() > 0.05


def test_c2_its_max_pool_takes_equal_pixels_gradients_from_the_first_image():
    """Where pixel and reference are equal its multiplier is the first image's, whichever image asks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(108, 5)).double().eval()
    x, base = images(), images(seed=2)
    base[:, :, ::2] = x[:, :, ::2]
    method = peer.DeepLift(copy.deepcopy(net), multiply_by_inputs=False)
    whole, alone = (method.attribute(x[at], base[at], target=CLASSES[at]).detach() for at in (slice(3), slice(1, 2)))
    assert (whole[1:2] - alone).abs().max() > 1e-3
    mine, _ = ours(net, x, base)
    torch.testing.assert_close(mine[1:2], ours(net, x[1:2], base[1:2], targets=CLASSES[1:2])[0], rtol=0, atol=1e-14)


def test_c3_its_softmax_depends_on_the_batch():
    """It divides by the number of elements of the whole batch."""
    net, x = of_modules(nn.ReLU), images()
    net.head.append(nn.Softmax(1))
    net.eval()
    whole, delta = ours(net, x, OTHER)
    alone, _ = ours(net, x[:1], OTHER[:1])
    torch.testing.assert_close(alone, whole[:1], rtol=0, atol=1e-14)
    assert delta.abs().max() < 1e-12
    their_whole, _ = theirs(net, x, OTHER)
    their_alone, _ = theirs(net, x[:1], OTHER[:1])
    assert (their_whole[:1] - their_alone).abs().max() > 1e-3 * their_alone.abs().max()


@pytest.mark.parametrize("middle", [[], [nn.Identity()]], ids=["adjacent", "identity"])
def test_c4_two_non_linear_modules_in_a_row(middle):
    """The first takes the second's plain gradient: hooks on the tensor between them run in the wrong order."""

    def build(*between) -> nn.Module:
        steps = (nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *between, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(216, 5))
        return models.seeded(lambda: nn.Sequential(*copy.deepcopy(steps))).double()

    torch.manual_seed(0)
    net, x = build(*middle), images()
    found, delta = ours(net, x, OTHER)
    assert delta.abs().max() < 1e-12
    with torch.no_grad():
        change = (net(x) - net(OTHER)).gather(1, CLASSES[:, None])[:, 0]
    expected, _ = theirs(net, x, OTHER)
    assert (expected.sum((1, 2, 3)) - change).abs().max() > 1e-3
    apart = nn.Sequential(*list(net)[:2], nn.AvgPool2d(1), *list(net)[2:])  # a linear step between them cures it
    torch.testing.assert_close(theirs(apart, x, OTHER)[0], found, rtol=0, atol=1e-12)


class Spelled(nn.Module):
    """Two rectified convolutions, the rectifiers functions or one module used twice."""

    def __init__(self, relu):
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3), nn.Linear(5, 5)
        self.relu = relu

    def forward(self, x):
        return self.fc(self.relu(self.two(self.relu(self.one(x)))).mean((2, 3)))


def spelled(relu) -> nn.Module:
    return models.seeded(lambda: Spelled(relu)).double()


def test_c5_functional_relu_is_ignored_silently():
    net, x = spelled(functional.relu), images()
    found, delta = ours(net, x, OTHER)
    twin, _ = ours(spelled(nn.ReLU()), x, OTHER)
    assert torch.equal(found, twin)
    assert delta.abs().max() < 1e-12
    free = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(free).gather(1, CLASSES[:, None]).sum(), free)
    expected, their_delta = theirs(net, x, OTHER)
    torch.testing.assert_close(expected, gradient * (x - OTHER), rtol=0, atol=1e-12)
    assert their_delta.abs().max() > 1e-3


def test_c5_a_module_used_twice_raises():
    net, x = spelled(nn.ReLU()), images()
    _, delta = ours(net, x, OTHER)
    assert delta.abs().max() < 1e-12
    with pytest.raises(RuntimeError):
        theirs(net, x, OTHER)


@pytest.mark.parametrize("name", ["epsilon", "gamma", "zplus"])
def test_lrp_under_its_convention(name):
    """Signed inputs, biases, overlapping pools, a batch norm: its rules, stabiliser and seed."""
    from captum.attr._utils import lrp_rules

    from fastcam.relevance import Composite, Epsilon, Gamma, ZPlus

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
            self.pool, self.two, self.act2 = nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 8, 3), nn.Tanh()
            self.mean, self.three = nn.AdaptiveAvgPool2d(2), nn.Conv2d(8, 8, 2)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.pool(self.act(self.norm(self.one(x))))
            x = self.three(self.mean(self.act2(self.two(x))))
            return self.head(torch.flatten(x, 1))

    model = models.seeded(Net).double()
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    theirs, ours = {
        "epsilon": (lrp_rules.EpsilonRule, Epsilon()),
        "gamma": (lrp_rules.GammaRule, Gamma(0.25)),
        "zplus": (lrp_rules.Alpha1_Beta0_Rule, ZPlus()),
    }[name]
    twin = copy.deepcopy(model)
    for module in twin.children():
        if isinstance(module, nn.Conv2d):
            module.rule = theirs()
        elif not isinstance(module, (nn.ReLU, nn.Tanh)):
            module.rule = lrp_rules.EpsilonRule()
    want, delta = peer.LRP(twin).attribute(x, target=torch.tensor([0, 3, 1]), return_convergence_delta=True)
    found = fastcam.attribute(
        model, x, "lrp", convention="captum", composite=Composite(conv=ours), targets=[0, 3, 1], normalize=False,
        return_relevance=True,
    )  # fmt: skip
    scale = float(want.detach().abs().max())
    torch.testing.assert_close(found.extra["relevance"], want.detach(), rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(found.delta.abs(), delta.detach().abs(), rtol=1e-8, atol=1e-8 * scale)
