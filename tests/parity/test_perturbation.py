"""Score-CAM, SS-CAM, IS-CAM and Ablation-CAM against TorchCAM 0.5.0 and pytorch-grad-cam 1.5.7 (docs/parity.md)."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import fastcam
from fastcam._testing import models

pytestmark = pytest.mark.peers
with contextlib.suppress(ImportError):  # the peers import torchvision, which may need help beside a CPU-only torch
    models.torchvision_models()
torchcam = pytest.importorskip("torchcam.methods", reason="needs torchcam, extra 'peers'")
grad_cam = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam, extra 'peers'")

from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402

NETS = {"gap": models.gap_linear, "vgg": models.vgg_like, "residual": models.residual}
CLASSES = [3, 0, 4]


@pytest.fixture(params=[(n, d) for n in NETS for d in (torch.float32, torch.float64)], ids=str)
def small(request):
    """Network, images; so small that K forward passes an image cost nothing."""
    name, dtype = request.param
    draw = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return NETS[name]().to(dtype), draw.to(dtype)


class Draws:
    """Hands TorchCAM's SS-CAM one noise image after the other, the same for all images and maps."""

    def __init__(self, n, size, std):
        drawn = torch.randn((n, *size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.left = iter(std * drawn)

    def sample(self, shape):
        return next(self.left).expand(shape)


def by_torchcam(name, net, layer, x, classes, draws=None, **options):
    """(B, h, w) after its ReLU"""
    with getattr(torchcam, name)(copy.deepcopy(net), layer, input_shape=tuple(x.shape[1:]), **options) as extractor:
        if draws is not None:
            extractor._distrib = draws
        with torch.no_grad():
            scores = extractor.model(x)
        return extractor(list(classes), scores, normalized=False)[0].detach()


def by_grad_cam(name, net, layer, x, classes, **options):
    """(weights (B, K) float32, maps before ReLU (B, h, w))"""
    net, seen = copy.deepcopy(net), {}
    cam = getattr(grad_cam, name)(net, [net.get_submodule(layer)], **options)

    def recorded(step):
        original = getattr(cam, step)

        def recording(*args, **kwargs):
            seen[step] = original(*args, **kwargs)
            return seen[step]

        setattr(cam, step, recording)

    recorded("get_cam_weights")
    recorded("get_cam_image")
    cam(x, [ClassifierOutputTarget(c) for c in classes])
    cam.activations_and_grads.release()
    return torch.as_tensor(seen["get_cam_weights"]), torch.from_numpy(seen["get_cam_image"])


@pytest.mark.parametrize("chunk", [4, 32])
def test_score_cam_is_torchcams(small, close, chunk):
    """In its order of scaling and resizing; it adds 1e-8 to the range of each map."""
    net, x = small
    theirs = by_torchcam("ScoreCAM", net, "features", x, CLASSES, batch_size=5)
    options = {"targets": CLASSES, "layer": "features", "chunk": chunk, "size": "layer"}
    close(fastcam.attribute(net, x, "score_cam", order="minmax_then_resize", **options).raw, theirs, 1e-6)


def test_ss_cam_is_torchcams_with_the_same_noise(small, close):
    net, x = small
    theirs = by_torchcam("SSCAM", net, "features", x, CLASSES, Draws(4, x.shape[2:], 2.0), num_samples=4)
    options = {"targets": CLASSES, "layer": "features", "n": 4}
    close(fastcam.attribute(net, x, "ss_cam", order="minmax_then_resize", **options).raw, theirs.to(x.dtype), 1e-6)


def test_is_cam_is_torchcams(small, close):
    net, x = small
    theirs = by_torchcam("ISCAM", net, "features", x, CLASSES)
    options = {"targets": CLASSES, "layer": "features"}
    close(fastcam.attribute(net, x, "is_cam", order="minmax_then_resize", **options).raw, theirs, 1e-6)


def test_defaults_are_torchcams():
    options = {name: fastcam.methods()[name]["options"] for name in ("score_cam", "ss_cam", "is_cam")}
    net = models.gap_linear()
    with torchcam.SSCAM(net, "features") as peer:
        assert (peer.num_samples, peer.std, peer.bs) == (
            options["ss_cam"]["n"],
            options["ss_cam"]["noise_std"],
            options["ss_cam"]["chunk"],
        )
    with torchcam.ISCAM(net, "features") as peer:
        assert peer.num_samples == options["is_cam"]["n"]


def test_score_cam_is_grad_cams_where_nothing_is_resized(small, close):
    """Its weights are float32, and it adds 1e-8 to the range of each map."""
    net, x = small
    layer = "features" if isinstance(net.features, models._Residual) else "features.0"
    weights, raw = by_grad_cam("ScoreCAM", net, layer, x, CLASSES)
    ours = fastcam.attribute(net, x, "score_cam", targets=CLASSES, layer=layer, relu=False)
    torch.testing.assert_close(ours.weights.float(), weights, rtol=1e-5, atol=1e-6)
    close(ours.raw, raw.to(ours.raw.dtype), 1e-5)


def test_p10_score_cam_masks_are_resized_with_aligned_corners(oracle):
    """fastcam resizes masks as it resizes maps; the peer's masks are of another convention than its maps."""
    net = models.vgg_like().double()
    x = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a = oracle.tap(net, "features", x, oracle.logit([1]))[0]

    def weights(masks):
        with torch.no_grad():
            return net(x * oracle.min_max(masks)[:, None])[:, 1].softmax(0)

    aligned = torch.nn.functional.interpolate(a, x.shape[2:], mode="bilinear", align_corners=True)[0]
    ours = fastcam.attribute(net, x, "score_cam", targets=1, layer="features").weights[0]
    torch.testing.assert_close(ours, weights(oracle.resized(a[0], x.shape[2:])), rtol=0, atol=1e-12)
    theirs = by_grad_cam("ScoreCAM", net, "features", x, [1])[0][0].double()
    torch.testing.assert_close(theirs, weights(aligned), rtol=0, atol=1e-6)
    assert float((ours - theirs).abs().max()) > 1e-4


@pytest.mark.parametrize("name", NETS)
def test_ablation_cam_divided_is_grad_cams_after_a_relu(close, name):
    """It divides by the signed score, in float32, and leaves zeros where the least activation is 0."""
    net = NETS[name]().double()
    x = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    classes = [3, 0, 4]
    weights, raw = by_grad_cam("AblationCAM", net, "features", x, classes, batch_size=4)
    sign = net(x).detach().gather(1, torch.tensor(classes)[:, None]).sign()
    ours = fastcam.attribute(net, x, "ablation_cam", targets=classes, layer="features", divide=True, relu=False)
    torch.testing.assert_close(ours.weights, sign * weights, rtol=1e-4, atol=1e-5)
    close(ours.raw, sign[..., None] * raw, 1e-4)


def test_p11_ablation_of_signed_maps_depends_on_the_batch_size():
    """The peer replaces a map by the least value of a buffer it is editing, minus 1e7; fastcam by `fill`."""
    net = models.gap_linear().double()
    net.features[1].relu = torch.nn.Identity().eval()
    x = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def score(output):  # runs the head, which a class would not
        return output[:, 3]

    ours = [fastcam.attribute(net, x, "ablation_cam", targets=score, layer="features", chunk=c) for c in (1, 4)]
    torch.testing.assert_close(ours[0].weights, ours[1].weights, rtol=0, atol=1e-14)
    theirs = [by_grad_cam("AblationCAM", net, "features", x, [3], batch_size=c)[0] for c in (1, 4)]
    assert float((theirs[0] - theirs[1]).abs().max()) > 0.01 * float(theirs[0].abs().max())


def test_p12_ablation_turns_the_map_of_a_negative_score_over():
    net = models.gap_linear().double()
    x = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    score, lowest = net(x).detach().min(1)
    assert float(score) < 0
    raw = by_grad_cam("AblationCAM", net, "features", x, [int(lowest)])[1]
    plain, divided = (
        fastcam.attribute(net, x, "ablation_cam", targets=int(lowest), layer="features", divide=d, relu=False)
        for d in (False, True)
    )
    torch.testing.assert_close(divided.maps, plain.maps, rtol=0, atol=1e-10)
    torch.testing.assert_close(divided.raw, -raw, rtol=1e-4, atol=1e-5)
