"""References by name, tensor and list: their pixels against loops, what is kept between calls, and what is refused."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing import models
from fastcam._testing.heads import head_net
from fastcam._testing.rescale import draw
from fastcam.methods._method import Pixels
from fastcam.methods._references import NAMES, reference_images
from fastcam.program.session import CapturedSession

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OWN = {"mean": (0.1, 0.5, 0.7), "std": (0.4, 0.2, 1.5)}


#: For tests that change nothing: one capture for all.
shared = functools.cache(head_net)


def images(batch=3, size=(12, 12), seed=1, dtype=torch.float64) -> torch.Tensor:
    return draw(batch, 3, *size, seed=seed, dtype=dtype)


def blurred(image: torch.Tensor) -> torch.Tensor:
    """(C, H, W), pixel by pixel: weights of a Gaussian on a square, borders reflected without repeating the edge."""
    height, width = image.shape[1:]
    sigma = 10 * height / 224
    radius = math.ceil(3 * sigma)

    def reflected(at: int, size: int) -> int:
        while not 0 <= at < size:
            at = -at if at < 0 else 2 * (size - 1) - at
        return at

    found = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            total = 0.0
            for di in range(-radius, radius + 1):
                for dj in range(-radius, radius + 1):
                    weight = math.exp(-(di * di + dj * dj) / (2 * sigma * sigma))
                    found[:, i, j] += weight * image[:, reflected(i + di, height), reflected(j + dj, width)]
                    total += weight
            found[:, i, j] /= total
    return found


def expected(name: str, x: torch.Tensor, mean, std) -> torch.Tensor:
    """Built in pixel space [0, 1], then normalised."""
    mean, std = (torch.tensor(numbers, dtype=x.dtype)[:, None, None] for numbers in (mean, std))
    pixels = x * std + mean
    if name == "blur":
        pixels = torch.stack([blurred(image) for image in pixels])
    elif name == "image_mean":
        pixels = pixels.mean((2, 3), keepdim=True).expand_as(pixels)
    elif name == "mean":
        pixels = mean.expand_as(x[0])[None]
    elif name == "noise":
        pixels = torch.rand(1, *x.shape[1:], generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(x)
    else:
        pixels = torch.full_like(x[:1], float(name == "white"))
    return (pixels - mean) / std


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [None, OWN], ids=["imagenet", "own"])
def test_named_references(name, given):
    """The method's result equals that with the oracle's images, and the images themselves are the oracle's."""
    mean, std = (MEAN, STD) if given is None else (given["mean"], given["std"])
    net, x = shared("vgg"), images()
    base = expected(name, x, mean, std)
    pixels = Pixels() if given is None else Pixels(given["mean"], given["std"])
    torch.testing.assert_close(reference_images(name, x, pixels, 4), base, rtol=0, atol=1e-12)
    for method in ("a_fmi", "deep_lift"):
        settings = {"targets": 1, "relu": False} if method == "a_fmi" else {"targets": 1}
        seed = {"seed": 4}
        named = fastcam.attribute(net, x, method, reference=name, **(given or {}), **settings, **seed)
        tensor = fastcam.attribute(net, x, method, reference=base, **settings)
        torch.testing.assert_close(named.raw, tensor.raw, rtol=0, atol=1e-11 * float(tensor.raw.abs().max()))


@pytest.mark.parametrize("size", [(24, 9), (5, 40), (3, 3)])
def test_blur_of_other_sizes(size):
    x = images(2, size)
    oracle = torch.stack([blurred(image) for image in x])
    torch.testing.assert_close(reference_images("blur", x, Pixels(), 0), oracle, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_named_references_of_other_ranks(rank):
    net = models.vgg_like(rank=rank).double()
    x = draw(2, 3, *(9, 8, 10)[:rank], seed=1)
    for name in NAMES:
        found = fastcam.attribute(net, x, "a_fmi", reference=name, targets=1)
        assert found.delta.abs().max() < 1e-12
        assert found.extra["difference"].abs().max() > 1e-6


def test_noise_depends_on_the_seed_alone():
    net, x = shared("vgg"), images()
    state = torch.get_rng_state()
    one, same, other = (
        fastcam.attribute(net, x, "a_fmi", reference="noise", seed=seed, targets=1).weights for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


# --- kept between calls ---


@pytest.fixture
def passes(monkeypatch):
    """Images of each pass through a trunk."""
    seen: list[int] = []
    original = CapturedSession._trunk

    def counting(self, x):
        seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(CapturedSession, "_trunk", counting)
    return seen


@pytest.mark.parametrize("method", ["a_fmi", "deep_lift"])
@pytest.mark.parametrize("name", ["black", "white", "mean", "noise"])
def test_shared_references_run_once(passes, method, name):
    net, x = shared("vgg"), images()
    explainer = fastcam.Explainer(net, method, layer="features", reference=name)
    first = explainer(x, 1)
    assert passes == [3, 1]
    second = explainer(x, 1)
    assert passes == [3, 1, 3]
    assert torch.equal(first.raw, second.raw)
    explainer(images(2, seed=5), 2)
    assert passes == [3, 1, 3, 2]
    fresh = fastcam.attribute(net, images(2, seed=5), method, layer="features", reference=name, targets=2)
    torch.testing.assert_close(explainer(images(2, seed=5), 2).raw, fresh.raw, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["blur", "image_mean"])
def test_references_made_of_the_image_run_each_time(passes, name):
    explainer = fastcam.Explainer(shared("vgg"), "a_fmi", layer="features", reference=name)
    explainer(images(), 1)
    explainer(images(seed=3), 1)
    assert passes == [3, 3, 3, 3]


@pytest.mark.parametrize("head", ["gap", "vgg"])
@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.features[0].weight.data.mul_(1.5),
        lambda net: net.features[0].weight.data[0].copy_(net.features[0].weight.data[1]),
        lambda net: net.head[-1].weight.data.neg_(),
        lambda net: setattr(net.features[0], "weight", nn.Parameter(net.features[0].weight.detach() * 2)),
    ],
    ids=["in place", "a part", "the head", "another parameter"],
)
def test_a_changed_weight_is_noticed(head, change, passes):
    net, x = head_net(head), images()
    explainer = fastcam.Explainer(net, "a_fmi", layer="features", relu=False)
    before = explainer(x, 1)
    change(net)
    after = explainer(x, 1)
    assert passes == [3, 1, 3, 1]
    assert (after.raw - before.raw).abs().max() > 1e-6
    assert torch.equal(after.raw, fastcam.attribute(net, x, "a_fmi", layer="features", relu=False, targets=1).raw)


def test_image_sizes_do_not_share_a_reference(passes):
    net = models.gap_linear().double()
    explainer = fastcam.Explainer(net, "a_fmi", reference="noise")
    for size in ((12, 12), (12, 16), (12, 12)):
        x = images(2, size)
        found = explainer(x, 1).raw
        assert torch.equal(found, fastcam.attribute(net, x, "a_fmi", reference="noise", targets=1).raw)


class Tokens(models._Tokens):
    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        x = functional.gelu(self.features(x).transpose(0, 1)).transpose(0, 1)
        return self.fc(self.mix(x)[:, 0])


@pytest.mark.parametrize("batches", [(1, 3), (3, 1, 2), (2, 2)])
def test_a_kept_reference_serves_other_batch_sizes(batches):
    """Also where the network merges the batch with something else, as attention that puts positions first."""
    net = models.seeded(Tokens).double()

    def transform(t):
        return t[:, 1:].mT.unflatten(2, (3, 3))

    options = {"layer": "features", "reshape_transform": transform, "size": "layer"}
    for name in ("black", ["white", "mean"]):
        explainer = fastcam.Explainer(net, "deep_lift", reference=name, **options)
        for batch in batches:
            x = images(batch, seed=batch)
            found = explainer(x, 1).raw
            fresh = fastcam.attribute(net, x, "deep_lift", reference=name, targets=1, **options).raw
            torch.testing.assert_close(found, fresh, rtol=0, atol=1e-13)


def test_other_batches_go_through_a_head_that_reads_sizes_of_the_trunk():
    """Two attention layers share the number of images times heads, which the first computes."""
    net, x = models.seeded(Tokens).double(), images()

    def transform(t):
        return t[:, 1:].mT.unflatten(2, (3, 3))

    options = {"layer": "features", "reshape_transform": transform, "targets": 1}
    found = fastcam.attribute(net, x, "a_fmi", variant="swap", **options)
    tokens = {}
    for name, pictures in (("image", x), ("reference", reference_images("black", x, Pixels(), 0))):
        net.features.register_forward_hook(lambda m, a, out, name=name: tokens.__setitem__(name, out.detach()))
        net(pictures)
        net.features._forward_hooks.clear()
    for k in range(12):
        changed = tokens["image"].clone()
        changed[:, 1:, k] = tokens["reference"][:, 1:, k]
        handle = net.features.register_forward_hook(lambda m, a, out, changed=changed: changed)
        drop = found.scores[:, 1] - net(x)[:, 1].detach()
        handle.remove()
        torch.testing.assert_close(found.weights[:, k], drop, rtol=0, atol=1e-12)


def test_a_reference_kept_by_index_serves_callables_and_back():
    """The closed form keeps no pass through the head; a callable on a head of two linear layers needs one."""
    torch.manual_seed(0)
    net = (
        models.Net(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4), nn.Linear(4, 5))
        .double()
        .eval()
    )
    x = images()
    explainer = fastcam.Explainer(net, "a_fmi", layer="features", relu=False)
    by_index = explainer(x, 2)
    by_callable = explainer(x, lambda output: output[:, 2])
    torch.testing.assert_close(by_callable.raw, by_index.raw, rtol=0, atol=1e-14)
    assert torch.equal(explainer(x, 2).raw, by_index.raw)


# --- what is refused ---


@pytest.mark.parametrize("method", ["a_fmi", "deep_lift"])
@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("grey", ValueError, "there is no reference 'grey'; references: black, white, mean, image_mean, blur, noise"),
        ([], ValueError, "at least one reference; got an empty list"),
        (["black", "grey"], ValueError, "there is no reference 'grey'"),
        (3, TypeError, "must be a name, a tensor or a list of them; got int"),
        (["black", None], TypeError, "got NoneType"),
        (torch.zeros(3, 12, 13, dtype=torch.float64), ValueError, r"must have the images' shape, \(3, 12, 12\), \(1, "),
        (torch.zeros(2, 3, 12, 12, dtype=torch.float64), ValueError, r"or \(3, 3, 12, 12\); got \(2, 3, 12, 12\)"),
        (torch.zeros(12, 12, dtype=torch.float64), ValueError, "got \\(12, 12\\)"),
        (torch.zeros(3, 12, 12), ValueError, "must be torch.float64 on cpu like the images; got torch.float32 on cpu"),
        (torch.zeros(3, 12, 12, dtype=torch.float64, device="meta"), ValueError, "on cpu like the images; .* on meta"),
        (torch.full((3, 12, 12), torch.nan, dtype=torch.float64), ValueError, "the reference is not finite"),
        (["black", torch.full((3, 12, 12), torch.inf, dtype=torch.float64)], ValueError, "not finite"),
    ],
)
def test_bad_references(method, reference, error, message):
    with pytest.raises(error, match=message):
        fastcam.attribute(shared("vgg"), images(), method, reference=reference, targets=1, layer="features")


def test_images_of_one_channel_must_say_how_they_were_normalised():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double().eval()
    x = draw(2, 1, 8, 8)
    for name in ("black", "white", "noise"):
        with pytest.raises(ValueError, match=r"these have 1 channels: pass mean= and std= with 1 numbers each"):
            fastcam.attribute(net, x, "deep_lift", reference=name, targets=1)
        found = fastcam.attribute(net, x, "deep_lift", reference=name, targets=1, mean=[0.13], std=[0.31])
        assert found.delta.abs().max() < 1e-12
    for name in ("mean", "image_mean", "blur"):  # no pixel value is named by these
        assert fastcam.attribute(net, x, "deep_lift", reference=name, targets=1).delta.abs().max() < 1e-12
    with pytest.raises(ValueError, match="one number for each of the images' 1 channels"):
        fastcam.attribute(net, x, "deep_lift", targets=1, mean=MEAN, std=STD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": MEAN}, "belong together"),
        ({"mean": MEAN, "std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"mean": MEAN, "std": (1.0,)}, "as many finite numbers each"),
    ],
)
def test_bad_pixels(settings, message):
    with pytest.raises(ValueError, match=message):
        fastcam.Explainer(shared("vgg"), "a_fmi", **settings)
