"""Against Captum 0.9.0, whose layer methods follow the papers: Grad-CAM and gradient x activation."""

from __future__ import annotations

import pytest
import torch

import fastcam
from fastcam._testing import models

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
