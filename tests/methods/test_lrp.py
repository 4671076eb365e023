"""LRP and its relatives on whole networks: totals, identities, several targets and layers, bad input. Float64."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing.models import residual, seeded, torchvision_models, vgg_like
from fastcam.relevance import COMPOSITES, Composite, Epsilon, Flat, Gamma, Norm, ZPlus

IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
TARGETS = [1, 0, 4]
NAMES = [name for name in COMPOSITES if name != "epsilon_gamma_box"]


class Plain(nn.Module):
    """Convolutions without biases, overlapping pools and a linear head: nothing absorbs relevance."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.two = nn.Conv2d(8, 12, 3, padding=1, bias=bias)
        self.head = nn.Linear(12, 5, bias=bias)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.one(x)), 3, 2, 1)
        return self.head(functional.relu(self.two(x)).mean((2, 3)))


def plain(bias: bool = False) -> nn.Module:
    return seeded(lambda: Plain(bias)).double()


def test_input_times_gradient_is_epsilon_without_biases():
    model = plain()
    tiny = Composite(conv=Epsilon(epsilon=0.0), linear=Epsilon(epsilon=0.0), pool=Norm(epsilon=0.0))
    result = fastcam.attribute(
        model, IMAGES, "lrp", composite=tiny, seed="logit", targets=TARGETS, normalize=False, return_relevance=True
    )
    leaf = IMAGES.clone().requires_grad_()
    scores = model(leaf)[range(3), TARGETS]
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    torch.testing.assert_close(result.extra["relevance"], IMAGES * gradient, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.maps.sum((1, 2)), scores.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.delta, torch.zeros(3).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1_flat"])
def test_totals_are_kept_where_no_bias_absorbs_any(composite):
    result = fastcam.attribute(plain(), IMAGES, "lrp", composite=composite, targets=TARGETS, normalize=False)
    torch.testing.assert_close(result.maps.sum((1, 2)), torch.ones(3).double(), rtol=5e-3, atol=5e-3)
    assert result.delta.abs().max() < 5e-3  # the stabiliser's share of small logits
    biased = fastcam.attribute(plain(True), IMAGES, "lrp", composite="epsilon_plus", bias="zero", targets=TARGETS)
    assert biased.delta.abs().max() < 5e-3
    kept = fastcam.attribute(plain(True), IMAGES, "lrp", composite="epsilon_plus", targets=TARGETS)
    assert kept.delta.abs().max() > 1e-2  # what the biases took


@pytest.mark.parametrize("build", [vgg_like, residual], ids=["vgg", "residual"])
@pytest.mark.parametrize("method", ["lrp", "relevance_cam", "clrp", "rap", "guided_backprop"])
def test_an_image_alone_and_a_target_alone_give_the_same(method, build):
    model = build().double()
    targets = torch.tensor([[0, 1], [2, 3], [4, 0]])
    whole = fastcam.attribute(model, IMAGES, method, targets=targets, normalize=False).maps
    assert whole.shape == (3, 2, 32, 32)
    for i in range(3):
        for t in range(2):
            alone = fastcam.attribute(
                model, IMAGES[i : i + 1], method, targets=[int(targets[i, t])], normalize=False
            ).maps
            torch.testing.assert_close(alone[0], whole[i, t], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("composite", NAMES)
def test_layers_of_one_walk_are_the_walks_that_end_there(composite):
    """Also beside a skip, which has its share of the sum behind the layer."""
    model, names = residual().double(), ["features", "features.norm1"]
    options = {"composite": composite, "targets": TARGETS, "normalize": False}
    result = fastcam.attribute(model, IMAGES, "lrp", layers=names, **options)
    for layer in names:
        there = fastcam.attribute(model, IMAGES, "lrp", layer=layer, size="layer", **options)
        torch.testing.assert_close(result.extra["layers"][layer].sum(1), there.maps, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="no layer 'nowhere'"):
        fastcam.attribute(model, IMAGES, "lrp", layers=["nowhere"], targets=0)
    with pytest.raises(TypeError, match="sequence of module names"):
        fastcam.attribute(model, IMAGES, "lrp", layers="features", targets=0)


ZOO = [
    *("resnet18", "vgg11_bn", "densenet121", "googlenet", "mobilenet_v3_small", "convnext_tiny"),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("resnet50", "mobilenet_v2", "efficientnet_b0", "alexnet", "regnet_y_400mf")
    ),
]


@pytest.mark.parametrize("name", ZOO)
def test_networks_capture_and_run(name):
    torch.manual_seed(0)
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(torchvision_models(), name)(weights=None, **extra)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # statistics of a batch: activations of untrained networks fade otherwise
        model(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)))
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    result = fastcam.attribute(model, images, "lrp", composite="epsilon_plus", targets=[3, 8], normalize=False)
    assert result.maps.shape == (2, 64, 64)
    assert result.maps.isfinite().all()
    assert result.maps.flatten(1).abs().sum(1).gt(0).all()
    torch.testing.assert_close(result.scores, model(images), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_volumes_and_resizing_keep_the_total():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 6, 4, 2, bias=False), nn.ConvTranspose2d(12, 5, 3, 2, bias=False)

        def forward(self, x):
            x = functional.relu(self.down(x))
            wide = functional.interpolate(x, scale_factor=2, mode="bilinear")
            both = torch.cat([wide, functional.interpolate(x, size=wide.shape[2:], mode="nearest")], 1)
            return functional.relu(self.up(both)).amax((2, 3))

    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Conv3d(2, 6, 3, bias=False), nn.Linear(6, 5, bias=False)

        def forward(self, x):
            return self.head(functional.avg_pool3d(functional.relu(self.one(x)), 2).mean((2, 3, 4)))

    volume = torch.randn(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for build, x in ((Decoder, IMAGES[:2]), (Volume, volume)):
        composite = Composite(conv=ZPlus(epsilon=0.0), linear=ZPlus(epsilon=0.0), pool=Norm(epsilon=0.0))
        found = fastcam.attribute(
            seeded(build).double(), x, "lrp", composite=composite, targets=[1, 2], normalize=False
        )
        torch.testing.assert_close(found.maps.flatten(1).sum(1), torch.ones(2).double(), rtol=1e-9, atol=1e-9)


def test_changed_weights_are_seen_at_once():
    model = vgg_like().double()
    explainer = fastcam.Explainer(model, "lrp", composite="epsilon_alpha2_beta1_flat")
    first = explainer(IMAGES, 1).maps
    assert torch.equal(explainer(IMAGES, 1).maps, first)
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        convolution.weight.neg_()
    changed = explainer(IMAGES, 1).maps
    fresh = fastcam.attribute(model, IMAGES, "lrp", composite="epsilon_alpha2_beta1_flat", targets=1).maps
    assert torch.equal(changed, fresh)
    assert not torch.allclose(changed, first)
    convolution.weight.data = -convolution.weight.data  # another tensor
    torch.testing.assert_close(explainer(IMAGES, 1).maps, first, rtol=1e-9, atol=1e-12)


def test_a_composite_of_the_users_own():
    model = residual().double()
    mine = Composite(conv=ZPlus(), linear=Epsilon(), first=Flat(), names={"features*": Gamma(gamma=0.1)})
    ours = fastcam.attribute(model, IMAGES, "lrp", composite=mine, targets=TARGETS).maps
    usual = fastcam.attribute(model, IMAGES, "lrp", targets=TARGETS).maps
    same = Composite(conv=ZPlus(), linear=Epsilon(), first=Flat(bias=False))
    torch.testing.assert_close(fastcam.attribute(model, IMAGES, "lrp", composite=same, targets=TARGETS).maps, usual)
    assert ours.isfinite().all()
    assert not torch.allclose(ours, usual)


def test_a_softmax_at_the_end_is_left_out():
    inner = vgg_like().double()
    model = nn.Sequential(inner, nn.Softmax(1)).eval()
    with_softmax = fastcam.attribute(model, IMAGES, "lrp", targets=TARGETS).maps
    torch.testing.assert_close(with_softmax, fastcam.attribute(inner, IMAGES, "lrp", targets=TARGETS).maps)


def test_seeds():
    model = vgg_like().double()
    one = fastcam.attribute(model, IMAGES, "lrp", targets=TARGETS, normalize=False)
    logit = fastcam.attribute(model, IMAGES, "lrp", targets=TARGETS, seed="logit", normalize=False)
    scores = one.scores[range(3), TARGETS]
    torch.testing.assert_close(logit.maps, one.maps * scores.reshape(3, 1, 1), rtol=1e-9, atol=1e-12)
    seed = functional.one_hot(torch.tensor(TARGETS), 5).double()
    given = fastcam.attribute(model, IMAGES, "lrp", seed=seed, normalize=False)
    torch.testing.assert_close(given.maps, one.maps)
    called = fastcam.attribute(model, IMAGES, "lrp", targets=lambda y: (y * seed).sum(1), normalize=False)
    torch.testing.assert_close(called.maps, one.maps)
    contrast = fastcam.attribute(model, IMAGES, "lrp", seed="contrast", targets=TARGETS, normalize=False)
    spread = fastcam.attribute(model, IMAGES, "lrp", seed=seed * 1.2 - 0.2, normalize=False)
    torch.testing.assert_close(contrast.maps, spread.maps)
    with pytest.raises(ValueError, match="logits' shape"):
        fastcam.attribute(model, IMAGES, "lrp", seed=seed[:, :4])


def test_contrasts_total_nothing_and_sglrp_is_its_definition():
    model = vgg_like().double()
    for method, options in (
        ("clrp", {}), ("clrp", {"dual": "logits"}), ("clrp", {"dual": "negated"}), ("sglrp", {})
    ):  # fmt: skip
        found = fastcam.attribute(model, IMAGES, method, targets=TARGETS, normalize=False, **options)
        size = found.maps.abs().sum((1, 2))
        assert (found.maps.sum((1, 2)).abs() <= 1e-9 * size).all()
        clipped = fastcam.attribute(model, IMAGES, method, targets=TARGETS, normalize=False, clip=True, **options)
        torch.testing.assert_close(clipped.maps, found.maps.clamp(min=0))
    p = model(IMAGES).softmax(1).detach()
    onto = functional.one_hot(torch.tensor(TARGETS), 5).double()
    pc = (p * onto).sum(1, keepdim=True)
    from fastcam.methods.relevance_cam import guarded

    def walk(seed):
        return fastcam.attribute(model, IMAGES, "lrp", composite=guarded(), seed=seed, normalize=False).maps

    target, other = walk(onto * (pc * (1 - pc) + 1e-8)), walk((1 - onto) * pc * p)
    want = target - other * (target.sum((1, 2)) / other.sum((1, 2))).reshape(3, 1, 1)
    got = fastcam.attribute(model, IMAGES, "sglrp", targets=TARGETS, normalize=False).maps
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dual", ["logits", "negated"])
def test_clrp_duals_are_two_walks(dual):
    """L_t and L_o walked apart - the second through a network whose last weights are negated - each over its total."""
    from fastcam.methods.relevance_cam import guarded

    model = plain(True)
    logits = model(IMAGES).detach()
    onto = functional.one_hot(torch.tensor(TARGETS), 5).double()

    def share(net, seed):
        found = fastcam.attribute(net, IMAGES, "lrp", composite=guarded(), seed=seed, normalize=False).maps
        return found / found.sum((1, 2), keepdim=True)

    negated = plain(True)
    negated.head.weight.data.neg_()
    other = share(negated, logits.abs() * onto) if dual == "negated" else share(model, logits.abs() * (1 - onto))
    found = fastcam.attribute(model, IMAGES, "clrp", dual=dual, targets=TARGETS, normalize=False)
    torch.testing.assert_close(found.maps, share(model, logits.abs() * onto) - other, rtol=1e-9, atol=1e-12)
    ends = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    with pytest.raises(ValueError, match="linear output layer"):
        fastcam.attribute(ends, IMAGES, "clrp", dual="negated")


def test_relevance_cam_with_the_bias_of_the_release():
    """One convolution above the layer, by hand: the divisor has the bias twice, whatever its sign."""
    model = plain(True)
    found = fastcam.attribute(
        model, IMAGES, "relevance_cam", layer="one", bias="release", targets=TARGETS, normalize=False,
        return_relevance=True,
    ).extra["relevance"]  # fmt: skip
    with torch.no_grad():
        leaf = functional.relu(model.one(IMAGES))
        pooled = functional.max_pool2d(leaf, 3, 2, 1)
        above = functional.relu(model.two(pooled))
        seed = functional.one_hot(torch.tensor(TARGETS), 5).double() * 1.2 - 0.2
        up = model.head.weight.clamp(min=0)
        means = above.mean((2, 3))
        divisor = means @ up.T
        at_means = means * (torch.where(divisor == 0, 0.0, seed / divisor) @ up)
        total = above.sum((2, 3), keepdim=True)
        r = above * torch.where(total == 0, 0.0, at_means[:, :, None, None] / total)
        w = model.two.weight.clamp(min=0)
        z = functional.conv2d(pooled, w, 2 * model.two.bias, padding=1)
        r = pooled * functional.conv_transpose2d(torch.where(z == 0, 0.0, r / z), w, padding=1)
    want = torch.autograd.functional.vjp(lambda t: functional.max_pool2d(t, 3, 2, 1), leaf, r)[1]
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_relevance_cam_weights_are_mean_relevance_and_total_one_over_the_classes():
    model = plain()
    result = fastcam.attribute(
        model,
        IMAGES,
        "relevance_cam",
        layer="two",
        targets=TARGETS,
        return_relevance=True,
        normalize=False,
        size="layer",
    )
    relevance = result.extra["relevance"]
    torch.testing.assert_close(result.weights, relevance.mean((2, 3)), rtol=1e-10, atol=1e-12)
    features = model.two(functional.max_pool2d(functional.relu(model.one(IMAGES)), 3, 2, 1)).detach()
    want = (result.weights[:, :, None, None] * features).sum(1)
    torch.testing.assert_close(result.maps, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        relevance.sum((1, 2, 3)), torch.full((3,), 0.2, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


def test_rap_totals_are_the_logits():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
                nn.Flatten(), nn.Linear(12 * 256, 10), nn.ReLU(), nn.Linear(10, 5),
            )  # fmt: skip

        def forward(self, x):
            return self.body(x)

    model = seeded(Chain).double()
    result = fastcam.attribute(model, IMAGES, "rap", targets=TARGETS, normalize=False)
    torch.testing.assert_close(result.maps.sum((1, 2)), result.scores[range(3), TARGETS], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(result.delta, torch.zeros(3).double(), rtol=0, atol=1e-8)
    signed = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 784, 5)
    ).double()
    with pytest.raises(fastcam.UnsupportedOpError, match="mirror='joint'"):
        fastcam.attribute(signed.eval(), IMAGES, "rap", targets=TARGETS)
    joint = fastcam.attribute(signed.eval(), IMAGES, "rap", targets=TARGETS, mirror="joint", normalize=False)
    torch.testing.assert_close(joint.maps.sum((1, 2)), joint.scores[range(3), TARGETS].detach(), rtol=1e-7, atol=1e-9)


def test_guided_backprop_and_deconvnet_by_hand():
    def build():
        stem, norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        norm.running_mean, norm.running_var = torch.randn(6), torch.rand(6) + 0.2
        return nn.Sequential(stem, norm, nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(1),
                             nn.Linear(8 * 12 * 12, 5))  # fmt: skip

    model = seeded(build).double()
    for method, mask in (("guided_backprop", True), ("deconvnet", False)):

        class Rule(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.clamp(min=0)

            @staticmethod
            def backward(ctx, g, mask=mask):
                (x,) = ctx.saved_tensors
                return g.clamp(min=0) * (x > 0) if mask else g.clamp(min=0)

        class Swapped(nn.Module):
            def forward(self, x, rule=Rule):
                return rule.apply(x)

        twin = seeded(build).double()
        for parent in list(twin.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(parent, name, Swapped())
        assert any(isinstance(m, Swapped) for m in twin.modules())
        leaf = IMAGES.clone().requires_grad_()
        before_norm = twin[0](leaf)
        want, inside = torch.autograd.grad(twin[1:](before_norm)[range(3), TARGETS].sum(), [leaf, before_norm])
        options = {"targets": TARGETS, "normalize": False, "return_relevance": True}
        got = fastcam.attribute(model, IMAGES, method, **options)
        torch.testing.assert_close(got.extra["relevance"], want, rtol=1e-9, atol=1e-12)
        at_layer = fastcam.attribute(model, IMAGES, method, layer="0", **options)
        torch.testing.assert_close(at_layer.extra["relevance"], inside, rtol=1e-9, atol=1e-12)
        beside = fastcam.attribute(model, IMAGES, method, layers=["0"], **options)
        torch.testing.assert_close(beside.extra["layers"]["0"], inside, rtol=1e-9, atol=1e-12)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.cumprod(self.stem(x), 2).mean((2, 3)))


def test_a_step_without_a_rule_is_named_and_can_be_taught():
    model = seeded(Odd).double()
    with pytest.raises(fastcam.UnsupportedOpError, match=r"aten::cumprod.*register_relevance_rule") as caught:
        fastcam.attribute(model, IMAGES, "lrp", targets=0)
    assert "test_lrp.py" in str(caught.value)
    from fastcam.program.relevance import walk

    try:
        fastcam.register_relevance_rule("aten::cumprod", "pass")
        passed = fastcam.attribute(model, IMAGES, "lrp", targets=0).maps
        fastcam.register_relevance_rule("aten::cumprod", lambda step, relevance: {step.source: relevance})
        assert torch.equal(fastcam.attribute(model, IMAGES, "lrp", targets=0).maps, passed)
        fastcam.register_relevance_rule("aten::cumprod", "gradient")
        assert not torch.equal(fastcam.attribute(model, IMAGES, "lrp", targets=0).maps, passed)
        for bad in ("swoosh", 3):
            with pytest.raises((ValueError, TypeError), match="rule must be"):
                fastcam.register_relevance_rule("aten::cumprod", bad)
        with pytest.raises(ValueError, match="aten::cumprod"):
            fastcam.register_relevance_rule("cumprod", "pass")
    finally:
        walk._registered.clear()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"composite": "epsilon_pls"}, "did you mean 'epsilon_plus"),
        ({"composite": "epsilon_gamma_box"}, "low= and high="),
        ({"composite": "epsilon_gamma_box", "low": 2.0, "high": 1.0}, "low must not exceed"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"gamma": float("inf")}, "gamma"),
        ({"composite": "epsilon_alpha2_beta1", "alpha": 3.0}, "alpha - beta"),
        ({"seed": "one"}, "seed"),
        ({"bias": "none"}, "bias"),
        ({"max_pool": "all"}, "max_pool"),
        ({"norms": "drop"}, "norms"),
        ({"composite": Composite(), "gamma": 0.5}, "gamma belongs"),
        ({"composite": "epsilon_plus", "gamma": 0.5}, "'epsilon_plus' has no gamma; it was given gamma=0.5"),
        ({"composite": "guided_backprop", "epsilon": 0.5}, "has no epsilon"),
        ({"composite": "guided_backprop", "bias": "zero"}, "has no bias"),
        ({"low": 0.0}, "has no low"),
        ({"convention": "innvestigate"}, "convention must be"),
        ({"convention": "captum", "composite": "epsilon_plus_flat"}, "none like Flat"),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        fastcam.Explainer(vgg_like(), "lrp", **options)


def test_bad_rules_in_a_composite_are_named():
    with pytest.raises(TypeError, match="conv must be"):
        Composite(conv="zplus")
    with pytest.raises(TypeError, match="activation must be"):
        Composite(activation=ZPlus())
    with pytest.raises(TypeError, match="names must map"):
        Composite(names={"layer": "zplus"})


def test_patterns_of_a_composite_must_match_the_network():
    mine = Composite(names={"featurs.*": Gamma(0.1)})
    with pytest.raises(ValueError, match=r"pattern 'featurs.\*' matches no module .* did you mean"):
        fastcam.attribute(vgg_like(), IMAGES.float(), "lrp", composite=mine, targets=0)


def test_nan_zero_and_empty():
    model = vgg_like().double()
    bad = IMAGES.clone()
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="image 1"):
        fastcam.attribute(model, bad, "lrp", targets=TARGETS)
    masked = fastcam.attribute(model, bad, "lrp", targets=TARGETS, on_nonfinite="mask")
    assert masked.valid.tolist() == [True, False, True]
    assert fastcam.attribute(model, torch.zeros_like(IMAGES), "lrp", targets=TARGETS).maps.isfinite().all()
    assert fastcam.attribute(model, IMAGES[:0], "lrp").maps.shape == (0, 32, 32)
    several = torch.zeros(0, 2).long()
    empty = fastcam.attribute(model, IMAGES[:0], "attribution_equilibrium", targets=several)
    assert empty.maps.shape == (0, 2, 32, 32)
    nothing = fastcam.attribute(model, IMAGES, "lrp", seed=torch.zeros(3, 5).double())
    assert nothing.maps.count_nonzero() == 0


@pytest.mark.parametrize("method", ["lrp", "attribution_equilibrium", "relevance_cam"])
def test_channels_last_bf16_and_half(method):
    model = vgg_like()
    images = IMAGES.float()
    plain = fastcam.attribute(model, images, method, targets=TARGETS).maps

    def similarity(maps: torch.Tensor) -> float:
        return float(functional.cosine_similarity(maps.float().flatten(1), plain.flatten(1)).min())

    last = fastcam.Explainer(model, method, channels_last=True)(images, TARGETS).maps
    assert similarity(last) > 0.9999
    half = fastcam.Explainer(model, method, precision="bf16")(images, TARGETS).maps
    assert half.dtype == torch.float32
    assert similarity(half) > 0.9
    sixteen = fastcam.Explainer(model, method, precision="fp16")(images, TARGETS).maps
    assert similarity(sixteen) > 0.9999  # a float16 network is walked in float32
    own = fastcam.attribute(vgg_like().half(), images.half(), method, targets=TARGETS)
    assert own.scores.dtype == torch.float32
    assert similarity(own.maps) > 0.999  # its weights are rounded


@pytest.mark.parametrize("method", ["lrp", "attribution_equilibrium"])
def test_a_model_in_train_mode_is_explained_as_in_evaluation_and_left_as_it_was(method):
    model = residual()
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    want = fastcam.attribute(model, IMAGES.float(), method, targets=0).maps
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        found = fastcam.attribute(model, IMAGES.float(), method, targets=0).maps
    assert torch.equal(found, want)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_norms_by_the_batchs_statistics_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 5, 3))
    net = nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(fastcam.UnsupportedOpError, match="batch's own statistics"):
        fastcam.attribute(net, IMAGES.float(), "lrp", targets=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.25, 0.0])
def test_grey_images(value, dtype):
    """The box rule between the least and greatest value of an image has nothing to give; other rules have."""
    model = vgg_like().to(dtype)
    grey = torch.full((2, 3, 32, 32), value, dtype=dtype)
    for method in ("rap", "clrp", "sglrp"):
        assert fastcam.attribute(model, grey, method, targets=0).maps.count_nonzero() == 0
    box = {"composite": "epsilon_gamma_box", "low": "minmax", "high": "minmax"}
    assert fastcam.attribute(model, grey, "lrp", targets=0, **box).maps.count_nonzero() == 0
    for composite in ("epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1"):
        assert fastcam.attribute(model, grey, "lrp", targets=0, composite=composite).maps.isfinite().all()


@pytest.mark.parametrize("method", ["lrp", "relevance_cam", "clrp", "sglrp", "rap", "attribution_equilibrium"])
def test_divisors_of_zero_everywhere(method):
    """No weight, no bias: every divisor is 0, and every map 0 rather than NaN."""
    model = vgg_like()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a gradient that is zero
        found = fastcam.attribute(model, IMAGES.float(), method, targets=TARGETS)
    assert found.maps.count_nonzero() == 0


@pytest.mark.parametrize("method", ["lrp", "attribution_equilibrium", "rap", "guided_backprop"])
def test_an_explainer_that_is_gone_leaves_nothing_with_the_model(method):
    model = vgg_like()
    explainer = fastcam.Explainer(model, method)
    explainer(IMAGES.float(), 0)
    copied = pickle.loads(pickle.dumps(explainer))
    composer = weakref.ref(explainer.options.needed("features").composer)
    assert torch.equal(copied(IMAGES.float(), 0).maps, explainer(IMAGES.float(), 0).maps)
    del explainer
    gc.collect()
    assert composer() is None


def test_reshape_transform_moves_relevance_too():
    class Last(nn.Module):
        """Channels last between the convolutions, as some transformers' blocks are."""

        def __init__(self):
            super().__init__()
            self.stem, self.mix, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(functional.relu(self.mix(functional.relu(self.stem(x)).permute(0, 2, 3, 1))).mean((1, 2)))

    model = seeded(Last).double()
    settings = {"targets": TARGETS, "layer": "mix", "normalize": False, "size": "layer", "return_relevance": True}
    found = fastcam.attribute(
        model, IMAGES, "relevance_cam", reshape_transform=lambda t: t.permute(0, 3, 1, 2), **settings
    )
    assert found.extra["relevance"].shape == (3, 6, 30, 30)
    torch.testing.assert_close(found.weights, found.extra["relevance"].mean((2, 3)))
    with pytest.raises(ValueError, match="reshape_transform"):
        fastcam.Explainer(model, "attribution_equilibrium", reshape_transform=lambda t: t)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Sigmoid, nn.GELU, nn.Tanh, nn.LeakyReLU, nn.ReLU6])
@pytest.mark.parametrize("method", ["guided_backprop", "deconvnet"])
def test_other_activations_than_relu_have_their_gradient(method, activation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), activation(), nn.Conv2d(4, 5, 3), activation())
    net = nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).double().eval()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(net(images)[:, 1].sum(), images)
    found = fastcam.attribute(net, images.detach(), method, targets=1, normalize=False)
    torch.testing.assert_close(found.maps, gradient.sum(1))


def test_rap_wants_a_linear_output():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match="linear output layer"):
        fastcam.attribute(net, torch.rand(1, 3, 8, 8), "rap")


def test_an_image_of_one_channel():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(*net, nn.Flatten(), nn.Linear(5, 3, bias=False)).double().eval()
    images = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    for method in ("lrp", "rap", "clrp", "relevance_cam", "attribution_equilibrium", "guided_backprop"):
        result = fastcam.attribute(net, images, method, targets=1)
        assert result.maps.shape == (2, 12, 12)
        assert result.maps.abs().amax((1, 2)).tolist() == [pytest.approx(1), pytest.approx(1)]


@pytest.mark.parametrize("method", ["guided_backprop", "deconvnet"])
def test_what_is_made_of_weights_is_kept_until_they_change(method, monkeypatch):
    from fastcam.program.relevance import layer

    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()).eval()
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).eval()
    flipped, plain = [], layer._flipped
    monkeypatch.setattr(layer, "_flipped", lambda *given: flipped.append(given) or plain(*given))
    explainer, images = fastcam.Explainer(model, method), torch.rand(2, 3, 8, 8)
    first = explainer(images, 1).raw
    once = len(flipped)
    assert once > 0
    torch.testing.assert_close(explainer(images, 1).raw, first, rtol=0, atol=0)
    assert len(flipped) == once
    with torch.no_grad():
        model[0][2].weight.mul_(-1)
    changed = explainer(images, 1).raw
    assert first.any()
    torch.testing.assert_close(changed, fastcam.Explainer(model, method)(images, 1).raw, rtol=0, atol=0)
    assert not torch.equal(changed, first)
