"""Composites against Zennit, run as it is (marker `peers`): random weights, float64.

Zennit's packaged release leaves a batch norm's eps in place after merging it into the convolution; here its merged
norms get eps = 0, which is what its source repository does.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing.models import torchvision_models

pytestmark = pytest.mark.peers

for package in ("torchvision", "zennit"):  # without a look inside: collected where neither is
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, extra 'peers'", allow_module_level=True)
models = torchvision_models()  # before Zennit, which imports torchvision itself
from zennit.attribution import Gradient  # noqa: E402
from zennit.canonizers import SequentialMergeBatchNorm  # noqa: E402
from zennit.composites import COMPOSITES  # noqa: E402
from zennit.torchvision import ResNetCanonizer, VGGCanonizer  # noqa: E402

NAMES = (
    "epsilon_plus", "epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1", "epsilon_alpha2_beta1_flat",
    "guided_backprop", "deconvnet", "excitation_backprop",
)  # fmt: skip
#: Further networks: test_adapter_zennit.py.
NETWORKS = {"vgg16_bn": VGGCanonizer, "resnet50": ResNetCanonizer}


@pytest.fixture(autouse=True)
def exact_merging(monkeypatch):
    original = SequentialMergeBatchNorm.merge_batch_norm

    def merge(modules, batch_norm):
        original(modules, batch_norm)
        batch_norm.eps = 0.0

    monkeypatch.setattr(SequentialMergeBatchNorm, "merge_batch_norm", staticmethod(merge))


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = getattr(models, name)(weights=None)
    if name.startswith("vgg"):  # its own classifier is most of the time and none of the rules
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 1000))
    model = model.double().eval()
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator).double() * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator).double() + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator).double() + 0.5)
            module.bias.data.copy_(torch.randn(module.num_features, generator=generator).double() * 0.1)
    return model


@pytest.mark.parametrize("composite", NAMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_composites(name, composite):
    model = network(name)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([5, 700])
    box = {"low": -3.0, "high": 3.0} if composite == "epsilon_gamma_box" else {}
    ours = fastcam.attribute(
        model, images, "lrp", composite=composite, targets=targets, normalize=False, return_relevance=True, **box
    )
    gradients = composite in ("guided_backprop", "deconvnet")
    bounds = {key: torch.full((1, 3, 1, 1), value).double() for key, value in box.items()}
    made = COMPOSITES[composite](canonizers=[] if gradients else [NETWORKS[name]()], **bounds)
    with Gradient(model, made) as attributor:
        output, theirs = attributor(images, torch.eye(1000, dtype=torch.float64)[targets])
    torch.testing.assert_close(ours.scores, output.detach(), rtol=1e-8, atol=1e-8)
    error = (ours.extra["relevance"] - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-8, f"{name} {composite}: {error:.2g}"
