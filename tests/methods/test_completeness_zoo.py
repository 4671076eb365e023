"""Contributions of torchvision's networks, random weights, add up to the difference of the scores.

|sum - difference| at most 1e-10 (float64) and 1e-4 (float32) of the larger of |score| and sum |contributions|, at the
pixels, at an early layer and at the automatic one. Four networks by default, all with `-m slow`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing.models import torchvision_models
from fastcam._testing.rescale import draw

#: name -> early layer, with overlapping max-pools behind it where the network has them
ZOO = {
    "resnet50": "conv1",
    "vgg11": "features.0",
    "vgg16": "features.0",
    "densenet121": "features.norm0",
    "googlenet": "conv1.conv",
    "mobilenet_v3_small": "features.0",
    "mobilenet_v3_large": "features.0",
    "efficientnet_b0": "features.1",
    "convnext_tiny": "features.0",
    "squeezenet1_1": "features.0",
    "shufflenet_v2_x0_5": "conv1",
}
FAST = ["resnet50", "vgg11", "mobilenet_v3_small", "squeezenet1_1"]


def build(name: str) -> nn.Module:
    """Random weights and the batch-norm statistics of random images, so that signals neither die nor explode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        extra = {"init_weights": True} if name == "googlenet" else {}
        model = getattr(torchvision_models(), name)(weights=None, num_classes=10, **extra)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for module in norms:
            module.momentum = 1.0
        if norms:
            with torch.no_grad():
                model.train()(torch.randn(4, 3, 96, 96))
    return model.eval()


def check(name: str, dtype: torch.dtype, places: list[tuple[str, str | None]]) -> None:
    net, x = build(name).to(dtype), draw(2, 3, 64, 64, seed=1, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for method, layer in places:
        result = fastcam.attribute(net, x, method, targets=[3, 7], layer=layer, normalize=False, size="layer")
        parts = result.weights if method == "lift_cam" else result.raw
        if method == "a_fmi":
            parts = result.extra["contributions"]
        total = parts.flatten(1).abs().sum(1)
        scale = torch.maximum(total, result.scores.gather(1, torch.tensor([[3], [7]])).abs()[:, 0])
        assert result.valid.all()
        assert (total > 1e-2 * scale).all()
        assert (result.delta.abs() <= tolerance * scale).all(), (method, layer, result.delta / scale)


PLACES = [("deep_lift", None), ("lift_cam", None), ("a_fmi", None)]


@pytest.mark.parametrize("name", FAST)
def test_fast_networks_in_float32(name):
    check(name, torch.float32, [*PLACES, ("deep_lift", ZOO[name])])


@pytest.mark.parametrize("name", ["resnet50", "vgg11"])
def test_fast_networks_in_float64(name):
    check(name, torch.float64, [("deep_lift", ZOO[name])])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(ZOO))
def test_all_networks(name, dtype):
    check(name, dtype, [*PLACES, ("deep_lift", ZOO[name]), ("lift_cam", ZOO[name]), ("a_fmi", ZOO[name])])
