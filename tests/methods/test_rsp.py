"""Relative Sectional Propagation against a plain version, image by image, and its totals. Float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing.models import residual

IMAGES = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
START = 8


def chain() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 16), nn.ReLU(), nn.Linear(16, 4),
    ).double().eval()  # fmt: skip


def divide(a, b):
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


def pulled(function, x, message):
    """The transpose of `function`'s derivative at x, by autograd."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad((function(leaf) * message).sum(), leaf)[0]


def plain_map(model, image, targets, column):
    """The map of one image (1, C, H, W) for one of its targets."""
    inputs, x = [], image
    with torch.no_grad():
        for module in model[: START + 1]:
            inputs.append(x.clone())
            x = module(x.clone())
    maps = []
    for target in targets:
        gradient = pulled(lambda t, c=target: model[START + 1 :](t)[0, c], x, torch.ones((), dtype=torch.float64))
        product = x * gradient.mean((2, 3), keepdim=True)
        maps.append(product / product.max() if product.max() > 0 else product)
    r = maps[column]
    if len(maps) > 1:
        d = (len(maps) - 1) * r - sum(m for i, m in enumerate(maps) if i != column)
        d = d.clamp(min=0) / d.clamp(min=0).sum() + d.clamp(max=0) / d.clamp(max=0).sum().abs()
        s = d.sum(1, keepdim=True)
        s = 2 * s.clamp(min=0) / s.clamp(min=0).sum() + s.clamp(max=0) / s.clamp(max=0).sum().abs()
        r = (s / r.shape[1]).expand_as(r)
    totals = [float(r.sum())]
    for module, x in zip(reversed(model[: START + 1]), reversed(inputs), strict=True):
        if isinstance(module, nn.MaxPool2d):
            r = pulled(module, x, r)
        elif isinstance(module, nn.Conv2d):
            w = module.weight.detach()
            geometry = {"stride": module.stride, "padding": module.padding, "groups": module.groups}
            run = lambda u, v, g=geometry: functional.conv2d(u, v, None, **g)  # noqa: E731
            if module is model[0]:
                low, high, ones = x.min(), x.max(), torch.ones_like(x)
                up, down = w.clamp(min=0), w.clamp(max=0)
                s = divide(r, run(x, w) - low * run(ones, up) - high * run(ones, down))
                r = (x - low) * pulled(partial(run, v=up), x, s) + (x - high) * pulled(partial(run, v=down), x, s)
            else:
                active, found = x.clamp(min=0), 0
                for sign in (1, -1):
                    q = (sign * r).clamp(min=0)
                    g = pulled(partial(run, active), w, q)
                    back = pulled(partial(run, v=g), active, divide(q, run(active, g)))
                    found = found + sign * active * back
                if module.kernel_size[0] > 1:
                    found = 2 * found
                    found = found - r.sum() / found.count_nonzero() * (found != 0)
                r = found
                totals.append(float(r.sum()))
    return r.sum(1)[0], totals


@pytest.mark.parametrize("targets", [[[0], [1], [2]], [[0, 2, 1], [1, 3, 0], [2, 0, 3]]], ids=["one", "several"])
def test_a_chain_of_convolutions_equals_the_plain_version(targets):
    model = chain()
    chosen = torch.tensor(targets) if len(targets[0]) > 1 else torch.tensor(targets)[:, 0]
    result = fastcam.attribute(model, IMAGES, "rsp", targets=chosen, layer=str(START), normalize=False)
    maps = result.maps if result.maps.ndim == 4 else result.maps.unsqueeze(1)
    for image, present in enumerate(targets):
        for column in range(len(present)):
            want, totals = plain_map(model, IMAGES[image : image + 1], present, column)
            scale = float(want.abs().max())
            torch.testing.assert_close(maps[image, column], want, rtol=1e-9, atol=1e-11 * scale)
            assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-9)  # kept from layer to layer


def test_the_start_is_found_and_grey_images_and_empty_batches_give_numbers():
    model = chain()
    found = fastcam.attribute(model, IMAGES, "rsp", targets=1)
    assert found.layer == str(START)
    assert "purging" in found.options["certainty"]
    grey = fastcam.attribute(model, torch.full((1, 3, 16, 16), 0.25).double(), "rsp", targets=0)
    assert grey.maps.isfinite().all()
    assert fastcam.attribute(model, IMAGES[:0], "rsp", targets=torch.zeros(0, 2).long()).maps.shape == (0, 2, 16, 16)


def test_what_the_released_form_does_not_cover_is_refused():
    with pytest.raises(fastcam.UnsupportedOpError, match="chains of convolutions"):
        fastcam.attribute(residual().double(), IMAGES, "rsp", targets=0)
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    with pytest.raises(ValueError, match="none below this layer"):
        fastcam.attribute(net, IMAGES, "rsp", layer="0", targets=0)
    with pytest.raises(ValueError, match="reshape_transform"):
        fastcam.Explainer(chain(), "rsp", reshape_transform=lambda t: t)
