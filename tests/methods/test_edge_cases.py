"""Numbers, shapes and arguments at the edge: each has a defined value or one clear error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models

METHODS = ["cam", "grad_cam", "grad_cam_pp", "xgrad_cam", "hires_cam", "layer_cam", "eigen_cam", "eigen_grad_cam"]
GENERAL = METHODS[1:]
NOT_FINITE = [torch.nan, torch.inf, -torch.inf]


def images(size=(11, 14), batch=3, seed=0) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gap() -> nn.Module:
    return models.gap_linear()


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    return models.vgg_like()


def net_of(method: str, gap: nn.Module, vgg: nn.Module) -> nn.Module:
    return gap if method == "cam" else vgg


class Poison(nn.Module):
    """Passes A on, but for images whose first pixel says so writes `value` into one element of it."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, images, features):
        marked = (images[:, 0, 0, 0] > 100)[:, None, None, None]
        spot = torch.zeros_like(features[:1])
        spot[0, 1, 2, 3] = 1
        return torch.where(marked & (spot > 0), torch.full_like(features, self.value), features)


class Poisoned(nn.Module):
    """Features that are not finite for marked images, while images and scores of all images are finite."""

    def __init__(self, net: nn.Module, value: float):
        super().__init__()
        self.net, self.features = net.features, Poison(value)
        self.head = net.head

    def forward(self, x):
        marked = x[:, :1, :1, :1] > 100
        found = self.features(x, self.net(torch.where(marked, torch.zeros_like(x), x)))
        return self.head(torch.where(found.isfinite(), found, torch.zeros_like(found)))


@pytest.fixture(scope="module")
def poisoned(vgg) -> dict[float, nn.Module]:
    return {value: Poisoned(vgg, value).eval() for value in NOT_FINITE}


def marked(image: int) -> torch.Tensor:
    x = images()
    x[image, 0, 0, 0] = 1000
    return x


# --- not finite ---


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_images_that_are_not_finite(gap, vgg, method, value):
    net, x = net_of(method, gap, vgg), images()
    clean = fastcam.attribute(net, x, method, targets=1, layer="features")
    x[1, 2, 5, 5] = value
    with pytest.raises(ValueError, match=r"features of layer 'features' .*image 1 \(1 of 3"):
        fastcam.attribute(net, x, method, targets=1, layer="features")
    with pytest.raises(ValueError, match="not finite"):
        fastcam.attribute(net, x, method, targets=1, layer="features", on_nonfinite="raise")
    got = fastcam.attribute(net, x, method, targets=1, layer="features", on_nonfinite="mask")
    assert got.valid.tolist() == [True, False, True]
    assert not got.maps[1].any()
    assert not got.raw[1].any()
    torch.testing.assert_close(got.maps[::2], clean.maps[::2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("method", GENERAL)
def test_features_alone_that_are_not_finite(poisoned, method, value):
    net = poisoned[value]
    assert net(marked(2)).isfinite().all()
    with pytest.raises(ValueError, match=r"features of layer 'features' .*image 2 \(1 of 3"):
        fastcam.attribute(net, marked(2), method, targets=1, layer="features")
    got = fastcam.attribute(net, marked(2), method, targets=[[0, 1]] * 3, layer="features", on_nonfinite="mask")
    assert got.valid.tolist() == [True, True, False]
    assert not got.maps[2].any()
    assert got.maps.isfinite().all()
    assert got.raw.isfinite().all()
    assert got.maps[:2].amax((2, 3)).max() == 1


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "layer_cam", "xgrad_cam", "grad_cam_pp", "eigen_grad_cam"])
def test_gradients_alone_that_are_not_finite(vgg, method):
    """The root of a logit that the target holds at zero: value 0, slope infinity."""

    def score(y):
        return (y[:, 1] - y[:, 1].detach()).sqrt()

    with pytest.raises(ValueError, match=rf"the {method} map at layer 'features' is not finite"):
        fastcam.attribute(vgg, images(), method, targets=score, layer="features")
    got = fastcam.attribute(vgg, images(), method, targets=score, layer="features", on_nonfinite="mask")
    assert not got.valid.any()
    assert not got.maps.any()


def test_huge_finite_maps_stay_finite():
    """max - min overflows although both are finite."""
    net = models.by_hand([[4.0, 1.0], [1.0, 1.0]]).double()
    x = torch.tensor([[[[4e307, -4e307], [0, 1]], [[0, 0], [0, 0]]]], dtype=torch.float64)
    got = fastcam.attribute(net, x, "cam", targets=0, layer="features", on_nonfinite="mask")
    assert got.maps.isfinite().all()
    if got.valid[0]:
        want = torch.tensor([[1, 0], [0.5, 0.5]], dtype=torch.float64)
        torch.testing.assert_close(got.maps[0], want, rtol=0, atol=1e-12)


# --- flat, dead and cancelling ---


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_flat_map_is_zeros(gap, method, relu):
    """A constant image on a padding-free view: features and so the map are constant, at any size of the result."""
    net = models.by_hand([[0.3, -0.1], [0.7, 0.2]])
    x = torch.full((2, 2, 5, 7), 0.37)
    for size in ("input", (13, 11)):
        got = fastcam.attribute(net, x, method, targets=1, layer="features", relu=relu, size=size)
        assert not got.maps.any()
        assert got.valid.all()


def test_nonpositive_map_is_zeros():
    net = models.by_hand([[-1.0, -2.0], [1.0, 1.0]])
    x = torch.rand(2, 2, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    for method in ("grad_cam", "xgrad_cam", "hires_cam", "layer_cam", "grad_cam_pp"):
        got = fastcam.attribute(net, x, method, targets=0, layer="features")
        assert not got.raw.any()
        assert not got.maps.any()
    assert fastcam.attribute(net, x, "cam", targets=0, layer="features").maps.any()


def pooled_scores(weight: list[float], bias: float, affine: bool) -> nn.Module:
    """y = W mean(A) + b; with `affine` False a ReLU follows, which for y > 0 changes nothing but the code path."""
    net = models.by_hand([weight, weight], [bias, bias]).double()
    if not affine:
        net.head.append(nn.ReLU())
    return net.eval()


# Channel 0 ordinary, channel 1 zero, channel 2 cancelling: S = (10, 0, 0), A2 != 0. With W = (1, 1, 1), G = 1/4.
SIGNED = torch.tensor([[[[1.0, 2], [3, 4]], [[0, 0], [0, 0]], [[5, -5], [3, -3]]]], dtype=torch.float64)
paths = pytest.mark.parametrize("affine", [True, False], ids=["closed", "autograd"])


@paths
def test_dead_and_cancelling_channels_weigh_nothing_in_xgrad_cam(affine):
    net = pooled_scores([1.0, 1.0, 1.0], 0.0, affine)
    got = fastcam.attribute(net, SIGNED, "xgrad_cam", targets=0, layer="features")
    assert got.weights.tolist() == [[0.25, 0, 0]]


@paths
def test_cancelling_rounding_noise_weighs_nothing_in_xgrad_cam(affine):
    """|S| <= 1e-6 sum |A| is noise; just above it is not."""
    for excess, weight in ((1e-7, 0.0), (1e-5, 1.0)):
        x = torch.tensor([[[[1.0, -1.0], [1.0, -1.0 + 4 * excess]]]], dtype=torch.float64)
        got = fastcam.attribute(pooled_scores([4.0], 0.0, affine), x, "xgrad_cam", targets=0, layer="features")
        torch.testing.assert_close(got.weights.item(), weight, rtol=1e-9, atol=0)


@paths
def test_dead_channels_in_grad_cam_pp(affine):
    # alpha = 4 (1/4) / (2 + S/4): (1 / 4.5, 1/2, 1/2); the dead channel's weight meets A = 0
    net = pooled_scores([1.0, 1.0, 1.0], 0.0, affine)
    got = fastcam.attribute(net, SIGNED, "grad_cam_pp", targets=0, layer="features", relu=False)
    torch.testing.assert_close(got.weights, torch.tensor([[1 / 4.5, 0.5, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(got.raw[0], SIGNED[0, 0] / 4.5 + SIGNED[0, 2] / 2)


@paths
def test_pole_of_grad_cam_pp_weighs_nothing(affine):
    """2 + S G = 0 for S = -8, G = 1/4: the coefficient is 0 there, and finite next to it."""
    net = pooled_scores([1.0], 10.0, affine)
    pole = torch.tensor([[[[-1.0, -2], [-3, -2]]]], dtype=torch.float64)
    assert fastcam.attribute(net, pole, "grad_cam_pp", targets=0, layer="features").weights.item() == 0
    near = fastcam.attribute(net, pole * (1 - 1e-3), "grad_cam_pp", targets=0, layer="features").weights.item()
    assert near == pytest.approx(1 / (2 - 2 * (1 - 1e-3)))


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp", "xgrad_cam", "hires_cam", "layer_cam", "eigen_grad_cam"])
def test_zero_gradient_gives_zeros(gap, vgg, method):
    for net in (gap, vgg):
        got = fastcam.attribute(net, images(), method, targets=lambda y: 0 * y[:, 1], layer="features")
        assert not got.raw.any()
        assert not got.maps.any()
        assert got.valid.all()
    assert fastcam.attribute(gap, torch.zeros(1, 3, 9, 9), "eigen_cam", layer="features.0.conv", targets=0).valid.all()


# --- scores that do not depend on the layer ---


class Aside(nn.Module):
    """`features` runs on the image, and the scores follow from another branch; `tied` multiplies it by zero."""

    def __init__(self, tied: bool):
        super().__init__()
        self.features, self.other, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.tied = tied

    def forward(self, x):
        aside = self.features(x)
        y = self.fc(self.other(x).relu().mean((2, 3)))
        return (y, aside) if self.tied else y


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", [m for m in GENERAL if m != "eigen_cam"])
def test_score_independent_of_the_layer(method, frozen):
    for tied, targets in ((False, 1), (True, lambda y: y[0][:, 1])):
        net = models.seeded(lambda tied=tied: Aside(tied)).requires_grad_(not frozen)
        with pytest.raises(RuntimeError, match="score does not depend on layer 'features'"):
            fastcam.attribute(net, images(), method, targets=targets, layer="features")


@pytest.mark.parametrize("name", ["gap", "vgg"])
def test_callable_that_cuts_the_graph(gap, vgg, name):
    net = {"gap": gap, "vgg": vgg}[name]
    for score in (lambda y: y[:, 1].detach(), lambda y: torch.ones(3)):
        with pytest.raises(RuntimeError, match="score does not depend on layer 'features'"):
            fastcam.attribute(net, images(), "grad_cam", targets=score, layer="features")


# --- layers that are not one feature map ---


@pytest.mark.parametrize("passes_on", [False, True])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_layer_with_several_outputs(kind, passes_on):
    """Also where one of the outputs is the layer's input, handed on as it is."""
    net = models.structured(kind)
    if not passes_on:
        net.split.forward = lambda x: {"low": 2 * x, "high": x * x} if kind == "dict" else (2 * x, x * x)

    def score(y):
        return (y["logits"] if kind == "dict" else y[0])[:, 1]

    for method in ("grad_cam", "eigen_cam"):
        with pytest.raises(TypeError, match=r"layer 'split'.*reshape_transform"):
            fastcam.attribute(net, images(), method, targets=score, layer="split")


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_output_with_several_parts(oracle, kind):
    net, part = models.structured(kind).double(), "logits" if kind == "dict" else 0
    x = images().double()
    with pytest.raises(TypeError, match=f"{kind}.*callable"):
        fastcam.attribute(net, x, "grad_cam", targets=1, layer="features")
    for method in ("grad_cam", "layer_cam"):
        got = fastcam.attribute(net, x, method, targets=lambda y: y[part][:, 1], layer="features")
        want = oracle.explain(net, "features", x, method, lambda y: y[part][:, 1])[1]
        torch.testing.assert_close(got.raw, want, rtol=0, atol=1e-12 * float(want.max()))


def to_grid(tokens: torch.Tensor) -> torch.Tensor:
    """(B, 1 + 12, K) -> (B, K, 3, 4) without the class token."""
    return tokens[:, 1:].mT.unflatten(2, (3, 4))


@pytest.mark.parametrize("method", GENERAL)
def test_tokens(oracle, method):
    net, x = models.tokens().double(), images((12, 16)).double()
    with pytest.raises(TypeError, match=r"tokens of shape \(B, 13, 12\).*reshape_transform"):
        fastcam.attribute(net, x, method, targets=1, layer="features")
    a, g, _ = oracle.tap(net, "features", x, oracle.logit([1] * 3))
    want = oracle.raw_maps(method, to_grid(a), to_grid(g))
    assert want.amax((1, 2)).min() > 0
    got = fastcam.attribute(net, x, method, targets=1, layer="features", reshape_transform=to_grid)
    torch.testing.assert_close(got.raw, want, rtol=0, atol=1e-10 * float(want.max()))
    several = fastcam.attribute(net, x, method, targets=[[0, 1]] * 3, layer="features", reshape_transform=to_grid)
    torch.testing.assert_close(several.raw[:, 1], want, rtol=0, atol=1e-10 * float(want.max()))
    with pytest.raises(TypeError, match=r"reshape_transform made \(B, 12, 12\)"):
        fastcam.attribute(net, x, method, targets=1, layer="features", reshape_transform=lambda t: t[:, 1:].mT)


def test_tokens_after_which_the_layer_is_not_read():
    """Only the class token leaves the last block, so its grid has no gradient: zeros, not noise."""
    net = models.tokens()
    got = fastcam.attribute(net, images((12, 16)), "grad_cam", targets=1, layer="mix", reshape_transform=to_grid)
    assert not got.maps.any()


# --- a single position ---


@pytest.mark.parametrize("method", METHODS)
def test_single_position(method):
    net = models.by_hand([[0.5, 0.25], [1.0, 3.0]])
    x = torch.tensor([[[[2.0]], [[4.0]]]])
    with pytest.raises(ValueError, match=r"layer 'features' has a single position.*normalize=False"):
        fastcam.attribute(net, x, method, targets=1, layer="features")
    got = fastcam.attribute(net, x, method, targets=1, layer="features", normalize=False)
    # G = W: 2 + 12 = 14; ++: alpha = w / (2 + w A) = 1/4 and 3/14; one centred row is zero
    want = {"grad_cam_pp": 2 / 4 + 12 / 14, "eigen_cam": 0.0, "eigen_grad_cam": 0.0}.get(method, 14.0)
    assert got.raw.shape == (1, 1, 1)
    assert got.raw.item() == pytest.approx(want)


# --- targets and methods ---


@pytest.mark.parametrize("method", METHODS)
def test_wrong_targets(gap, method):
    def explain(targets):
        return fastcam.attribute(gap, images(), method, targets=targets, layer="features")

    for few in ([1, 2], torch.tensor([1, 2]), torch.tensor([[1, 2]]), [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="do not fit a batch of 3"):
            explain(few)
    for bad in (5, -1, [0, 1, 5], torch.tensor([[0], [1], [-1]])):
        with pytest.raises(IndexError, match="out of range: the model's classes are 0 to 4"):
            explain(bad)
    with pytest.raises(IndexError, match="top6"):
        explain("top6")
    with pytest.raises(ValueError, match="not understood"):
        explain("best")
    for bad in (1.5, [0.5] * 3, torch.ones(3), True):
        with pytest.raises(TypeError, match="targets must"):
            explain(bad)


@pytest.mark.parametrize("method", GENERAL)
def test_callables_of_the_wrong_shape(gap, vgg, method):
    if method == "eigen_cam":
        return  # reads no score
    for net in (gap, vgg):
        for score in (lambda y: y, lambda y: y.sum(), lambda y: y[:2, 0]):
            with pytest.raises(ValueError, match=r"one score an image, shape \(3,\)"):
                fastcam.attribute(net, images(), method, targets=score, layer="features")


def test_cam_on_heads_that_have_no_class_weights(gap, vgg):
    for net, layer in ((vgg, "features"), (gap, "features.0"), (models.residual(), "features")):
        with pytest.raises(ValueError, match=rf"cam needs a head that averages layer '{layer}'.*method='grad_cam'"):
            fastcam.attribute(net, images(), "cam", targets=1, layer=layer)
    flat = models.seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9 * 12, 5)))
    with pytest.raises(ValueError, match="cam needs a head that averages layer '0'"):
        fastcam.attribute(flat, images(), "cam", targets=1, layer="0")


@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(gap, vgg, method):
    got = fastcam.attribute(net_of(method, gap, vgg), images(batch=0), method, layer="features")
    assert got.maps.shape == (0, 11, 14)
    assert got.raw.shape == (0, 6, 7)
    assert got.valid.shape == (0,)
    several = fastcam.attribute(net_of(method, gap, vgg), images(batch=0), method, targets="top2", layer="features")
    assert several.maps.shape == (0, 2, 11, 14)


@pytest.mark.parametrize("method", METHODS)
def test_training_mode_is_explained_as_evaluation_and_kept(oracle, method):
    def build():
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.9), nn.Linear(6, 5))
        return models.Net(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), *head)

    net = models.seeded(build).double()
    want = oracle.explain(net, "features", images().double(), method, oracle.logit([1] * 3))[1]
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.warns(UserWarning, match="is in train mode"):
        got = fastcam.attribute(net, images().double(), method, targets=1, layer="features")
    torch.testing.assert_close(got.raw, want, rtol=0, atol=1e-12 * float(want.abs().max()))
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


DROPPING = [("lrp", {}), ("grad_cam", {"channels_last": True}), ("grad_cam", {"precision": "bf16"})]


def rectified() -> torch.nn.Sequential:
    """Convolutions that end in ReLU, which oneDNN's own makes zeros of NaN."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5)),
    ).eval()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("method", "how"), DROPPING)
def test_pixels_that_are_not_finite_are_told_though_a_convolution_drops_them(method, how, value):
    images = torch.randn(3, 3, 12, 12)
    images[1, 0, 5, 5] = value
    with pytest.raises(ValueError, match=r"not finite for image 1 \(1 of 3"):
        fastcam.attribute(rectified(), images, method, targets=1, **how)
    masked = fastcam.attribute(rectified(), images, method, targets=1, on_nonfinite="mask", **how)
    assert masked.valid.tolist() == [True, False, True]
    assert not masked.maps[1].any()
    assert masked.maps[0].any()


class Regression(nn.Module):
    def __init__(self, scores: nn.Module):
        super().__init__()
        self.scores = scores

    def forward(self, x):
        return self.scores(x)[:, 1]


@pytest.mark.parametrize("method", ["lift_cam", "lrp"])
def test_one_score_an_image(method):
    """Outputs (B,) are explained as the class they are taken from."""
    net, x = models.vgg_like().double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    options = {"seed": "logit"} if method == "lrp" else {}
    wanted = fastcam.attribute(net, x, method, targets=1, **options).maps
    found = fastcam.attribute(Regression(net).eval(), x, method, targets=lambda output: output, **options).maps
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
