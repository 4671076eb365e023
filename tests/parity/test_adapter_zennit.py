"""fastcam.adapters.zennit against Zennit 0.5.1: the same script, the same numbers (docs/adapters.md).

Zennit's packaged release leaves a batch norm's eps in place after merging it into the convolution; here its merged
norms get eps = 0, which is what its source repository does.
"""

from __future__ import annotations

import copy
import importlib.util
import logging

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing.models import seeded, torchvision_models

pytestmark = pytest.mark.peers

for package in ("torchvision", "zennit"):  # without a look inside: collected where neither is
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, extra 'peers'", allow_module_level=True)
models = torchvision_models()  # before Zennit, which imports torchvision itself
from zennit import attribution as peer  # noqa: E402
from zennit import composites, rules, torchvision  # noqa: E402
from zennit.canonizers import SequentialMergeBatchNorm  # noqa: E402
from zennit.core import BasicHook, Stabilizer  # noqa: E402
from zennit.types import Activation, Convolution, Linear  # noqa: E402

from fastcam.adapters import zennit as ours  # noqa: E402

TARGETS = [5, 7, 1]


@pytest.fixture(autouse=True)
def exact_merging(monkeypatch):
    original = SequentialMergeBatchNorm.merge_batch_norm

    def merge(modules, batch_norm):
        original(modules, batch_norm)
        batch_norm.eps = 0.0

    monkeypatch.setattr(SequentialMergeBatchNorm, "merge_batch_norm", staticmethod(merge))


def lively(net):
    """Batch norms that do something."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return net


def small():
    trunk = (
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
    )
    return nn.Sequential(
        *trunk, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10)
    )


def vgg():
    net = models.vgg11_bn(weights=None)
    net.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    return net


#: name -> (builder, canonizer, side)
NETS = {
    "small": (small, SequentialMergeBatchNorm, 12),
    "resnet18": (lambda: models.resnet18(weights=None, num_classes=10), torchvision.ResNetCanonizer, 32),
    "vgg11_bn": (vgg, torchvision.VGGCanonizer, 32),
}


def network(name, dtype=torch.float64):
    return seeded(lambda: lively(NETS[name][0]())).to(dtype).eval()


def images(side, dtype=torch.float64):
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def onehot(n, dtype=torch.float64):
    return torch.eye(10, dtype=dtype)[TARGETS[:n]]


def both(net, make, x, attr_output, cls="Gradient", **options):
    """(ours, theirs), each (output, relevance); theirs on a copy."""
    with getattr(ours, cls)(net, make(), **options) as attributor:
        got = attributor(x, attr_output)
    with getattr(peer, cls)(copy.deepcopy(net), make(), **options) as attributor:
        want = attributor(x.clone(), attr_output)
    return got, tuple(part.detach() for part in want)


def close(got, want, exact=1e-10):
    for found, right in zip(got, want, strict=True):
        assert found.dtype == right.dtype
        assert found.shape == right.shape
        assert not found.requires_grad
        tolerance = 2e-4 if found.dtype == torch.float32 else exact
        torch.testing.assert_close(found, right, rtol=0, atol=tolerance * float(right.abs().max()))


@pytest.mark.parametrize("name", NETS)
def test_table(name, untouched, caplog):
    """Composites x canonizers x seeds x batch sizes x precisions; only beta_smooth has no translation."""
    _, canonizer, side = NETS[name]
    seeds = {
        "onehot": onehot,
        "function": lambda n, dtype=torch.float64: lambda output: output * onehot(n, dtype),
        "output": lambda n, dtype=torch.float64: None,
    }
    few = ("epsilon_gamma_box", "epsilon_alpha2_beta1_flat", "guided_backprop")[: 1 if name == "vgg11_bn" else 3]
    for number, (label, cls) in enumerate(composites.COMPOSITES.items()):
        if label == "beta_smooth" or (name != "small" and label not in few):
            continue
        dtype = torch.float32 if number == 0 else torch.float64
        net, x = network(name, dtype), images(side, dtype)
        box = {}
        if label == "epsilon_gamma_box":
            box = {"low": torch.full((1, 3, 1, 1), -3.0).to(dtype), "high": torch.full((1, 3, 1, 1), 3.0).to(dtype)}
        for merging, (kind, seed) in zip((True, False, True), seeds.items(), strict=True):
            n = 1 if kind == "function" else 3
            if name != "small" and kind == "output":
                continue
            canonizers = [canonizer] if merging else []
            with untouched(net, x), caplog.at_level(logging.WARNING, "fastcam"):
                got, want = both(
                    net,
                    lambda cls=cls, c=canonizers, box=box: cls(canonizers=[one() for one in c], **box),
                    x[:n],
                    seed(n, dtype),
                )
            close(got, want)
    assert "own code" not in caplog.text


def by_type(**maps):
    """A composite of layer types; keyword arguments are rules."""
    kinds = {"conv": Convolution, "linear": Linear, "activation": Activation}
    return composites.LayerMapComposite(layer_map=[(kinds[kind], rule) for kind, rule in maps.items()])


RULES = {
    "epsilon": lambda: rules.Epsilon(0.1),
    "epsilon without bias": lambda: rules.Epsilon(0.1, zero_params="bias"),
    "gamma": lambda: rules.Gamma(0.4, stabilizer=0.01),
    "z+": lambda: rules.ZPlus(0.02),
    "z+ without bias": lambda: rules.ZPlus(zero_params=["bias"]),
    "alpha-beta": lambda: rules.AlphaBeta(3.0, 2.0),
    "box": lambda: rules.ZBox(-4.0, 5.0),
    "w2": lambda: rules.WSquare(),
    "flat": lambda: rules.Flat(),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_on_convolutions(name, caplog):
    net, x = network("small"), images(12)
    with caplog.at_level(logging.WARNING, "fastcam"):
        got, want = both(
            net, lambda: by_type(conv=RULES[name](), linear=rules.Epsilon(), activation=rules.Pass()), x, onehot(3)
        )
    assert "own code" not in caplog.text
    close(got, want)


def test_maps_of_names_and_mixed_composites(caplog):
    net, x = network("small"), images(12)
    plus = composites.EpsilonPlus
    layers = [(Convolution, rules.ZPlus()), (Linear, rules.Epsilon())]
    makers = [
        lambda: composites.NameMapComposite(name_map=[(["0"], rules.Flat()), (["4", "9"], rules.Gamma(0.1))]),
        lambda: composites.NameLayerMapComposite(name_map=[(["4"], rules.Epsilon(0.2))], layer_map=layers),
        lambda: composites.SpecialFirstLayerMapComposite(layer_map=layers, first_map=[(Convolution, rules.WSquare())]),
        lambda: composites.MixedComposite([composites.NameMapComposite([(["0"], rules.Flat())]), plus()]),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING, "fastcam"):
        for make in makers:
            close(*both(net, make, x, onehot(3)))
    assert "own code" not in caplog.text


class Halved(BasicHook):
    def __init__(self):
        super().__init__(gradient_mapper=lambda grad, outputs: grad / 2, reducer=lambda inputs, grads: grads[0])


@pytest.mark.parametrize(
    ("make", "why"),
    [(lambda: by_type(conv=Halved()), "hook Halved"),
     (lambda: composites.BetaSmooth(), "hook ReLUBetaSmooth"),
     (lambda: by_type(conv=rules.Epsilon(zero_params="weight")), "zero_params=['weight']"),
     (lambda: by_type(linear=rules.Epsilon(Stabilizer(1e-3, clip=True))), "stabilizer of its own"),
     (lambda: by_type(conv=rules.Gamma(0.4, zero_params=["bias"])), "Gamma with zero_params=['bias']")],
)  # fmt: skip
def test_what_has_no_translation_runs_in_zennit(make, why, caplog, untouched):
    net, x = network("small").train(), images(12)
    with untouched(net, x), caplog.at_level(logging.WARNING, "fastcam"):
        attributor = ours.Gradient(net, make())
        got = attributor(x, onehot(3))
        attributor(x, onehot(3))
    assert caplog.text.count(why) == 1
    with peer.Gradient(copy.deepcopy(net).eval(), make()) as theirs:
        want = theirs(x.clone(), onehot(3))
    close(got, tuple(part.detach() for part in want), 0)


@pytest.mark.parametrize(
    ("cls", "options"), [("SmoothGrad", {"n_iter": 3}), ("IntegratedGradients", {"n_iter": 4})], ids=str
)
def test_averages(cls, options):
    net, x = network("small"), images(12)
    found = []
    for module, model in ((ours, net), (peer, copy.deepcopy(net))):
        torch.manual_seed(7)
        attributor = getattr(module, cls)(model, composites.EpsilonPlus(), onehot(3), **options)
        found.append(tuple(part.detach() for part in attributor(x.clone())))
    close(*found)


def test_without_a_composite_and_behind_a_softmax(caplog):
    net, x = network("small"), images(12)
    close(*both(net, lambda: None, x, onehot(3)))
    with caplog.at_level(logging.WARNING, "fastcam"):
        close(*both(nn.Sequential(net, nn.Softmax(1)).eval(), composites.EpsilonPlus, x, onehot(3)))
    assert "ends in a softmax" in caplog.text


def test_the_composite_is_not_registered_and_may_change():
    net, x = network("small"), images(12)
    composite = composites.EpsilonPlus(canonizers=[SequentialMergeBatchNorm()])
    with ours.Gradient(net, composite, attr_output=onehot(3)) as attributor:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        first = attributor(x)[1]
        with torch.no_grad():
            net[0].weight.mul_(0.5)
        second = attributor(x)[1]
    assert isinstance(attributor, peer.Gradient)
    fresh = ours.Gradient(net, composites.EpsilonPlus(canonizers=[SequentialMergeBatchNorm()]))(x, onehot(3))[1]
    torch.testing.assert_close(second, fresh)
    assert float((first - second).abs().max()) > 1e-6


def test_registered_by_the_user():
    """Hooks of a composite's own context are the user's: Zennit's gradient sees them."""
    net, x = network("small"), images(12)
    with composites.EpsilonPlus().context(net) as hooked:
        got = ours.Gradient(hooked)(x, onehot(3))
        want = peer.Gradient(hooked)(x.clone(), onehot(3))
    close(got, tuple(part.detach() for part in want), 0)


def test_graphs_hooks_and_nothing(untouched):
    """What only Zennit does: relevance with a graph, the user's own hooks (which run once), a batch of none."""
    net, x = network("small"), images(12)
    found = []
    for module, model in ((ours, net), (peer, copy.deepcopy(net))):
        composite = composites.EpsilonPlus(canonizers=[SequentialMergeBatchNorm()])
        leaf = x.clone().requires_grad_()
        with untouched(model), module.Gradient(model, composite, create_graph=True) as attributor:
            relevance = attributor(leaf, onehot(3))[1]
            with attributor.inactive():
                second = torch.autograd.grad(relevance.square().sum(), leaf)[0]
        with module.Gradient(model, composite) as attributor, attributor.inactive():
            plain = attributor(x.clone(), onehot(3))[1]
        seen = []
        handle = model[4].register_forward_hook(
            lambda m, i, output, seen=seen: seen.append(output) or output.retain_grad()
        )
        with module.Gradient(model, composite) as attributor:
            attributor(x.clone(), onehot(3))
        handle.remove()
        assert len(seen) == 1
        none = module.Gradient(model, composite)(x[:0].clone(), onehot(0))[1]
        found.append((relevance.detach(), second, plain.detach(), seen[0].grad, none.detach()))
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_errors(untouched):
    net, x = network("small"), images(12)
    with untouched(net, x):
        for bad in ([1, 2, 3], 1, lambda output: None):
            with pytest.raises(TypeError, match=r"tensor in the output's shape \(3, 10\)"):
                ours.Gradient(net, composites.EpsilonPlus())(x, bad)
        with pytest.raises(ValueError, match=r"shape \(3, 10\); got \(2, 10\)"):
            ours.Gradient(net, composites.EpsilonPlus())(x, onehot(2))
        with pytest.raises(ValueError, match="hook ReLUBetaSmooth"):
            ours.translate(composites.BetaSmooth(), net)


class Twice(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.second = self.first if again else nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        x = self.second(self.first(self.stem(x).relu()).relu()).relu()
        return self.fc(x.mean((2, 3)))


def test_z1_a_module_used_twice():
    """Two modules of the same weights are the definition, in which both libraries agree."""
    once, again, x = seeded(lambda: Twice(False)).double(), seeded(lambda: Twice(True)).double(), images(8)
    again.load_state_dict({k: v for k, v in once.state_dict().items() if not k.startswith("second")}, strict=False)
    once.second.load_state_dict(once.first.state_dict())
    right, theirs = both(once, composites.EpsilonPlus, x, onehot(3))
    close(right, theirs)
    got, want = both(again, composites.EpsilonPlus, x, onehot(3))
    close(got, right)
    assert float((want[1] - right[1]).abs().max()) > 0.01 * float(right[1].abs().max())


def test_translation_for_attribute():
    net, x = network("resnet18"), images(32)
    composite, norms = ours.translate(composites.EpsilonPlusFlat(canonizers=[torchvision.ResNetCanonizer()]), net)
    assert norms == "fold"
    got = fastcam.attribute(net, x, "lrp", composite=composite, norms=norms, targets=TARGETS)
    named = fastcam.attribute(net, x, "lrp", composite="epsilon_plus_flat", targets=TARGETS)
    torch.testing.assert_close(got.raw, named.raw, rtol=0, atol=1e-12 * float(named.raw.abs().max()))


def test_accelerate():
    net = network("small")
    with fastcam.adapters.accelerate("zennit"):
        assert type(peer.Gradient(net)) is ours.Gradient
        assert type(peer.SmoothGrad(net, n_iter=3)) is ours.SmoothGrad
    assert type(peer.Gradient(net)) is peer.Gradient
