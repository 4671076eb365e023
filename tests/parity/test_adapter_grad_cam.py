"""fastcam.adapters.grad_cam against pytorch-grad-cam 1.5.7: the same script, the same numbers (docs/adapters.md)."""

from __future__ import annotations

import contextlib
import copy
import io
import logging

import numpy as np
import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models

pytestmark = pytest.mark.peers
with contextlib.suppress(ImportError):  # the peer imports torchvision, which may need help beside a CPU-only torch
    models.torchvision_models()
peer = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam, extra 'peers'")

from pytorch_grad_cam.utils import model_targets, svd_on_activations  # noqa: E402

from fastcam.adapters import grad_cam as ours  # noqa: E402

CLASSES = [3, 0, 4]
#: name -> (builder, layers each followed by no in-place operator, image size)
NETS = {
    "gap": (models.gap_linear, ("features", "features.0"), (12, 16)),
    "vgg": (models.vgg_like, ("features", "features.1"), (12, 16)),
    "residual": (models.residual, ("features", "features.conv1"), (11, 13)),
    "resnet18": (
        lambda: models.seeded(lambda: models.torchvision_models().resnet18(weights=None, num_classes=10)),
        ("layer4", "layer2"),
        (64, 48),
    ),
}
GRADIENTS = ["GradCAM", "HiResCAM", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "EigenGradCAM"]
WEIGHTED = [*GRADIENTS[:-1], "ScoreCAM", "AblationCAM"]


@pytest.fixture(autouse=True)
def signs(monkeypatch):
    """The peer leaves the sign of a principal component to its SVD; here it uses its own correction, fastcam's rule."""
    corrected = svd_on_activations.get_2d_projection_with_sign_correction
    for module in ("base_cam", "eigen_cam", "eigen_grad_cam", "hirescam", "layer_cam"):
        monkeypatch.setattr(f"pytorch_grad_cam.{module}.get_2d_projection", corrected)


def targets_of(classes):
    return [model_targets.ClassifierOutputTarget(c) for c in classes]


def case(name, dtype):
    build, layers, size = NETS[name]
    draw = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return build().to(dtype), layers, draw.to(dtype)


def run(module, cls, net, layers, x, targets, **call):
    net = net if module is ours else copy.deepcopy(net)  # the peer changes flags and gradients
    made = [] if cls == "FullGrad" else [net.get_submodule(layer) for layer in layers]
    with contextlib.redirect_stderr(io.StringIO()), getattr(module, cls)(net, made) as cam:
        return cam(x, targets, **call)


def same(found, want, tolerance):
    assert type(found) is np.ndarray
    assert found.dtype == want.dtype == np.float32
    assert found.shape == want.shape
    assert want.max() > 0.5  # somewhere there is something to see
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_table(name, dtype, untouched):
    """Methods x one or two layers x batch sizes x targets."""
    net, layers, x = case(name, dtype)
    small = name != "resnet18"
    # float32: gradients of eighteen layers differ in the last digits; eigenvectors of near-equal values more
    loose = 1e-3 if dtype == torch.float32 else 1e-5
    large = ["GradCAM", "GradCAMPlusPlus", "LayerCAM"]  # the peer's SVD of 512 channels takes seconds
    for cls in [*GRADIENTS, "EigenCAM", "FullGrad", "ScoreCAM"] if small else large:
        for used, batch in ((layers[:1], 1), (layers[:1], 3), (layers, 3)):
            targets = None if batch == 1 else targets_of(CLASSES)
            if cls != "FullGrad" or used is not layers:
                want = run(peer, cls, net, used, x[:batch], targets)
                with untouched(net, x):
                    got = run(ours, cls, net, used, x[:batch], targets)
                same(got, want, loose if "Eigen" in cls else 1e-4 if name == "resnet18" else 2e-5)


@pytest.mark.parametrize("name", ["gap", "vgg", "residual"])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_ablation_cam_of_positive_scores(name, batch_size):
    net, layers, x = case(name, torch.float64)
    chosen = [model_targets.ClassifierOutputSoftmaxTarget(c) for c in CLASSES]
    got, want = (run(module, "AblationCAM", net, layers[:1], x, chosen) for module in (ours, peer))
    same(got, want, 1e-4)  # its weights are float32 differences


@pytest.mark.parametrize("cls", WEIGHTED)
@pytest.mark.parametrize("smooth", ["aug_smooth", "eigen_smooth"])
def test_smoothing(cls, smooth):
    net, layers, x = case("vgg", torch.float64)
    chosen = [model_targets.ClassifierOutputSoftmaxTarget(c) for c in CLASSES]
    got, want = (run(module, cls, net, layers[:1], x, chosen, **{smooth: True}) for module in (ours, peer))
    same(got, want, 2e-3 if cls == "AblationCAM" else 1e-4)


def test_full_grad_smoothed_by_the_peer_itself(untouched, caplog):
    net, _, x = case("vgg", torch.float32)
    x = torch.nn.functional.interpolate(x, (32, 32))
    want = run(peer, "FullGrad", net, [], x, None, eigen_smooth=True)
    with untouched(net, x), caplog.at_level(logging.WARNING, "fastcam"):
        cam = ours.FullGrad(net, [])
        np.testing.assert_allclose(cam(x, None, eigen_smooth=True), want, rtol=0, atol=1e-5)
    assert "eigen_smooth of FullGrad" in caplog.text
    with fastcam.adapters.accelerate("pytorch_grad_cam"):
        np.testing.assert_array_equal(
            peer.FullGrad(net, [])(x, None, eigen_smooth=True), cam(x, None, eigen_smooth=True)
        )


TARGETS = {
    "softmax": lambda: [model_targets.ClassifierOutputSoftmaxTarget(c) for c in CLASSES],
    "rest": lambda: [model_targets.ClassifierOutputReST(c) for c in CLASSES],
    "finer": lambda: [model_targets.FinerWeightedTarget(c, [1, 2], 0.8) for c in CLASSES],
    "lambda": lambda: [lambda y: y[1] - y[2]] * 3,
    "mixed": lambda: [lambda y: y[1] ** 2, *targets_of(CLASSES[1:])],
    "numpy": lambda: targets_of(np.array(CLASSES)),
    "negative": lambda: targets_of([-1, -2, 0]),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("cls", ["GradCAM", "LayerCAM"])
def test_targets(kind, cls):
    net, layers, x = case("vgg", torch.float64)
    got, want = (run(module, cls, net, layers[:1], x, TARGETS[kind]()) for module in (ours, peer))
    same(got, want, 1e-5)


class Segmenting(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.out(self.features(x))


class Detecting(Segmenting):
    def forward(self, x):
        maps = super().forward(x)
        return [{"scores": one.amax((1, 2)), "labels": torch.arange(4)} for one in maps]


def test_segmentation_and_detection_targets():
    x = torch.randn(2, 3, 10, 12, generator=torch.Generator().manual_seed(3)).double()
    mask = np.zeros((10, 12), dtype=np.float64)
    mask[2:7, 3:9] = 1
    cases = {
        Segmenting: [model_targets.SemanticSegmentationTarget(c, mask) for c in (1, 3)],
        Detecting: [lambda row: row["scores"][row["labels"] == 2].sum()] * 2,
    }
    for cls, targets in cases.items():
        net = models.seeded(cls).double()
        got, want = (run(module, "GradCAM", net, ["features"], x, targets) for module in (ours, peer))
        same(got, want, 1e-5)


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        fine = self.conv(x).relu()
        return {"fine": fine, "coarse": nn.functional.max_pool2d(fine, 2)}


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = Levels()

    def forward(self, x):
        levels = self.levels(x)
        return levels["fine"].mean((2, 3)) + levels["coarse"].amax((2, 3))


def together(levels):
    coarse = levels["coarse"]
    return torch.cat([nn.functional.interpolate(levels["fine"], coarse.shape[2:]), coarse], 1)


def test_layers_of_several_outputs_are_the_peers(untouched, caplog):
    """Detectors' feature pyramids, which a reshape_transform makes one map of."""
    net = models.seeded(Pyramid).double()
    x = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(5)).double()
    want = peer.EigenCAM(net, [net.levels], reshape_transform=together)(x, targets_of(CLASSES))
    with untouched(net, x), caplog.at_level(logging.WARNING, "fastcam"):
        cam = ours.EigenCAM(net, [net.levels], reshape_transform=together)
        same(cam(x, targets_of(CLASSES)), want, 1e-6)
        np.testing.assert_array_equal(cam(x, targets_of(CLASSES)), cam(x, targets_of(CLASSES)))
        for refused in (ours.EigenCAM(net, [net.levels]), ours.LiftCAM(net, [net.levels], together)):
            with pytest.raises(TypeError, match="layer 'levels' returns dict, not one tensor"):
                refused(x, targets_of(CLASSES))
    assert caplog.text.count("runs the library's own code: layer 'levels' returns dict") == 1


def grid(tokens):
    return tokens[:, 1:].reshape(len(tokens), 3, 4, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("cls", ["GradCAM", "HiResCAM", "GradCAMPlusPlus", "EigenCAM", "ScoreCAM"])
def test_reshape_transform(cls):
    net = models.tokens().double()
    x = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(2)).double()
    found = []
    for module in (ours, peer):
        with contextlib.redirect_stderr(io.StringIO()):
            cam = getattr(module, cls)(net, [net.features], reshape_transform=grid)
            found.append(cam(input_tensor=x, targets=targets_of(CLASSES)))
    same(*found, 1e-4)


def test_results_on_the_device_and_attributes():
    net, _, x = case("gap", torch.float64)
    cam = ours.GradCAM(net, [net.features])
    maps = cam(x, targets_of(CLASSES), return_tensor=True)
    assert isinstance(maps, torch.Tensor)
    assert maps.dtype == torch.float32
    np.testing.assert_array_equal(maps.numpy(), cam(x, targets_of(CLASSES)))
    np.testing.assert_array_equal(maps.numpy(), cam.forward(x, targets_of(CLASSES)))
    torch.testing.assert_close(cam.outputs, net(x).detach())
    assert isinstance(cam, peer.GradCAM)
    assert (cam.model, cam.target_layers, cam.device) == (net, [net.features], torch.device("cpu"))
    cam.activations_and_grads.release()
    score = ours.ScoreCAM(net, [net.features])
    before = score(x, targets_of(CLASSES))
    score.batch_size = 2
    np.testing.assert_allclose(score(x, targets_of(CLASSES)), before, atol=1e-6)


OVERRIDES = {
    "get_cam_weights": lambda self, *args: np.abs(type(self).__mro__[1].get_cam_weights(self, *args)),
    "get_cam_image": lambda self, x, layer, targets, a, g, smooth=False: (np.abs(g) * a).sum(1),
    "aggregate_multi_layers": lambda self, maps: np.concatenate(maps, axis=1).max(1),
    "get_target_width_height": lambda self, x: (5, 4),
    "forward": lambda self, *args: type(self).__mro__[1].forward(self, *args) ** 2,
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_are_honoured(name, untouched, caplog):
    found = {}
    for module in (ours, peer):
        net, _, x = case("vgg", torch.float32)
        mine = type("Mine", (module.GradCAM,), {name: OVERRIDES[name]})
        with caplog.at_level(logging.WARNING, "fastcam"):
            cam = mine(net, [net.features])
            if module is ours:
                net.train()  # P4: the peer would leave it in eval mode
                net.features[0].conv.weight.grad = torch.ones_like(net.features[0].conv.weight)
                with untouched(net, x), torch.no_grad():
                    found[module] = cam(x, targets_of(CLASSES)), cam(x, targets_of(CLASSES))
            else:
                found[module] = cam(x, targets_of(CLASSES)), None
    same(found[ours][0], found[peer][0], 1e-5)
    np.testing.assert_array_equal(*found[ours])
    assert caplog.text.count(f"{name} is overridden") == 1


def test_overrides_of_single_classes_are_honoured():
    """FullGrad's own hooks and biases, Ablation-CAM's scores, the smoothing; and hooks that were put in their place."""
    ramp = {"assemble_ablation_scores": lambda self, new, score, ablated, count: list(np.arange(1.0, count + 1))}
    cases = {
        "FullGrad": ({"aggregate_multi_layers": lambda self, maps: maps.sum(1) / maps.max()}, {}),
        "AblationCAM": (ramp, {}),
        "GradCAM": (
            {"forward_augmentation_smoothing": lambda self, *args: self.forward(*args) ** 2},
            {"aug_smooth": True},
        ),
    }
    for cls, (methods, call) in cases.items():
        found = []
        for module in (ours, peer):
            net, _, x = case("vgg", torch.float32)
            mine = type("Mine", (getattr(module, cls),), methods)
            with contextlib.redirect_stderr(io.StringIO()), mine(net, [net.features]) as cam:
                found.append(cam(x, targets_of(CLASSES), **call))
        same(*found, 1e-5)
    net, _, x = case("vgg", torch.float32)
    cam = ours.GradCAM(net, [net.features])
    cam.activations_and_grads = peer.ActivationsAndGradients(net, [net.features[0]], None)
    want = run(peer, "GradCAM", net, ["features.0"], x, targets_of(CLASSES))
    same(cam(x, targets_of(CLASSES)), want, 1e-6)


def test_errors(untouched):
    net, _, x = case("vgg", torch.float32)
    with untouched(net, x):
        with pytest.raises(ValueError, match="2 targets were given for a batch of 3 images"):
            ours.GradCAM(net, [net.features])(x, targets_of([1, 2]))  # P1
        with pytest.raises(IndexError, match="99"), ours.GradCAM(net, [net.features]) as cam:  # P2
            cam(x, targets_of([99] * 3))
        with pytest.raises(IndexError), ours.GradCAM(net, [net.features]) as cam:
            cam(x, [model_targets.ClassifierOutputSoftmaxTarget(99)] * 3)
        with pytest.raises(RuntimeError, match=r"one score for its image; .* shape \(5,\)"):
            ours.GradCAM(net, [net.features])(x, [model_targets.RawScoresOutputTarget()] * 3)
        with pytest.raises(ValueError, match="not a module of this"):
            ours.GradCAM(net, [nn.ReLU()])
        with pytest.raises(ValueError, match="target_layers is empty"):
            ours.GradCAM(net, [])
        with pytest.raises(ValueError, match=r"ratio_channels_to_ablate=0\.5"):
            ours.AblationCAM(net, [net.features], ratio_channels_to_ablate=0.5)


@pytest.mark.parametrize(
    ("cls", "method", "layer"),
    [("LiftCAM", "lift_cam", "features"), ("AttributionEquilibrium", "attribution_equilibrium", "features"),
     ("LRP", "lrp", None), ("ShapCAM", "shap_cam", "features")],
)  # fmt: skip
def test_our_methods_behind_its_interface(cls, method, layer):
    net, _, x = case("vgg", torch.float64)
    with getattr(ours, cls)(net, [] if layer is None else [net.get_submodule(layer)]) as cam:
        maps = cam(x, targets_of(CLASSES))
    raw = fastcam.attribute(net, x, method, targets=CLASSES, layer=layer, normalize=False).maps.clamp(min=0)
    want = raw / raw.flatten(1).amax(1).reshape(-1, 1, 1) if method != "lift_cam" else None
    if want is None:
        low, high = raw.flatten(1).amin(1).reshape(-1, 1, 1), raw.flatten(1).amax(1).reshape(-1, 1, 1)
        want = (raw - low) / (high - low)
    assert isinstance(cam, peer.base_cam.BaseCAM)
    assert float(want.amin()) < 0.1
    np.testing.assert_allclose(maps, want.float().numpy(), rtol=0, atol=1e-4)


def test_afmi_takes_the_normalisation():
    net, _, x = case("vgg", torch.float64)
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    cam = ours.AFMI(net, [net.features], mean=mean, std=std, reference="mean")
    found = cam(x, targets_of(CLASSES))
    raw = fastcam.attribute(
        net, x, "a_fmi", targets=CLASSES, layer="features", mean=mean, std=std, reference="mean"
    ).maps
    np.testing.assert_allclose(found, raw.float().numpy(), rtol=0, atol=1e-4)


def test_p13_volumes_are_resized_linearly(oracle):
    net = models.gap_linear(rank=3).double()
    x = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(4)).double()
    got, want = (run(module, "GradCAM", net, ["features"], x, targets_of([1, 2])) for module in (ours, peer))
    raw = fastcam.attribute(net, x, "grad_cam", targets=[1, 2], layer="features").raw
    low = raw.flatten(1).amin(1).reshape(-1, 1, 1, 1)
    maps = nn.functional.interpolate((raw - low)[:, None], (8, 8, 8), mode="trilinear", align_corners=False)[:, 0]
    maps = maps - maps.flatten(1).amin(1).reshape(-1, 1, 1, 1)
    maps = maps / maps.flatten(1).amax(1).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(got, maps.float().numpy(), rtol=0, atol=1e-5)
    assert got.shape == want.shape
    assert np.abs(got - want).max() > 0.01


def test_other_names_are_the_peers(caplog):
    assert ours.KPCA_CAM is peer.KPCA_CAM
    with pytest.raises(AttributeError, match="NoSuchCAM"):
        _ = ours.NoSuchCAM


def test_finer_cam_of_the_peer_over_an_adapter():
    """The peer's composite classes drive `activations_and_grads` themselves."""
    net, _, x = case("vgg", torch.float64)
    found = [peer.FinerCAM(net, [net.features], base_method=module.GradCAM)(x) for module in (ours, peer)]
    same(*found, 1e-6)


def test_accelerate_swaps_and_restores(untouched):
    net, _, x = case("gap", torch.float64)
    before = dict(vars(peer.GradCAM)), dict(vars(peer.EigenCAM))
    want = run(peer, "GradCAM", net, ["features"], x, targets_of(CLASSES))
    mine = type("Mine", (peer.GradCAM,), {})
    with untouched(net, x), fastcam.adapters.accelerate("pytorch_grad_cam") as outer:
        with fastcam.adapters.accelerate("pytorch_grad_cam"):
            cam = peer.GradCAM(model=net, target_layers=[net.features])
        assert type(cam) is ours.GradCAM
        assert type(peer.GradCAM(net, [net.features])) is ours.GradCAM  # the outer one still holds
        same(cam(input_tensor=x, targets=targets_of(CLASSES)), want, 1e-5)
    assert type(mine(net, [net.features])) is mine
    assert type(peer.GradCAM(net, [net.features])) is peer.GradCAM
    assert (dict(vars(peer.GradCAM)), dict(vars(peer.EigenCAM))) == before
    outer.restore()  # harmless
    called = fastcam.adapters.accelerate("pytorch_grad_cam")
    assert type(peer.EigenCAM(net, [net.features])) is ours.EigenCAM
    assert type(mine(net, [net.features])) is mine  # a user's subclass is the user's
    called.restore()
    assert type(peer.EigenCAM(net, [net.features])) is peer.EigenCAM
