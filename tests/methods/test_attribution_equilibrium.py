"""Attribution Equilibrium against a plain sample-by-sample version, and the identities of its rules. Float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing.models import residual, seeded, torchvision_models, vgg_like


def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


def convolution(x, w, r, ratio, geometry, pointwise):
    """R' for one image, the loss terms of the total, and what was there of either sign."""
    v = w.abs()
    p, q = r.clamp(min=0).sum(), r.clamp(max=0).neg().sum()
    positive, negative = divide(r.clamp(min=0), p), divide(r.clamp(max=0), q)

    def spread(u, message):
        z = functional.conv2d(u, v, None, **geometry)
        back = torch.autograd.functional.vjp(
            lambda t: functional.conv2d(t, v, None, **geometry), u, divide(message, z)
        )[1]
        return u * back, message[z == 0].sum()

    shared, lost_c = spread(x.clamp(min=0), (1 if pointwise else ratio) * positive + negative)
    active, lost_a = spread((x > 0).to(x), positive)
    inactive, lost_b = spread((x <= 0).to(x), negative)
    n = shared.count_nonzero()
    if not pointwise and p > 0 and n > 0:
        shared = shared - (shared != 0).to(x) / n
    kept_p, kept_q = float(p > 0), float(q > 0)
    if pointwise:
        total = (kept_p - kept_q - lost_c) + (kept_p - lost_a) + (-kept_q - lost_b)
    else:
        total = ratio * kept_p - kept_q - lost_c - kept_p * float(n > 0) + kept_p - lost_a - kept_q - lost_b
    return shared + active + inactive, total


def box(x, w, r, geometry):
    low, high = x.min(), x.max()
    ones = torch.ones_like(x)
    up, down = w.clamp(min=0), w.clamp(max=0)
    forward = lambda u, v: functional.conv2d(u, v, None, **geometry)  # noqa: E731
    z = forward(x, w) - low * forward(ones, up) - high * forward(ones, down)
    s = divide(r, z)
    back = lambda v: torch.autograd.functional.vjp(lambda t: forward(t, v), x, s)[1]  # noqa: E731
    return (x - low) * back(up) + (x - high) * back(down)


def chain_map(model: nn.Sequential, start: int, image, target, ratio):
    """The map of one image (1, C, H, W) through `model[:start + 1]`, a chain of convolutions, ReLUs and max pools."""
    inputs, x = [], image
    for module in model[: start + 1]:
        inputs.append(x)
        x = module(x).detach()
    leaf = x.clone().requires_grad_()
    model[start + 1 :](leaf)[0, target].backward()
    seed = x * leaf.grad.mean((2, 3), keepdim=True)
    r = seed / seed.sum().abs()
    totals = []
    for module, x in zip(reversed(model[: start + 1]), reversed(inputs), strict=True):
        if isinstance(module, nn.MaxPool2d):
            pool = lambda t, m=module: functional.max_pool2d(t, m.kernel_size, m.stride, m.padding)  # noqa: E731
            r = torch.autograd.functional.vjp(pool, x.clamp(min=0), r)[1]
        elif isinstance(module, nn.Conv2d):
            geometry = {"stride": module.stride, "padding": module.padding, "groups": module.groups}
            if module is model[0]:
                r = box(x, module.weight.detach(), r, geometry)
            else:
                r, total = convolution(x, module.weight.detach(), r, ratio, geometry, module.kernel_size[0] == 1)
                totals.append((float(r.sum()), float(total)))
    return r.sum(1)[0], totals


def chain(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 16), nn.ReLU(), nn.Linear(16, classes),
    ).double().eval()  # fmt: skip


START = 8
IMAGES = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("ratio", [1, 1.5, 2.0])
def test_a_chain_of_convolutions_equals_the_plain_version(ratio):
    model = chain()
    targets = torch.tensor([[0, 2], [1, 3], [2, 0]])
    result = fastcam.attribute(
        model, IMAGES, "attribution_equilibrium", targets=targets, ratio=ratio, layer=str(START), normalize=False
    )
    assert result.maps.shape == (3, 2, 16, 16)
    for image in range(3):
        for column in range(2):
            want, totals = chain_map(model, START, IMAGES[image : image + 1], int(targets[image, column]), ratio)
            torch.testing.assert_close(result.maps[image, column], want, rtol=1e-9, atol=1e-12)
            for found, exact in totals:  # the written total, losses included
                assert found == pytest.approx(exact, abs=1e-9)


def test_the_start_is_the_last_activation_before_the_last_pool():
    assert fastcam.attribute(chain(), IMAGES, "attribution_equilibrium").layer == str(START)
    models = torchvision_models()
    for name, layer in (("vgg16", "features.29"), ("resnet18", "layer4"), ("alexnet", "features")):
        torch.manual_seed(0)
        model = getattr(models, name)(weights=None).eval()
        result = fastcam.attribute(model, torch.randn(1, 3, 64, 64), "attribution_equilibrium", targets=3)
        assert result.layer == layer
        assert result.maps.shape == (1, 64, 64)
        assert float(result.maps.abs().max()) == pytest.approx(1)


def test_totals_of_a_vgg_are_ratio_minus_two():
    model = vgg_like().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ratio in (1.0, 1.25, 2.0):
        total = fastcam.attribute(
            model, images, "attribution_equilibrium", ratio=ratio, normalize=False, targets=[0, 1]
        ).maps.sum((1, 2))
        torch.testing.assert_close(total, torch.full_like(total, ratio - 2), rtol=0, atol=1e-9)


def lower(weight, x, r, ratio=2.0, pointwise=False):
    """One layer's R' by the ops, as a 3 x 3 convolution with only its centre, or a 1 x 1 one."""
    from fastcam.program.relevance.equilibrium import _bases
    from fastcam.program.relevance.layer import Geometry, ModifiedWeights

    kernel = weight[:, :, None, None].abs()
    if not pointwise:
        kernel = functional.pad(kernel, (1, 1, 1, 1))
    pad = 0 if pointwise else 1
    geometry = Geometry(2, False, (1, 1), (pad, pad), (1, 1), 1)
    divisors = geometry.apply(_bases(x, 0.0), kernel)
    budgets = fastcam.ops.relevance_budgets(r)
    messages = fastcam.ops.relevance_equilibrium(r, budgets, divisors, 1.0 if pointwise else ratio)
    parts = geometry.back(messages, kernel, torch.Size((3 * len(x), *x.shape[1:])), ModifiedWeights())
    return fastcam.ops.relevance_combine(x, parts, budgets, not pointwise)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)


W = torch.tensor([[1.0, -2, 1], [-1, 1, 3]], dtype=torch.float64)
HAND = [
    (column(3, 1, 0), column(4, -2), 1.0, False, (-19, 19, -60), 60),
    (column(3, 1, 0), column(4, -2), 1.5, False, (-1, 31, -60), 60),
    (column(3, 1, 0), column(4, -2), 2.0, False, (17, 43, -60), 60),
    (column(3, 1, 0), column(4, -2), 2.0, True, (11, 49, -60), 60),
    (column(3, 1, 0), column(-4, -2), 2.0, False, (-0.65, -0.35, -1), 1),
]


@pytest.mark.parametrize(("x", "r", "ratio", "pointwise", "want", "over"), HAND)
def test_hand_example(x, r, ratio, pointwise, want, over):
    torch.testing.assert_close(lower(W, x, r, ratio, pointwise), column(*want) / over, rtol=1e-12, atol=1e-12)


def test_hand_example_of_cancelling_shares():
    ones, x, r = torch.ones(2, 3, dtype=torch.float64), column(2, 1, 0), column(3, -5)
    torch.testing.assert_close(lower(ones, x, r, 1.0), column(0.5, 0.5, -1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lower(ones, x, r, 2.0), column(2 / 3, 1 / 3, -1), rtol=1e-12, atol=1e-12)
    assert float(lower(W, column(3, 1, 0), column(4, 2)).sum()) == pytest.approx(2)


def test_signs_and_scales_of_weights_and_of_either_budget_do_not_matter():
    torch.manual_seed(0)
    w, x, r = torch.randn(5, 4).double(), torch.randn(2, 4, 6, 6).double(), torch.randn(2, 5, 6, 6).double()
    want = lower(w, x, r)
    for other in (-w, w.abs(), w * torch.tensor([[2.0], [-3], [0.5], [1], [7]]).double()):
        torch.testing.assert_close(lower(other, x, r), want, rtol=1e-11, atol=1e-12)
    scaled = 3 * r.clamp(min=0) + 0.1 * r.clamp(max=0)
    torch.testing.assert_close(lower(w, x, scaled), want, rtol=1e-11, atol=1e-12)
    assert (want[x <= 0] <= 0).all()
    # Linear in the ratio: out(r) = out(1) + (r - 1) S(x+, P).
    step = lower(w, x, r, 2.0) - lower(w, x, r, 1.0)
    torch.testing.assert_close(lower(w, x, r, 1.3) - lower(w, x, r, 1.0), 0.3 * step, rtol=1e-9, atol=1e-12)


def test_one_signed_and_empty_relevance_give_numbers():
    torch.manual_seed(0)
    w, x, r = torch.randn(5, 4).double(), torch.randn(2, 4, 6, 6).double(), torch.randn(2, 5, 6, 6).double()
    for one in (r.abs(), -r.abs(), torch.zeros_like(r)):
        for pointwise in (False, True):
            found = lower(w, x, one, 2.0, pointwise)
            assert found.isfinite().all()
    assert lower(w, x, torch.zeros_like(r)).count_nonzero() == 0
    # With active and inactive inputs everywhere nothing is lost.
    w, x = torch.randn(5, 16).double(), torch.randn(2, 16, 6, 6).double()
    totals = torch.full((2,), 2.0).double()
    torch.testing.assert_close(lower(w, x, -r.abs()).sum((1, 2, 3)), -totals)
    torch.testing.assert_close(lower(w, x, r.abs()).sum((1, 2, 3)), totals)


@pytest.mark.parametrize("options", [{}, {"residual": "proportional"}, {"concat": "slice"}], ids=str)
@pytest.mark.parametrize("build", [chain, lambda: residual().double()], ids=["chain", "residual"])
def test_an_image_alone_and_a_target_alone_give_the_same(build, options):
    model = build()
    targets = torch.tensor([[0, 1], [2, 3], [1, 0]])
    settings = {"normalize": False, **options}
    whole = fastcam.attribute(model, IMAGES, "attribution_equilibrium", targets=targets, **settings).maps
    for i in range(3):
        for t in range(2):
            one = fastcam.attribute(
                model, IMAGES[i : i + 1], "attribution_equilibrium", targets=[int(targets[i, t])], **settings
            ).maps
            torch.testing.assert_close(one[0], whole[i, t], rtol=1e-9, atol=1e-12)


def test_in_place_functional_and_reused_relu_are_one_network():
    class Net(nn.Module):
        def __init__(self, style):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.act = nn.ReLU(inplace=style == "inplace")
            self.head = nn.Linear(6, 3)
            self.style = style

        def forward(self, x):
            act = functional.relu if self.style == "functional" else self.act
            return self.head(act(self.two(act(self.one(x)))).mean((2, 3)))

    maps = []
    for style in ("inplace", "functional", "module"):
        model = seeded(lambda style=style: Net(style)).double()
        maps.append(fastcam.attribute(model, IMAGES, "attribution_equilibrium", targets=1).maps)
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_residual_branch_totals():
    """Chains of k x k convolutions in the branch: ratio - 2; all relevance goes down the branch."""
    model = residual().double()
    for ratio in (1.0, 2.0):
        total = fastcam.attribute(
            model, IMAGES, "attribution_equilibrium", targets=1, ratio=ratio, normalize=False
        ).maps.sum((1, 2))
        torch.testing.assert_close(total, torch.full_like(total, ratio - 2), rtol=0, atol=1e-8)


def test_a_grey_image_and_a_score_without_gradient():
    grey = torch.full((1, 3, 16, 16), 0.25, dtype=torch.float64)
    assert fastcam.attribute(chain(), grey, "attribution_equilibrium", targets=0).maps.count_nonzero() == 0
    model = chain()
    model[-1].weight.data.zero_()
    with pytest.warns(UserWarning, match="gradient at layer"):
        result = fastcam.attribute(model, IMAGES, "attribution_equilibrium", targets=0)
    assert result.maps.count_nonzero() == 0


@pytest.mark.parametrize(
    "options", [{"ratio": 0.9}, {"ratio": 2.1}, {"residual": "both"}, {"concat": "all"}, {"threshold": -1}]
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fastcam.Explainer(chain(), "attribution_equilibrium", **options)


def test_a_transformer_is_refused_with_the_steps_name():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(2, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(functional.relu(self.norm(self.stem(x))).mean((2, 3)))

    with pytest.raises(fastcam.UnsupportedOpError, match="norm"):
        fastcam.attribute(seeded(Tokens), IMAGES.float(), "attribution_equilibrium", targets=0)


def test_certainty_is_stated():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fastcam.attribute(chain(), IMAGES, "attribution_equilibrium", targets=0)
    assert "image by image" in result.options["certainty"]


@pytest.mark.parametrize("several", [False, True])
def test_a_softmax_at_the_end_is_left_out(several):
    """Relevance of a class is that of its logit; the scores reported are the probabilities."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(*net, nn.Flatten(), nn.Linear(5, 4)).double().eval()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    targets = torch.tensor([[0, 2], [3, 1]]) if several else 1
    plain = fastcam.attribute(net, images, "attribution_equilibrium", targets=targets, normalize=False)
    with_softmax = nn.Sequential(net, nn.Softmax(1)).eval()
    found = fastcam.attribute(with_softmax, images, "attribution_equilibrium", targets=targets, normalize=False)
    torch.testing.assert_close(found.maps, plain.maps)
    torch.testing.assert_close(found.scores, plain.scores.softmax(1))


def test_norms_by_the_batchs_statistics_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 5, 3))
    net = nn.Sequential(*net, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(fastcam.UnsupportedOpError, match="batch's own statistics"):
        fastcam.attribute(net, torch.randn(2, 3, 12, 12), "attribution_equilibrium")


def test_ratio_is_a_number():
    with pytest.raises(ValueError, match="ratio must lie in"):
        fastcam.Explainer(nn.Conv2d(3, 4, 3), "attribution_equilibrium", ratio=True)


def test_without_a_convolution_below_its_start_it_says_so():
    net = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match=r"none below this layer; pass a later one as layer="):
        fastcam.attribute(net, torch.rand(1, 3, 16, 16), "attribution_equilibrium", layer="1")


def test_layers_inside_a_residual_block_are_reached_by_both_ways_of_sharing():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = functional.relu(self.stem(x))
            x = functional.relu(x + self.two(functional.relu(self.one(x))))
            return self.head(x.mean((2, 3)))

    model = seeded(Block).double()
    for residual_rule in ("branch", "proportional"):
        found = fastcam.attribute(
            model, IMAGES, "attribution_equilibrium", residual=residual_rule, layers=["one", "two", "stem"], targets=1,
            normalize=False,
        )  # fmt: skip
        inside = found.extra["layers"]
        # The rule of a k x k convolution makes the totals: 0 at ratio 2, up to what the guards drop.
        torch.testing.assert_close(inside["one"].sum((1, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-9)
        assert inside["two"].shape == inside["stem"].shape == (3, 6, 16, 16)
    share = fastcam.attribute(
        model, IMAGES, "attribution_equilibrium", residual="branch", layers=["two"], targets=1, normalize=False
    ).extra["layers"]["two"]
    with torch.no_grad():  # of a sum x0 + x1 the branch takes |x1| / (|x0| + |x1|)
        x = functional.relu(model.stem(IMAGES))
        branch = model.two(functional.relu(model.one(x)))
    part = branch.abs() / (branch.abs() + x.abs())
    torch.testing.assert_close(inside["two"], part * share, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inactive_divisors_from_the_difference(dtype):
    """c(1[x <= 0], V) as c(1, V) less the active part, against the convolution itself; nothing where nothing is."""
    from fastcam.program.relevance.equilibrium import _bases, _divisors
    from fastcam.program.relevance.layer import Geometry, ModifiedWeights

    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 40, 13, 9, generator=generator).to(dtype)
    x[0] = x[0].abs() + 0.1  # all active: exactly 0
    x[1, :, :6] = x[1, :, :6].abs() + 0.1
    x[2] = x[2].abs() + 0.1
    x[2, ::8, ::4, ::4] = -1  # of hundreds of inputs one to five are inactive, by weights that may be small
    cache = ModifiedWeights()
    for geometry, shape in (
        (Geometry(2, False, (1, 1), (1, 1), (1, 1), 1), (8, 40, 3, 3)),
        (Geometry(2, False, (2, 2), (0, 0), (1, 1), 4), (8, 10, 2, 3)),
        (Geometry(2, True, (2, 2), (1, 1), (1, 1), 1, (1, 1)), (40, 8, 3, 3)),
    ):
        weight = torch.rand(shape, generator=generator).pow(6).to(dtype)
        found = _divisors(x, weight, geometry, 0.0, cache)
        want = geometry.apply(_bases(x, 0.0), weight)
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found, want, rtol=1000 * step, atol=0)
        assert found[6].count_nonzero() == 0
        assert torch.equal(found[7:] == 0, want[7:] == 0)
        small = _divisors(x[:, :, :8], weight, geometry, 0.0, cache)  # another size
        torch.testing.assert_close(small, geometry.apply(_bases(x[:, :, :8], 0.0), weight), rtol=20 * step, atol=1e-3)
