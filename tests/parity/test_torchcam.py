"""Against TorchCAM 0.5.0: equal where it follows the papers, and its known deviations (docs/parity.md)."""

from __future__ import annotations

import contextlib

import pytest
import torch

import fastcam
from fastcam._testing import models

pytestmark = pytest.mark.peers
with contextlib.suppress(ImportError):  # the peer imports torchvision, which may need help beside a CPU-only torch
    models.torchvision_models()
peer = pytest.importorskip("torchcam.methods", reason="needs torchcam, extra 'peers'")

NAMES = {
    "cam": "CAM",
    "grad_cam": "GradCAM",
    "grad_cam_pp": "GradCAMpp",
    "xgrad_cam": "XGradCAM",
    "layer_cam": "LayerCAM",
}


def run_peer(method, net, layer, images, classes, normalized=False, **options):
    """(B, h, w); after its ReLU, but for CAM"""
    with getattr(peer, NAMES[method])(net, layer, input_shape=tuple(images.shape[1:]), **options) as extractor:
        scores = net(images.clone().requires_grad_())
        return extractor(list(classes), scores, normalized=normalized)[0].detach()


def compare(case, close, method, batch, exact, **options):
    x, classes = case.images(batch), case.classes(batch)
    ours = fastcam.attribute(case.net, x, method, targets=classes, layer=case.layer, size="layer")
    close(ours.raw, run_peer(method, case.peer, case.layer, x, classes, **options), exact)
    scaled = run_peer(method, case.peer, case.layer, x, classes, normalized=True, **options)
    for one, theirs, span in zip(ours.maps, scaled, ours.raw.amax((1, 2)) - ours.raw.amin((1, 2)), strict=True):
        # (m - min) / (max - min + 1e-8)
        torch.testing.assert_close(one * span / (span + 1e-8), theirs, rtol=0, atol=max(exact, 2e-4))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", ["grad_cam", "xgrad_cam", "layer_cam"])
def test_maps(case, close, method, batch):
    compare(case, close, method, batch, 1e-5 if method == "xgrad_cam" else 1e-10)  # XGrad: 1e-8 added to each S_k


@pytest.mark.parametrize("batch", [1, 3])
def test_cam(case, close, batch):
    if case.closed:
        compare(case, close, "cam", batch, 1e-10, fc_layer="head.2" if hasattr(case.peer, "head") else "fc")
        return
    with pytest.raises(ValueError, match="cam needs a head that averages"):  # the peer would take any linear layer
        fastcam.attribute(case.net, case.images(batch), "cam", targets=0, layer=case.layer)


# --- intended deviations: (a) fastcam follows the definition, (b) the peer still does what it is known for ---


def tiny(act="module", dtype=torch.float64):
    draw = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(2))
    return models.vgg_like(act=act).to(dtype), draw.to(dtype)


def test_t1_grad_cam_pp_without_its_division(case, oracle, close):
    x, classes = case.images(3), case.classes(3)
    a, g, _ = oracle.tap(case.net, case.layer, x, oracle.logit(classes))
    ours = fastcam.attribute(case.net, x, "grad_cam_pp", targets=classes, layer=case.layer)
    want = oracle.raw_maps("grad_cam_pp", a, g)
    close(ours.raw, want.to(case.dtype))
    undivided = ((g**2 * g.clamp(min=0)).sum((2, 3))[..., None, None] * a).sum(1).clamp(min=0)
    theirs = run_peer("grad_cam_pp", case.peer, case.layer, x, classes)
    close(theirs, undivided.to(case.dtype))
    assert float((oracle.min_max(undivided) - oracle.min_max(want)).abs().max()) > 0.01


def test_t2_flat_map_in_float16():
    net = models.by_hand([[1.0, 0.5], [0.5, 1.0]]).half()
    x = torch.full((1, 2, 4, 4), 0.5, dtype=torch.float16)
    ours = fastcam.attribute(net, x, "grad_cam", targets=0, layer="features", size="layer")
    assert not ours.maps.any()
    assert run_peer("grad_cam", net, "features", x, [0], normalized=True).isnan().all()
    wide = net.float()
    assert not fastcam.attribute(wide, x.float(), "grad_cam", targets=0, layer="features").maps.any()
    assert not run_peer("grad_cam", wide, "features", x.float(), [0], normalized=True).any()


@pytest.mark.parametrize("method", ["grad_cam", "xgrad_cam"])
def test_t4_in_place_operator_after_the_layer(oracle, method):
    found = {}
    want = oracle.explain(tiny()[0], "features.1.conv", tiny()[1], method, oracle.logit([1] * 3))[1]
    for act in ("module", "inplace"):
        net, x = tiny(act)
        ours = fastcam.attribute(net, x, method, targets=1, layer="features.1.conv").raw
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-10 * float(want.max()))
        found[act] = run_peer(method, net, "features.1.conv", x, [1] * 3, normalized=True)
    assert float((found["module"] - found["inplace"]).abs().max()) > 0.1


def test_no_state_left_by_either():
    """Both sides keep gradients and flags; a reminder that this is no deviation."""
    net, x = tiny()
    run_peer("grad_cam", net, "features", x, [1] * 3)
    fastcam.attribute(net, x, "grad_cam", targets=1, layer="features")
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
