"""fastcam.adapters.torchcam against TorchCAM 0.5.0: the same script, the same numbers (docs/adapters.md)."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models

pytestmark = pytest.mark.peers
with contextlib.suppress(ImportError):  # the peer imports torchvision, which may need help beside a CPU-only torch
    models.torchvision_models()
peer = pytest.importorskip("torchcam.methods", reason="needs torchcam, extra 'peers'")

from torchcam import metrics  # noqa: E402

from fastcam.adapters import torchcam as ours  # noqa: E402

CLASSES = [3, 0, 4]
NETS = {"gap": models.gap_linear, "vgg": models.vgg_like}
SAME = ["GradCAM", "XGradCAM", "LayerCAM", "ScoreCAM", "ISCAM"]
LAYERS = ["features", "features.0"]


def case(name, dtype=torch.float64):
    x = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return NETS[name]().to(dtype), x.to(dtype)


def run(module, cls, net, layers, x, class_idx, normalized=True, **call):
    """By the protocol, and by `run` where there is one."""
    with getattr(module, cls)(net, list(layers)) as extractor:
        scores = net(x)
        found = extractor(class_idx, scores, normalized, **call)
        fast = extractor.run(x, class_idx, normalized, **call) if module is ours else None
        return found, fast


def close(found, want, dtype):
    assert len(found) == len(want)
    for got, right in zip(found, want, strict=True):
        assert got.dtype == right.dtype
        assert got.shape == right.shape
        tolerance = (1e-4 if dtype == torch.float32 else 1e-6) * float(right.abs().max())
        torch.testing.assert_close(got, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_table(name, dtype, untouched):
    """Methods x one or two layers x batch sizes x classes x normalisation, by the protocol and by `run`."""
    net, x = case(name, dtype)
    for cls in SAME:
        for layers, n, classes, normalized in (
            (LAYERS[:1], 3, CLASSES, True),
            (LAYERS, 1, 2, True),
            (LAYERS, 3, 1, False),
        ):
            want, _ = run(peer, cls, copy.deepcopy(net), layers, x[:n], classes, normalized)
            with untouched(net, x):
                got, fast = run(ours, cls, net, layers, x[:n], classes, normalized)
            close(got, want, dtype)
            close(fast, want, dtype)


def test_cam(untouched):
    net, x = case("gap")
    found = []
    for module in (ours, peer):
        with untouched(net, x), module.CAM(net, "features", "head.2") as extractor:
            with torch.inference_mode():
                net(x)
            found.append(extractor(CLASSES))
            if module is ours:
                found.append(extractor.run(x, CLASSES))
    close(found[0], found[2], torch.float64)
    close(found[1], found[2], torch.float64)


def test_callable_targets_and_fused_maps():
    net, x = case("vgg")
    targets = [lambda row: row[1] - row[2], lambda row: row.square().sum(), lambda row: row[0]]
    for cls in ("GradCAM", "LayerCAM", "ScoreCAM"):
        want, _ = run(peer, cls, copy.deepcopy(net), LAYERS, x, None, targets=targets)
        got, fast = run(ours, cls, net, LAYERS, x, None, targets=targets)
        close(got, want, torch.float64)
        close(fast, want, torch.float64)
        close([getattr(ours, cls).fuse_cams(fast, (12, 16))], [getattr(peer, cls).fuse_cams(want, (12, 16))], x.dtype)


def test_reshape_transform():
    net = models.tokens().double()
    _, x = case("vgg")
    grid = lambda t: t[:, 1:].reshape(len(t), 3, 4, -1).permute(0, 3, 1, 2)  # noqa: E731
    found = []
    for module in (ours, peer):
        with module.GradCAM(net, "features", reshape_transform=grid) as extractor:
            found.append(extractor(CLASSES, net(x)))
            if module is ours:
                found.append(extractor.run(x, CLASSES))
    close(found[0], found[2], torch.float64)
    close(found[1], found[2], torch.float64)


def test_protocol_state_and_errors(caplog):
    net, x = case("vgg")
    theirs, extractor = peer.GradCAM(copy.deepcopy(net), "features"), ours.GradCAM(net, "features")
    assert repr(extractor) == repr(theirs)
    assert isinstance(extractor, peer.GradCAM)
    with pytest.raises(AssertionError, match="forwarded"):
        extractor(1, None)
    scores = net(x)
    handles = len(extractor.hook_handles)
    for bad, message in ((-1, "Incorrect"), ([1], "batch size")):
        with pytest.raises(ValueError, match=message):
            extractor(bad, scores)
        with pytest.raises(ValueError, match=message):
            extractor.run(x, bad)
    with pytest.raises(ValueError, match="exactly one"):
        extractor.run(x)
    with pytest.raises(IndexError, match="99"):
        extractor.run(x, 99)
    for _ in range(3):
        extractor.run(x, 1)
    assert len(extractor.hook_handles) == handles == len(theirs.hook_handles)
    assert len(net.features._forward_hooks) == len(theirs.model.features._forward_hooks)
    extractor(1, scores)  # what the forward stored has outlived the runs
    extractor.remove_hooks()
    assert not net.features._forward_hooks
    for module in (ours, peer):
        with pytest.raises(ValueError, match=r"unknown `target_layer` names: \['feature'\], closest matches"):
            module.GradCAM(net, "feature")
        with pytest.raises(TypeError, match="invalid argument type"):
            module.GradCAM(net, 3)
        module.GradCAM(models.vgg_like(), input_shape=(3, 12, 16)).remove_hooks()
    assert caplog.text.count("thus set to") == 2


def test_its_metrics():
    net, x = case("gap")
    found = []
    for module in (ours, peer):
        with module.LayerCAM(net, "features") as extractor:
            metric = metrics.ClassificationMetric(extractor, lambda out: out.softmax(-1))
            metric.update(x, 1)
            found.append(metric.summary())
    assert found[0] == pytest.approx(found[1])


# --- intended deviations, as in test_torchcam.py: the definition here, the peer's own behaviour there ---


def test_t1_grad_cam_pp(oracle):
    net, x = case("vgg")
    a, g, _ = oracle.tap(net, "features", x, oracle.logit(CLASSES))
    want = oracle.raw_maps("grad_cam_pp", a, g)
    got, fast = run(ours, "GradCAMpp", net, ["features"], x, CLASSES, normalized=False)
    close(got, [want], torch.float64)
    close(fast, [want], torch.float64)


def test_t2_flat_map_in_float16():
    net = models.by_hand([[1.0, 0.5], [0.5, 1.0]]).half()
    x = torch.full((1, 2, 4, 4), 0.5, dtype=torch.float16)
    assert not run(ours, "GradCAM", net, ["features"], x, 0)[0][0].any()
    assert run(peer, "GradCAM", net, ["features"], x, 0)[0][0].isnan().all()


def test_t3_every_noisy_sample_counts():
    """The peer weights by the gradient of its last sample, whatever the others' signs are."""
    net, x = case("vgg")
    with peer.SmoothGradCAMpp(copy.deepcopy(net), "features", num_samples=2) as theirs:
        theirs._backprop = lambda out, class_idx, **_: theirs.hook_g.__setitem__(0, next(gradients))
        found = []
        for sign in (1.0, -1.0):
            theirs.model(x)
            last = torch.ones_like(theirs.hook_a[0])
            gradients = iter([sign * last, last])  # the mean gradient is 1, or 0
            found.append(theirs(1, None, normalized=False)[0])
        assert float(found[1].abs().max()) > 0.1 * float(found[0].abs().max())
    got, fast = run(ours, "SmoothGradCAMpp", net, LAYERS, x, CLASSES)
    close(got, fast, torch.float64)
    for cam, layer in zip(got, LAYERS, strict=True):
        want = fastcam.attribute(
            net, x, "smooth_grad_cam_pp", targets=CLASSES, layer=layer, size="layer", noise_std=0.3
        )
        torch.testing.assert_close(cam, want.maps, rtol=0, atol=1e-6)
    with ours.SSCAM(net, "features", num_samples=2) as extractor:
        extractor.model(x)
        close(extractor(CLASSES), extractor.run(x, CLASSES), torch.float64)


def test_t4_in_place_operator_after_the_layer(oracle):
    for act in ("module", "inplace"):
        net = models.vgg_like(act=act).double()
        _, x = case("vgg")
        want = oracle.explain(models.vgg_like().double(), "features.1.conv", x, "grad_cam", oracle.logit([1] * 3))[1]
        got, fast = run(ours, "GradCAM", net, ["features.1.conv"], x, 1, normalized=False)
        close(got, [want], torch.float64)
        close(fast, [want], torch.float64)
        scored, _ = run(ours, "ScoreCAM", net, ["features.1.conv"], x, 1, normalized=False)
        plain = fastcam.attribute(
            models.vgg_like().double(), x, "score_cam", targets=1, layer="features.1.conv", order="minmax_then_resize"
        )
        close(scored, [plain.raw], torch.float64)


def test_accelerate():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with fastcam.adapters.accelerate("torchcam"):
        for name in ("GradCAM", "SSCAM", "CAM"):
            extractor = getattr(peer, name)(net, "0")
            assert type(extractor) is getattr(ours, name)
            extractor.remove_hooks()
    assert type(peer.GradCAM(net, "0")) is peer.GradCAM
