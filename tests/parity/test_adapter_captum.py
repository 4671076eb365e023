"""fastcam.adapters.captum against Captum 0.9.0: the same script, the same numbers (docs/adapters.md)."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:Setting")]
peer = pytest.importorskip("captum.attr", reason="needs captum, extra 'peers'")

from captum import metrics  # noqa: E402
from captum.attr._core import lrp  # noqa: E402
from captum.attr._utils import lrp_rules  # noqa: E402

from fastcam.adapters import captum as ours  # noqa: E402

CLASSES = [3, 0, 4]


class Stages(nn.Module):
    """Every step a module of its own that runs once, no two non-linear ones in a row: where Captum is right."""

    def __init__(self, *features: nn.Module, classifier: nn.Module):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = classifier

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def pooled():
    norm = nn.BatchNorm2d(6)
    features = (nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3, padding=1))
    return Stages(*features, nn.ReLU(), nn.AdaptiveAvgPool2d(1), classifier=nn.Linear(8, 5))


def hidden():
    features = (nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Conv2d(6, 8, 2), nn.ReLU())
    return Stages(*features, classifier=nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)))


NETS = {"pooled": pooled, "hidden": hidden}
LAYERS = {"pooled": "features.4", "hidden": "features.3"}
TARGETS = {
    "int": lambda n: 1,
    "tensor": lambda n: torch.tensor(CLASSES[:n]),
    "list": lambda n: CLASSES[:n],
    "tuples": lambda n: [(c,) for c in CLASSES[:n]],
    "negative": lambda n: -1,
}


def images(seed=1, dtype=torch.float64):
    return torch.randn(3, 3, 12, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found, want, dtype, exact=1e-10):
    tolerance = 1e-4 if dtype == torch.float32 else exact
    assert type(found) is type(want)
    for got, right in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, want)), strict=True):
        assert got.shape == right.shape
        assert got.dtype == right.dtype
        assert not got.requires_grad
        torch.testing.assert_close(got, right.detach(), rtol=0, atol=tolerance * float(right.detach().abs().max()))


def both(net, cls, x, layer=None, **call):
    """By the adapter, and by Captum on a copy."""
    twin = copy.deepcopy(net)
    args = [[], []] if layer is None else [[net.get_submodule(layer)], [twin.get_submodule(layer)]]
    got = getattr(ours, cls)(net, *args[0]).attribute(x, **call)
    want = getattr(peer, cls)(twin, *args[1]).attribute(x.clone(), **call)
    return got, want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_table(name, dtype, untouched):
    """Methods x layers x baselines x targets x batch sizes."""
    net = models.seeded(NETS[name]).to(dtype)
    net.features[0].weight.requires_grad_(False)
    x, base = images(dtype=dtype), images(2, dtype)
    layer = LAYERS[name]
    for kind, target in TARGETS.items():
        n = 1 if kind == "list" else 3
        calls = [
            ("LayerGradCam", layer, {}),
            ("LayerGradCam", layer, {"relu_attributions": True}),
            ("GuidedBackprop", None, {}),
            ("Deconvolution", None, {}),
            ("GuidedGradCam", layer, {}),
            ("LRP", None, {}),
            ("LayerLRP", layer, {}),
        ]
        for baseline in (None, 0.25, base[:n], base[:1]):
            calls += [("DeepLift", None, {"baselines": baseline}), ("LayerDeepLift", layer, {"baselines": baseline})]
        for cls, at, call in calls:
            with untouched(net, x, base):
                got, want = both(net, cls, x[:n], at, target=target(n), **call)
            close(got, want, dtype)


def test_tuples_and_deltas():
    net, x = models.seeded(hidden).double(), images()
    for cls, layer in (("LRP", None), ("LayerLRP", "features.3"), ("DeepLift", None), ("LayerDeepLift", "features.3")):
        got, want = both(net, cls, x, layer, target=1, return_convergence_delta=True)
        close(got[0], want[0], x.dtype)
        torch.testing.assert_close(got[1], want[1].detach(), rtol=0, atol=1e-8)
    for cls in ("GuidedBackprop", "DeepLift", "LRP"):
        found = getattr(ours, cls)(net).attribute((x,), target=2)
        assert isinstance(found, tuple)
        torch.testing.assert_close(found[0], getattr(ours, cls)(net).attribute(x, target=2))
    raw = ours.DeepLift(net, multiply_by_inputs=False).attribute(x, target=1)
    close(raw, peer.DeepLift(copy.deepcopy(net), multiply_by_inputs=False).attribute(x, target=1), x.dtype)


class Alone(nn.Module):
    """One score an image, (B,)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).squeeze(1)


def test_scores_without_a_target():
    net = nn.Sequential(models.seeded(hidden), nn.Linear(5, 1)).double()
    with torch.no_grad():
        torch.manual_seed(3)
        net[1].weight.normal_()
    close(*both(net, "GuidedBackprop", images()), torch.float64)
    alone = Alone(net).eval()
    for cls, layer in (("LayerGradCam", "net.0.features.3"), ("DeepLift", None), ("LRP", None)):
        close(*both(alone, cls, images(), layer), torch.float64)
    with pytest.raises(AssertionError, match="Target not provided when necessary"):
        ours.GuidedBackprop(net[0]).attribute(images())


@pytest.mark.parametrize("cls", ["GuidedBackprop", "DeepLift", "LRP"])
def test_inside_noise_tunnel(cls):
    """Captum's wrapper calls `attribute.__wrapped__` on an enlarged batch."""
    net = models.seeded(hidden).double()
    found = []
    for method in (getattr(ours, cls)(net), getattr(peer, cls)(copy.deepcopy(net))):
        torch.manual_seed(5)
        tunnel = peer.NoiseTunnel(method)
        options = {"nt_samples": 3, "stdevs": 0.1, "target": torch.tensor(CLASSES), "nt_type": "smoothgrad_sq"}
        found.append(tunnel.attribute(images(), **options))
    close(*found, torch.float64, 1e-6)


def test_inside_captums_metrics():
    net, x = models.seeded(hidden).double(), images()
    found = []
    for method in (ours.DeepLift(net), peer.DeepLift(copy.deepcopy(net))):
        torch.manual_seed(5)
        sensitivity = metrics.sensitivity_max(method.attribute, x, target=1, n_perturb_samples=2)
        noise = lambda inputs: (0.01 * torch.ones_like(inputs[0]), inputs[0] - 0.01)  # noqa: E731
        fidelity = metrics.infidelity(net, lambda i, n=noise: n((i,)), x, method.attribute(x, target=1), target=1)
        found.append((sensitivity, fidelity.detach()))
    close(*found, torch.float64)
    for cls in ("GuidedBackprop", "LRP"):  # whose results come channels last from here, and there
        found = []
        for method in (getattr(ours, cls)(net), getattr(peer, cls)(copy.deepcopy(net))):
            torch.manual_seed(5)
            found.append(metrics.sensitivity_max(method.attribute, x, target=1, n_perturb_samples=2))
        close(*found, torch.float64)


def test_classes_and_capabilities():
    net = models.seeded(hidden)
    layer = net.features[3]
    for cls in ("LayerGradCam", "LayerLRP", "LayerDeepLift"):
        made, theirs = getattr(ours, cls)(net, layer), getattr(peer, cls)(net, layer)
        assert isinstance(made, (peer.LayerAttribution, type(theirs)))
        assert made.layer is layer
        assert made.has_convergence_delta() == theirs.has_convergence_delta()
        assert made.multiplies_by_inputs == theirs.multiplies_by_inputs
    assert ours.DeepLift(net).forward_func is not None
    assert ours.IntegratedGradients is peer.IntegratedGradients


@pytest.mark.parametrize(
    ("cls", "layer", "call", "why"),
    [("LayerGradCam", "classifier.0", {}, "no spatial extent"),
     ("LayerGradCam", "features.3", {"attr_dim_summation": False}, "channels apart"),
     ("LayerDeepLift", "features.3", {"attribute_to_layer_input": True}, "attribute_to_layer_input"),
     ("DeepLift", None, {"custom_attribution_func": lambda m, x, b: m}, "custom_attribution_func")],
)  # fmt: skip
def test_what_is_not_covered_runs_in_captum(cls, layer, call, why, caplog, untouched):
    net, x = models.seeded(hidden).double(), images()
    with untouched(net, x), caplog.at_level(logging.WARNING, "fastcam"):
        got, want = both(net, cls, x, layer, target=1, **call)
    assert why in caplog.text
    torch.testing.assert_close(got, want, rtol=0, atol=0)


class Residual(nn.Module):
    """Every kind of step that Captum has a rule for."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.largest, self.second, self.drop = nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.Dropout()
        self.sum, self.mean, self.fc = lrp.Addition_Module(), nn.AdaptiveAvgPool2d(2), nn.Linear(24, 5)

    def forward(self, x):
        x = self.largest(self.relu(self.norm(self.first(x))))
        return self.fc(self.mean(self.sum(self.drop(self.second(x)), x)).flatten(1))


EPSILON, GAMMA, ALPHA, SAME = (
    getattr(lrp_rules, f"{n}Rule") for n in ("Epsilon", "Gamma", "Alpha1_Beta0_", "Identity")
)


@pytest.mark.parametrize(
    "rules",
    [{},
     {"first": GAMMA(), "second": GAMMA(0.5, set_bias_to_zero=True), "fc": EPSILON(0.1)},
     {"first": ALPHA(), "second": ALPHA(set_bias_to_zero=True), "fc": ALPHA()},
     {"norm": SAME(), "drop": SAME(), "relu": SAME(), "sum": EPSILON(0.2)},
     {"norm": EPSILON(0.3), "drop": EPSILON(0.3), "largest": EPSILON(0.2), "mean": EPSILON(0.3), "sum": GAMMA()}],
    ids=["none", "gamma", "alpha", "identity", "epsilon"],
)  # fmt: skip
def test_rules_of_modules(rules, caplog, untouched):
    net, x = models.seeded(Residual).double(), images()
    for name, rule in rules.items():
        net.get_submodule(name).rule = rule
    for cls, layer in (("LRP", None), ("LayerLRP", "second")):  # the layer lies beside a skip
        with untouched(net, x), caplog.at_level(logging.WARNING, "fastcam"):
            got, want = both(net, cls, x, layer, target=1)
        close(got, want, x.dtype)
    assert "own code" not in caplog.text


@pytest.mark.parametrize(("name", "rule"), [("second", SAME()), ("norm", GAMMA())], ids=["identity", "norm"])
def test_rules_that_captum_computes(name, rule, caplog):
    net, x = models.seeded(Residual).double(), images()
    net.get_submodule(name).rule = rule
    with caplog.at_level(logging.WARNING, "fastcam"):
        got, want = both(net, "LRP", x, target=1)
    assert f"module '{name}'" in caplog.text
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_strict_lrp_refuses_what_captum_refuses():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    x = images(dtype=torch.float32)
    for refuse in (peer.LRP(copy.deepcopy(net)), ours.LRP(net, strict=True)):
        with pytest.raises(TypeError, match="has no rule defined"):
            refuse.attribute(x, target=1)
    found = ours.LRP(net).attribute(x, target=1)
    assert float(found.abs().max()) > 0


def test_errors_leave_nothing(untouched):
    net, x = models.seeded(hidden).double(), images()
    with untouched(net, x):
        with pytest.raises(IndexError, match="99"):
            ours.GuidedBackprop(net).attribute(x, target=99)
        with pytest.raises(AssertionError, match="Sample output length does not match"):
            ours.DeepLift(net).attribute(x, target=[1, 2])
        with pytest.raises(AssertionError):  # Captum's own check
            ours.DeepLift(net).attribute(x, baselines=x[:2], target=1)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = self.mix(x) + x
        return self.fc(x.mean((2, 3)))


def test_c7_functional_relu_in_guided_backprop():
    """Captum hooks ReLU modules alone, and takes the plain gradient of a functional one."""
    net, x = models.seeded(Functional).double(), images()
    got, want = both(net, "GuidedBackprop", x, target=1)
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(want, plain)
    pre = net.conv(x)
    slopes = (net.fc.weight[1] @ (net.mix.weight[:, :, 0, 0] + torch.eye(6).double())) / pre[0, 0].numel()
    guided = (slopes.clamp(min=0).reshape(1, 6, 1, 1) * (pre > 0)).detach()
    torch.testing.assert_close(got, nn.functional.conv_transpose2d(guided, net.conv.weight.detach()))
    assert float((got - want).abs().max()) > 1e-3


def test_c8_relevance_of_residual_sums():
    """Captum gives a functional sum's relevance to both terms in full; relevance is then made from nothing."""
    net, x = models.seeded(Functional).double(), images()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    score = net(x)[:, 1].detach()
    (got, delta), (_, excess) = both(net, "LRP", x, target=1, return_convergence_delta=True)
    torch.testing.assert_close(got.flatten(1).sum(1), score, rtol=0, atol=1e-6)
    torch.testing.assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-6)
    assert float(excess.detach().abs().max()) > 0.1 * float(score.abs().max())


def test_accelerate():
    net = models.seeded(hidden)
    with fastcam.adapters.accelerate("captum"):
        assert type(peer.DeepLift(net)) is ours.DeepLift
        assert type(peer.LayerGradCam(net, net.features[3])) is ours.LayerGradCam
        assert type(peer.DeepLiftShap(net)) is peer.DeepLiftShap  # a subclass of DeepLift, and Captum's
    assert type(peer.DeepLift(net)) is peer.DeepLift
