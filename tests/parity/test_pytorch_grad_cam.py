"""Against pytorch-grad-cam 1.5.7: equal where it follows the papers, and its known deviations (docs/parity.md)."""

from __future__ import annotations

import contextlib

import pytest
import torch

import fastcam
from fastcam._testing import models

pytestmark = pytest.mark.peers
with contextlib.suppress(ImportError):  # the peer imports torchvision, which may need help beside a CPU-only torch
    models.torchvision_models()
peer = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam, extra 'peers'")

from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402

NAMES = {
    "grad_cam": "GradCAM",
    "grad_cam_pp": "GradCAMPlusPlus",
    "xgrad_cam": "XGradCAM",
    "hires_cam": "HiResCAM",
    "layer_cam": "LayerCAM",
    "eigen_cam": "EigenCAM",
    "eigen_grad_cam": "EigenGradCAM",
}


def run_peer(method, net, layer, images, classes):
    """(final maps (B, H, W) float32, maps before ReLU (B, h, w))"""
    cam = getattr(peer, NAMES[method])(net, [layer])
    original, seen = cam.get_cam_image, []

    def recording(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    cam.get_cam_image = recording
    maps = cam(images, [ClassifierOutputTarget(c) for c in classes])
    cam.activations_and_grads.release()
    return torch.from_numpy(maps), torch.from_numpy(seen[0])


def its_convention(raw, size, oracle):
    """ReLU, (m - min) / (1e-7 + max), bilinear resize, and the scaling again."""

    def scaled(m):
        m = m - m.amin((1, 2), keepdim=True)
        return m / (1e-7 + m.amax((1, 2), keepdim=True))

    return scaled(oracle.resized(scaled(raw.double().clamp(min=0)), size))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", [m for m in NAMES if m != "grad_cam_pp"])
def test_maps(case, oracle, close, method, batch):
    x, classes = case.images(batch), case.classes(batch)
    maps, raw = run_peer(method, case.peer, case.peer_layer, x, classes)
    ours = fastcam.attribute(case.net, x, method, targets=classes, layer=case.layer, relu=False)
    if "eigen" in method:  # its sign is arbitrary; it returns float32
        sign = (raw * ours.raw).sum((1, 2), keepdim=True).sign()
        close(ours.raw.float(), sign.float() * raw, 1e-3 if case.dtype == torch.float32 else 1e-5)
        return
    # XGrad: 1e-7 added to each S_k
    close(ours.raw, raw, 1e-4 if method == "xgrad_cam" else 1e-10)
    final = fastcam.attribute(case.net, x, method, targets=classes, layer=case.layer)
    want = its_convention(ours.raw, x.shape[2:], oracle)
    torch.testing.assert_close(maps.double(), want, rtol=0, atol=1e-4)
    for one, theirs, below in zip(final.maps, maps, final.raw.amax((1, 2)), strict=True):
        if below > 1e-3:  # its 1e-7 is negligible: the native maps agree as they are
            torch.testing.assert_close(one.float(), theirs, rtol=0, atol=1e-3)


def test_grad_cam_pp_in_its_epsilon_form(case, oracle, close):
    """alpha = sum relu(G) G^2 / (2 G^2 + S G^3 + 1e-6); exact Grad-CAM++ is what fastcam computes."""
    x, classes = case.images(3), case.classes(3)
    _, raw = run_peer("grad_cam_pp", case.peer, case.peer_layer, x, classes)
    a, g, _ = oracle.tap(case.net, case.layer, x, oracle.logit(classes), case.dtype)
    total = a.sum((2, 3), keepdim=True)
    fraction = torch.where(g != 0, g**2 / (2 * g**2 + total * g**3 + 1e-6), 0)
    alpha = (fraction * g.clamp(min=0)).sum((2, 3))
    close((alpha[..., None, None] * a).sum(1), raw)
    wide = oracle.tap(case.net, case.layer, x, oracle.logit(classes))
    ours = fastcam.attribute(case.net, x, "grad_cam_pp", targets=classes, layer=case.layer)
    want = oracle.raw_maps("grad_cam_pp", *wide[:2])
    close(ours.raw, want.to(case.dtype))


def test_epsilon_of_grad_cam_pp_is_not_negligible():
    """Gradients of 3e-4, as behind a ResNet-50: the peer's coefficient is a fraction of the exact one."""
    net = models.by_hand([[1 / 64, 1 / 128], [1 / 128, 1 / 64]]).double()
    x = torch.rand(1, 2, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, raw = run_peer("grad_cam_pp", net, net.features, x, [0])
    exact = fastcam.attribute(net, x, "grad_cam_pp", targets=0, layer="features").raw
    w = torch.tensor([1 / 64, 1 / 128], dtype=torch.float64)
    want = ((w / (2 + w * x.mean((2, 3))))[..., None, None] * x).sum(1)  # relu(w) / (2 + w mean A)
    torch.testing.assert_close(exact, want, rtol=1e-12, atol=0)
    assert float(raw.abs().max()) < 0.5 * float(exact.max())


# --- intended deviations: (a) fastcam follows the definition, (b) the peer still does what it is known for ---


def tiny(act="module", dtype=torch.float32):
    draw = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(2))
    return models.vgg_like(act=act).to(dtype), draw.to(dtype)


def test_p1_fewer_targets_than_images():
    net, x = tiny()
    with pytest.raises(ValueError, match=r"shape \(1,\) do not fit a batch of 3"):
        fastcam.attribute(net, x, "grad_cam", targets=[1], layer="features")
    maps, _ = run_peer("grad_cam", net, net.features, x, [1])
    assert maps[0].any()
    assert not maps[1:].any()


def test_p2_index_errors():
    net, x = tiny()
    with pytest.raises(IndexError, match="target 99 is out of range"):
        fastcam.attribute(net, x, "grad_cam", targets=99, layer="features")
    with peer.GradCAM(net, [net.features]) as cam:
        cam(x, [ClassifierOutputTarget(99)] * 3)
        pytest.fail("the peer raises inside its context, and leaves it silently")


@pytest.mark.parametrize("method", ["grad_cam", "xgrad_cam"])
def test_p3_in_place_operator_after_the_layer(oracle, method):
    found = {}
    for act in ("module", "inplace"):
        net, x = tiny(act, torch.float64)
        ours = fastcam.attribute(net, x, method, targets=1, layer="features.1.conv").raw
        want = oracle.explain(tiny()[0], "features.1.conv", x, method, oracle.logit([1] * 3))[1]
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-10 * float(want.max()))
        found[act] = run_peer(method, net, net.features[1].conv, x, [1] * 3)[0]
    assert float((found["module"] - found["inplace"]).abs().max()) > 0.1


def test_p4_state_of_the_model():
    net, x = tiny()
    net.train()
    with pytest.warns(UserWarning, match="train mode"):
        ours = fastcam.attribute(net, x, "grad_cam", targets=1, layer="features")
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert not ours.scores.requires_grad
    cam = peer.GradCAM(net, [net.features])
    cam(x, [ClassifierOutputTarget(1)] * 3)
    assert not net.training
    assert net.features[0].conv.weight.grad is not None
    assert cam.outputs.grad_fn is not None  # the graph lives until the next call


def test_p9_bfloat16(oracle):
    net, x = tiny(dtype=torch.bfloat16)
    ours = fastcam.attribute(net, x, "grad_cam", targets=1, layer="features")
    want = oracle.explain(net, "features", x, "grad_cam", oracle.logit([1] * 3))[0]
    eager = oracle.explain(net, "features", x, "grad_cam", oracle.logit([1] * 3), dtype=torch.bfloat16)[0]
    allowed = 2 * float((eager - want).abs().max()) + torch.finfo(torch.bfloat16).eps
    assert float((ours.maps - want).abs().max()) <= allowed
    with pytest.raises(TypeError, match="BFloat16"):
        run_peer("grad_cam", net, net.features, x, [1] * 3)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_p9_outputs_with_several_parts(oracle, kind):
    net, part = models.structured(kind).double(), "logits" if kind == "dict" else 0
    _, x = tiny(dtype=torch.float64)
    ours = fastcam.attribute(net, x, "grad_cam", targets=lambda y: y[part][:, 1], layer="features").raw
    want = oracle.explain(net, "features", x, "grad_cam", lambda y: y[part][:, 1])[1]
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-12 * float(want.max()))
    with pytest.raises((AttributeError, TypeError)):
        peer.GradCAM(net, [net.features])(x, None)
