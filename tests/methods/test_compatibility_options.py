"""Options that reproduce other libraries' conventions, against their written form in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import fastcam
from fastcam._testing import models
from fastcam.explainer import Explainer, at_layers

CLASSES = [3, 0, 4]


@pytest.fixture
def tapped(oracle):
    """Network, images, features and gradients of the classes at `features`."""
    net = models.vgg_like().double()
    x = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, g, _ = oracle.tap(net, "features", x, oracle.logit(CLASSES))
    return net, x, a, g


def explain(net, x, method, **options):
    return fastcam.attribute(net, x, method, targets=CLASSES, layer="features", **options)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.5])
def test_epsilon_of_grad_cam_pp(tapped, epsilon):
    net, x, a, g = tapped
    fraction = g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + epsilon)
    want = (torch.where(g != 0, fraction, 0) * g.clamp(min=0)).sum((2, 3))
    found = explain(net, x, "grad_cam_pp", epsilon=epsilon)
    torch.testing.assert_close(found.weights, want, rtol=1e-10, atol=0)
    several = fastcam.attribute(
        net, x, "grad_cam_pp", targets=[[c, 1] for c in CLASSES], layer="features", epsilon=epsilon
    )
    torch.testing.assert_close(several.weights[:, 0], want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-7, 0.5])
def test_epsilon_of_xgrad_cam(tapped, epsilon):
    net, x, a, g = tapped
    want = (g * a).sum((2, 3)) / (a.sum((2, 3)) + epsilon)
    found = explain(net, x, "xgrad_cam", epsilon=epsilon)
    torch.testing.assert_close(found.weights, want, rtol=1e-10, atol=1e-12)
    several = fastcam.attribute(
        net, x, "xgrad_cam", targets=[[c, 1] for c in CLASSES], layer="features", epsilon=epsilon
    )
    torch.testing.assert_close(several.weights[:, 0], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [-1, float("inf"), "small", True])
@pytest.mark.parametrize("method", ["grad_cam_pp", "xgrad_cam"])
def test_epsilon_is_checked(method, value):
    with pytest.raises(ValueError, match="epsilon must be None or a finite number, not negative; got"):
        Explainer(models.vgg_like(), method, epsilon=value)


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "layer_cam", "lift_cam", "ablation_cam"])
def test_eigen_smooth(tapped, method):
    """By a singular value decomposition of the weighted maps."""
    net, x, a, g = tapped
    plain = explain(net, x, method, relu=False)
    factors = {"hires_cam": g, "layer_cam": g.clamp(min=0)}.get(method)
    if factors is None:
        factors = plain.weights[..., None, None]
    rows = (factors * a).flatten(2).mT
    rows = rows - rows.mean(1, keepdim=True)
    want = (rows @ torch.linalg.svd(rows).Vh[:, :1].mT).squeeze(2)
    want = torch.where((want.amax(1) < -want.amin(1))[:, None], -want, want).unflatten(1, a.shape[2:])
    found = explain(net, x, method, relu=False, eigen_smooth=True)
    torch.testing.assert_close(found.raw, want, rtol=0, atol=1e-9 * float(want.abs().max()))
    if plain.weights is not None:
        torch.testing.assert_close(found.weights, plain.weights)
    several = fastcam.attribute(net, x, method, targets="top2", layer="features", eigen_smooth=True)
    for column in range(2):
        one = fastcam.attribute(net, x, method, targets=several.targets[:, column], layer="features", eigen_smooth=True)
        torch.testing.assert_close(several.raw[:, column], one.raw, rtol=0, atol=1e-10)


def test_corners_of_score_cam_masks(tapped, oracle):
    net, x, a, _ = tapped
    masks = functional.interpolate(a, x.shape[2:], mode="bilinear", align_corners=True)
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    masks = torch.where(high > low, (masks - low) / torch.where(high > low, high - low, 1), 0)
    with torch.no_grad():
        scores = torch.stack([net(image * masks[b][:, None])[:, CLASSES[b]] for b, image in enumerate(x)])
    found = explain(net, x, "score_cam", align_corners=True, chunk=5)
    torch.testing.assert_close(found.weights, scores.softmax(1), rtol=0, atol=1e-10)
    assert float((found.weights - explain(net, x, "score_cam").weights).abs().max()) > 1e-5
    with pytest.raises(ValueError, match="goes with order='resize_then_minmax'"):
        Explainer(net, "score_cam", align_corners=True, order="minmax_then_resize")


def test_flat_maps_stay_dark_with_aligned_corners():
    net = models.by_hand([[1.0, 0.5], [0.5, 1.0]]).double()
    x = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = 1 / 3
    pooled = torch.nn.Sequential(torch.nn.AvgPool2d(2, ceil_mode=True), net)
    found = fastcam.attribute(
        pooled, x, "score_cam", targets=0, layer="1.features", align_corners=True, weight_norm="none"
    )
    dark = pooled(torch.zeros_like(x))[0, 0].detach()
    torch.testing.assert_close(found.weights[0, 1], dark)


@pytest.mark.parametrize("rank", [1, 3])
def test_corners_in_other_dimensions(rank):
    net = models.gap_linear(rank=rank).double()
    x = torch.randn(2, 3, *(8, 6, 10)[:rank], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = fastcam.attribute(net, x, "score_cam", targets=1, layer="features", align_corners=True)
    with torch.no_grad():
        a = net.features(x)
        mode = {1: "linear", 3: "trilinear"}[rank]
        masks = functional.interpolate(a, x.shape[2:], mode=mode, align_corners=True).flatten(2)
        low, high = masks.amin(2, keepdim=True), masks.amax(2, keepdim=True)
        masks = torch.where(high > low, (masks - low) / torch.where(high > low, high - low, 1), 0).unflatten(
            2, x.shape[2:]
        )
        scores = torch.stack([net(image * masks[b][:, None])[:, 1] for b, image in enumerate(x)])
    torch.testing.assert_close(found.weights, scores.softmax(1), rtol=0, atol=1e-10)


def test_multipliers_of_deep_lift(tapped):
    net, x, _, _ = tapped
    base = torch.zeros_like(x[:1])
    options = {"reference": base, "return_contributions": True, "return_multipliers": True, "targets": CLASSES}
    found = fastcam.attribute(net, x, "deep_lift", **options).extra
    torch.testing.assert_close(found["multipliers"] * (x - base), found["contributions"])


def test_seed_by_a_callable(tapped):
    net, x, _, _ = tapped
    hot = torch.eye(5, dtype=torch.float64)[CLASSES]
    by_name = fastcam.attribute(net, x, "lrp", seed="logit", targets=CLASSES)
    by_call = fastcam.attribute(net, x, "lrp", seed=lambda logits: logits * hot)
    torch.testing.assert_close(by_call.raw, by_name.raw)
    with pytest.raises(ValueError, match=r"logits' shape \(3, 5\); got \(3, 4\)"):
        fastcam.attribute(net, x, "lrp", seed=lambda logits: logits[:, :4])


@pytest.mark.parametrize(
    "method", ["grad_cam", "layer_cam", "eigen_cam", "score_cam", "lift_cam", "smooth_grad_cam_pp"]
)
@pytest.mark.parametrize(
    "targets", [None, CLASSES, "top2", lambda y: y[:, 1] ** 2], ids=["none", "list", "top2", "call"]
)
def test_layers_together(tapped, method, targets):
    """One pass for all layers gives what a pass for each does; one that lies beside the others is no trouble."""
    if method == "lift_cam" and callable(targets):
        targets = [1, 1, 1]
    net, x, _, _ = tapped
    together = [Explainer(net, method, layer=name) for name in ("features", "features.0", "features.1.conv")]
    for found, one in zip(at_layers(together, x, targets), together, strict=True):
        alone = one(x, targets)
        assert found.layer == alone.layer
        torch.testing.assert_close(found.maps, alone.maps, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.scores, alone.scores)


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = (torch.nn.Conv2d(3, 4, 3, padding=1) for _ in range(2))
        self.fc = torch.nn.Linear(8, 5)

    def forward(self, x):
        both = torch.cat([self.left(x).relu(), self.right(x).relu()], dim=1)
        return self.fc((both * both).mean((2, 3)))


def test_layers_side_by_side():
    net = models.seeded(Branches).double()
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    both = [Explainer(net, "grad_cam", layer=name) for name in ("left", "right")]
    for found, one in zip(at_layers(both, x, 1), both, strict=True):
        torch.testing.assert_close(found.maps, one(x, 1).maps, rtol=0, atol=0)
