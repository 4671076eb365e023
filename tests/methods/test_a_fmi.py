"""A-FMI: completeness, closed forms, SHAP by brute force, symmetries and edges of the reconstruction.

Float64; tolerances relative to the largest value.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import fastcam
from fastcam._testing.heads import HEADS, MAPS, exact_shap, head_net, saturated
from fastcam._testing.rescale import draw, multipliers

VARIANTS = ["mean_multiplier", "contribution_ratio", "contribution", "swap"]
CURVED = ["vgg", "overlapping pool", "residual", "gated"]


#: For tests that change nothing: one capture for all.
shared = functools.cache(head_net)


def images(batch=3, seed=1, dtype=torch.float64) -> torch.Tensor:
    return draw(batch, 3, 12, 12, seed=seed, dtype=dtype)


OTHER = images(seed=2)


def fmi(net, x, targets=1, reference=OTHER, **options):
    return fastcam.attribute(net, x, "a_fmi", targets=targets, layer="features", reference=reference, **options)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(float(expected.abs().max()), 1e-30))


def signed(result, net, x, reference):
    """sum_k fmi_k dA_k, before the ReLU."""
    with torch.no_grad():
        return (result.weights[..., None, None] * (net.features(x) - net.features(reference))).sum(1)


def score(net, x, target=1):
    with torch.no_grad():
        return net(x)[:, target]


def swapped(net, x, reference, target=1):
    """(B, K) scores with one map taken from the reference."""
    with torch.no_grad():
        a, r = net.features(x), net.features(reference)
        one = torch.eye(MAPS, dtype=torch.bool)[:, None, :, None, None]
        return torch.stack([net.head(torch.where(one[k], r, a))[:, target] for k in range(MAPS)], 1)


# --- definition ---


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("variant", VARIANTS)
def test_definition_and_completeness(name, variant):
    net, x = shared(name), images()
    result = fmi(net, x, variant=variant, return_probe=True)
    m, con, difference = multipliers(net, x, OTHER, layer="features")
    with torch.no_grad():
        change = net.features(x) - net.features(OTHER)
    drop = score(net, x)[:, None] - swapped(net, x, OTHER)
    expected = {
        "mean_multiplier": m.mean((2, 3)),
        "contribution": con.sum((2, 3)),
        "contribution_ratio": con.sum((2, 3)) / change.sum((2, 3)),
        "swap": drop,
    }[variant]
    close(result.weights, expected)
    close(result.extra["contributions"], con.sum((2, 3)))
    close(result.extra["contributions"].sum(1), difference, 1e-11)
    close(result.extra["difference"], score(net, x) - score(net, OTHER))
    close(result.extra["probe"], drop.abs(), 1e-11)
    assert (result.delta.abs() <= 1e-12 * con.abs().sum((1, 2, 3))).all()
    assert not result.extra["skipped"].any()
    close(result.raw, (expected[..., None, None] * change).sum(1).clamp(min=0))
    close(fmi(net, x, variant=variant, relu=False).raw, (expected[..., None, None] * change).sum(1))
    assert "reconstructed from the abstract" in result.options["certainty"]
    assert result.options["variant"] == variant


def test_black_is_the_default_and_the_mean_multiplier():
    net, x = shared("vgg"), images()
    black = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], dtype=torch.float64)
    base = black[:, None, None].expand(1, 3, 12, 12)
    plain = fastcam.attribute(net, x, "a_fmi", targets=1, layer="features")
    close(plain.weights, fmi(net, x, reference=base, variant="mean_multiplier").weights)
    assert plain.options["reference"] == "black"
    assert plain.options["variant"] == "mean_multiplier"


def test_the_class_is_the_images_own():
    net, x = shared("vgg"), images()
    own = score(net, x, slice(None)).argmax(1)
    found = fmi(net, x, targets=None)
    assert torch.equal(found.targets, own)
    close(found.weights, fmi(net, x, targets=own).weights)


# --- heads that average and are linear ---


def test_closed_form_on_pooled_heads():
    net, x = shared("gap"), images()
    weight = net.head[2].weight.detach()[1]
    with torch.no_grad():
        a, r = net.features(x), net.features(OTHER)
    cam = [(weight[:, None, None] * f).sum(1) / 36 for f in (a, r)]
    found = {variant: fmi(net, x, variant=variant, relu=False) for variant in VARIANTS}
    for variant in VARIANTS[:2]:
        close(found[variant].raw, cam[0] - cam[1])
        close(found[variant].raw.sum((1, 2)), found[variant].extra["difference"], 1e-11)
    close(found["contribution"].raw, found["swap"].raw)
    close(found["contribution"].weights, weight * (a - r).mean((2, 3)))
    for i in range(3):

        def play(masks, i=i):
            z = masks[:, :, None, None]
            with torch.no_grad():
                return net.head(z * a[i] + (1 - z) * r[i])[:, 1]

        close(found["contribution"].weights[i], exact_shap(play, MAPS), 1e-11)


def test_difference_of_two_classes_on_pooled_heads():
    net, x = head_net("gap"), images()
    with torch.no_grad():
        net.head[2].weight[4] = net.head[2].weight[2]
        change = net.features(x) - net.features(OTHER)
    maps = [fmi(net, x, target, relu=False).raw for target in (1, 2, 4)]
    gap = (net.head[2].weight[1] - net.head[2].weight[2]).detach()
    close(maps[0] - maps[1], (gap[:, None, None] * change).sum(1) / 36)
    close(maps[1], maps[2])


def test_average_over_references_is_that_of_their_features_on_pooled_heads():
    net, x = shared("gap"), images()
    several = [images(seed=seed) for seed in (2, 3, 4)]
    found = fmi(net, x, reference=several, relu=False)
    weight = net.head[2].weight.detach()[1]
    with torch.no_grad():
        change = net.features(x) - torch.stack([net.features(r) for r in several]).mean(0)
    close(found.raw, (weight[:, None, None] * change).sum(1) / 36)


# --- any head ---


@pytest.mark.parametrize("name", CURVED)
def test_ratio_maps_sum_to_the_difference(name):
    net, x = shared(name), images()
    found = fmi(net, x, variant="contribution_ratio", relu=False)
    close(found.raw.sum((1, 2)), found.extra["contributions"].sum(1), 1e-10)


@pytest.mark.parametrize("name", list(HEADS))
def test_a_reference_without_features_gives_lift_cam(name):
    net, x = head_net(name), images()
    with torch.no_grad():
        net.features[0].weight.abs_()
        net.features[0].bias.zero_()
    base = torch.full((3, 12, 12), -5.0, dtype=torch.float64)
    assert (net.features(base[None]) == 0).all()
    lift = fastcam.attribute(net, x, "lift_cam", targets=1, layer="features")
    close(fmi(net, x, variant="contribution", reference=base).weights, lift.weights, 1e-13)
    close(fmi(net, x, variant="contribution", reference=base).raw, lift.raw, 1e-13)


@pytest.mark.parametrize("name", list(HEADS))
def test_exchange_of_image_and_reference(name):
    net, x = shared(name), images()
    one = {variant: fmi(net, x, variant=variant, relu=False) for variant in VARIANTS}
    other = {variant: fmi(net, OTHER, variant=variant, reference=x, relu=False) for variant in VARIANTS}
    close(other["contribution"].extra["contributions"], -one["contribution"].extra["contributions"])
    for variant in ("mean_multiplier", "contribution_ratio"):
        close(other[variant].raw, -one[variant].raw, 1e-11)
    close(other["contribution"].raw, one["contribution"].raw, 1e-11)
    if name == "gap":
        close(other["swap"].raw, one["swap"].raw, 1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gap", *CURVED])
def test_the_image_as_its_own_reference(name, variant):
    net, x = shared(name), images()
    found = fmi(net, x, variant=variant, reference=x.clone(), relu=False)
    for tensor in (found.raw, found.maps, found.delta, found.extra["contributions"], found.extra["difference"]):
        assert (tensor == 0).all()
    assert found.weights.isfinite().all()
    assert (found.weights == 0).all() == (variant != "mean_multiplier")
    assert found.extra["skipped"].all() == (variant == "contribution_ratio")


@pytest.mark.parametrize("variant", VARIANTS)
def test_saturation(variant):
    """y = 1 - relu(1 - a1 - a2) between (0, 0) and (1, 1): a half each, where the gradient is zero."""
    net, x = saturated(), torch.ones(1, 2, 1, 1, dtype=torch.float64)
    found = fmi(net, x, variant=variant, reference=torch.zeros_like(x), normalize=False)
    close(found.extra["contributions"], torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    assert (found.extra["difference"] == 1).all()
    if variant == "swap":  # with one map swapped the other still saturates the score: y(1, 0) = 1
        assert (found.weights == 0).all()
    else:
        close(found.raw, torch.ones(1, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gap", "vgg"])
def test_copies_of_a_reference_are_one(name, variant):
    net, x = shared(name), images()
    one, many = fmi(net, x, variant=variant), fmi(net, x, variant=variant, reference=[OTHER] * 3)
    for field in ("weights", "raw", "maps"):
        close(getattr(many, field), getattr(one, field), 1e-12)
    close(many.extra["contributions"], one.extra["contributions"])


@pytest.mark.parametrize("name", ["gap", "overlapping pool"])
@pytest.mark.parametrize("targets", [1, [[0, 3], [1, 1], [4, 2]]], ids=["one", "several"])
def test_averages_over_references_are_complete(name, targets):
    net, x = shared(name), images()
    several = [images(seed=2), images(1, seed=3), images(1, seed=4)[0], "mean"]
    found = fmi(net, x, targets, reference=several, variant="contribution", relu=False)
    parts = [fmi(net, x, targets, reference=r, variant="contribution", relu=False) for r in several]
    for field in ("weights", "raw", "delta"):
        mean = torch.stack([getattr(part, field) for part in parts]).mean(0)
        close(getattr(found, field), mean, 1e-12 if field != "delta" else 1)
    outputs = [score(net, r if r.ndim == 4 else r[None], slice(None)) for r in several[:3]]
    outputs.append(score(net, torch.zeros_like(x), slice(None)))
    mean = torch.stack([output.expand(3, -1) for output in outputs]).mean(0)
    chosen = torch.tensor([[1]] * 3 if targets == 1 else targets)
    difference = (score(net, x, slice(None)) - mean).gather(1, chosen)
    close(found.extra["contributions"].sum(-1).reshape(3, -1), difference, 1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gap", "vgg"])
def test_scaled_logits(name, variant):
    net, x = shared(name), images()
    before = fmi(net, x, variant=variant)
    other = copy.deepcopy(net)
    with torch.no_grad():
        last = other.head[-1]
        last.weight[1], last.bias[1] = 3 * last.weight[1], 3 * last.bias[1] + 11
    after = fmi(other, x, variant=variant)
    close(after.weights, 3 * before.weights, 1e-10)
    close(after.maps, before.maps, 1e-9)


def test_a_random_last_layer_changes_the_maps():
    net, x = head_net("vgg"), images(8)
    base = images(1, seed=2)
    before = fmi(net, x, reference=base, relu=False, size="layer").raw.flatten(1)
    with torch.no_grad():
        net.head[-1].weight.copy_(draw(*net.head[-1].weight.shape, seed=11))
    after = fmi(net, x, reference=base, relu=False, size="layer").raw.flatten(1)
    ranks = [maps.argsort(1).argsort(1).double() for maps in (before, after)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    correlation = (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))
    assert correlation.mean() < 0.5


# --- targets and edges ---


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gap", "vgg", "residual"])
def test_images_and_targets_are_independent(name, variant):
    net, x = shared(name), images()
    rows = [[0, 3], [1, 1], [4, 2]]
    whole = fmi(net, x, rows, variant=variant, return_probe=True, reference=OTHER[:1])
    assert whole.weights.shape == (3, 2, MAPS)
    assert whole.extra["contributions"].shape == whole.extra["probe"].shape == (3, 2, MAPS)
    for i, row in enumerate(rows):
        for t, target in enumerate(row):
            alone = fmi(net, x[i : i + 1], target, variant=variant, return_probe=True, reference=OTHER[:1])
            close(whole.weights[i, t], alone.weights[0], 1e-11)
            close(whole.raw[i, t], alone.raw[0], 1e-11)
            close(whole.extra["probe"][i, t], alone.extra["probe"][0], 1e-11)


def test_chunks_of_the_swap_do_not_matter():
    net, x = shared("vgg"), images()
    found = [fmi(net, x, variant="swap", chunk=chunk).weights for chunk in (1, 4, 64)]
    close(found[1], found[0], 1e-11)
    close(found[2], found[0], 1e-11)


@pytest.mark.parametrize("name", ["gap", "vgg"])
def test_callables(name):
    net, x = shared(name), images()
    for variant in VARIANTS:
        found = fmi(net, x, lambda output: output[:, 1] - 2 * output[:, 3], variant=variant)
        close(
            found.weights, fmi(net, x, 1, variant=variant).weights - 2 * fmi(net, x, 3, variant=variant).weights, 1e-11
        )
    with pytest.raises(ValueError, match="linear in the model's output"):
        fmi(net, x, lambda output: output.log_softmax(1)[:, 1])


def test_maps_whose_difference_cancels_are_skipped():
    """Map 2 is the reference's turned around: its differences add up to nothing."""
    net, x = head_net("vgg"), images()
    with torch.no_grad():
        net.features[0].weight.zero_()
        net.features[0].weight[:, 0, 1, 1] = 1
        net.features[0].bias.fill_(100)
        net.features[0].weight[2, 0, 1, 1] = 5
    base = x.flip(2)
    base[:, :, ::2] = x[:, :, ::2].flip(2)  # the same numbers at other read positions
    found = fmi(net, x, reference=base, variant="contribution_ratio", relu=False)
    assert found.extra["skipped"].all()
    assert (found.weights == 0).all()
    assert (found.delta.abs() < 1e-9).all()
    kept = fmi(net, x, reference=base, variant="contribution_ratio", relu=False, ratio_eps=0.0)
    assert kept.weights.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "gradient"}, "variant must be one of 'mean_multiplier', .*got 'gradient'"),
        ({"ratio_eps": 1.0}, "ratio_eps must be in"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fmi(shared("gap"), images(), **options)


def test_empty_batch():
    net, x = shared("vgg"), images()
    for reference in ("black", OTHER[:1], [OTHER[:1], "mean"]):
        found = fmi(net, x[:0], [], reference=reference)
        assert found.maps.shape == (0, 12, 12)
        assert found.weights.shape == found.extra["contributions"].shape == (0, MAPS)


@pytest.mark.parametrize("name", ["gap", "vgg"])
def test_half_precision_is_close(name):
    net, x = shared(name, dtype=torch.float32), images(dtype=torch.float32)
    plain = fmi(net, x, reference="black", relu=False)
    low = fastcam.Explainer(net, "a_fmi", layer="features", precision="bf16", channels_last=True, relu=False)(x, 1)
    cosine = torch.nn.functional.cosine_similarity(low.raw.float().flatten(1), plain.raw.flatten(1))
    assert cosine.min() > 0.99


def test_a_network_that_cannot_be_captured_says_so():
    net = head_net("vgg")
    net.features.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(
        RuntimeError, match="method 'a_fmi' needs a captured network, but module 'features' has forward"
    ):
        fmi(net, images())
