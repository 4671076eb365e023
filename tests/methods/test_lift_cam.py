"""LIFT-CAM: the identities of its definition, SHAP by brute force, edge cases.

Tolerances: q = max(|y(A)|, |y(0)|, sum |Con|) times 1e-12 in float64 and 1e-5 in float32.
"""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models
from fastcam._testing.heads import HEADS, MAPS, exact_shap, head_net, sampled_shap, saturated
from fastcam._testing.rescale import draw, multipliers

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CURVED = [name for name in HEADS if name != "gap"]


#: For tests that change nothing: one capture for all.
shared = functools.cache(head_net)


def images(batch=3, seed=1, dtype=torch.float64) -> torch.Tensor:
    return draw(batch, 3, 12, 12, seed=seed, dtype=dtype)


def lift(net, x, targets=1, **options):
    return fastcam.attribute(net, x, "lift_cam", targets=targets, layer="features", **options)


def zeros_score(net, x, target=1) -> torch.Tensor:
    with torch.no_grad():
        return net.head(torch.zeros_like(net.features(x)))[:, target]


def game(net, features, target=1, reference=None):
    """v(z): the score with the maps of z, and the reference's (zeros) in the place of the others."""
    base = torch.zeros_like(features) if reference is None else reference

    def play(masks):
        z = masks.to(features.dtype)[:, :, None, None]
        with torch.no_grad():
            return net.head(z * features + (1 - z) * base)[:, target].double()

    return play


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(float(expected.abs().max()), 1e-30))


# --- completeness ---


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(HEADS))
def test_weights_add_up_to_the_score(name, dtype):
    net, x = shared(name, dtype=dtype), images(dtype=dtype)
    result = lift(net, x)
    scores, zeros = result.scores[:, 1], zeros_score(net, x)
    tolerance = TOLERANCE[dtype] * torch.stack([scores.abs(), zeros.abs(), result.weights.abs().sum(1)]).amax(0)
    assert ((result.weights.sum(1) - (scores - zeros)).abs() <= tolerance).all()
    assert (result.delta.abs() <= tolerance).all()
    assert (scores - zeros).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(HEADS))
def test_complete_against_any_signed_reference_and_symmetric(name):
    """At the layer, both sides signed; half of the maps rounded, so that pools meet ties and equal elements."""
    net = head_net(name)
    net.features = nn.Conv2d(MAPS, MAPS, 1, bias=False).double()
    with torch.no_grad():
        net.features.weight.copy_(torch.eye(MAPS)[..., None, None])
    a, r = (draw(3, MAPS, 6, 6, seed=seed) for seed in (1, 2))
    a[:, ::2], r[:, ::2] = a[:, ::2].round(), r[:, ::2].round()
    m, contributions, difference = multipliers(net, a, r, layer="features")
    back, swapped, _ = multipliers(net, r, a, layer="features")
    scale = contributions.abs().sum((1, 2, 3))
    assert ((contributions.sum((1, 2, 3)) - difference).abs() <= 1e-12 * scale).all()
    close(swapped, -contributions, 1e-12)
    close(back, m, 1e-12)


# --- SHAP ---


def test_linear_head_gives_exact_shap_and_the_ablation_drop():
    net, x = shared("gap"), images()
    result = lift(net, x)
    features = net.features(x).detach()
    weight = net.head[2].weight.detach()[1]
    close(result.weights, weight * features.mean((2, 3)), 1e-12)
    for i in range(3):
        play = game(net, features[i : i + 1])
        close(result.weights[i], exact_shap(play, MAPS), 1e-12)
        dropped = play(torch.ones(1, MAPS)) - play(1 - torch.eye(MAPS))
        close(result.weights[i], dropped, 1e-12)


def test_linear_head_gives_ablation_cams_map_and_not_grad_cams():
    net, x = head_net("gap"), images()
    with torch.no_grad():
        net.head[2].bias += 10  # positive scores
        scores, features = net(x)[:, 1], net.features(x)
        drop = torch.stack(
            [scores - net.head(features * (torch.arange(MAPS) != k)[:, None, None])[:, 1] for k in range(MAPS)], 1
        )
    ablation = ((drop / scores[:, None])[..., None, None] * features).sum(1).clamp(min=0)
    low, high = ablation.amin((1, 2), keepdim=True), ablation.amax((1, 2), keepdim=True)
    found = lift(net, x, size="layer").maps
    close(found, (ablation - low) / (high - low), 1e-10)
    for method in ("grad_cam", "xgrad_cam"):
        other = fastcam.attribute(net, x, method, targets=1, layer="features", size="layer").maps
        assert (other - found).abs().amax((1, 2)).max() > 0.05


def test_bias_free_relu_head_is_gradient_times_activation():
    net, x = shared("no bias"), images()
    result = lift(net, x)
    a = net.features(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net.head(a)[:, 1].sum(), a)
    close(result.weights, (gradient * a.detach()).sum((2, 3)), 1e-12)
    xgrad = fastcam.attribute(net, x, "xgrad_cam", targets=1, layer="features").weights
    close(result.weights, xgrad * a.detach().sum((2, 3)), 1e-12)


def test_pairwise_games_have_their_shap_values():
    """Products of two maps: LIFT, exact SHAP, all orders and one order with its reverse are one."""
    net, x = shared("quadratic"), images(1)
    result, features = lift(net, x), net.features(x).detach()
    play = game(net, features)
    exact = exact_shap(play, MAPS)
    close(result.weights[0], exact, 1e-12)
    order = (3, 0, 4, 1, 2)
    close(sampled_shap(play, [order, order[::-1]]), exact, 1e-12)


@pytest.mark.parametrize("name", CURVED)
def test_sampled_shap_adds_up_to_what_the_weights_do(name):
    net, x = shared(name), images(1)
    result, play = lift(net, x), game(net, net.features(x).detach())
    for orders in ([(0, 1, 2, 3, 4)], [(2, 0, 1, 4, 3), (4, 3, 1, 0, 2), (1, 2, 3, 4, 0)]):
        close(sampled_shap(play, orders).sum(), result.weights.sum(), 1e-10)
    everything = list(itertools.permutations(range(MAPS)))
    exact = exact_shap(play, MAPS)
    close(sampled_shap(play, everything), exact, 1e-10)
    cosine = torch.nn.functional.cosine_similarity(result.weights[0], exact, dim=0)
    assert cosine > 0.5


def test_saturation():
    """y = 1 - relu(1 - a1 - a2) at (1, 1): no gradient, contributions of a half each."""
    net, x = saturated(), torch.ones(1, 2, 1, 1, dtype=torch.float64)
    result = lift(net, x, normalize=False)
    close(result.weights, torch.tensor([[0.5, 0.5]], dtype=torch.float64), 1e-15)
    close(result.maps, torch.ones(1, 1, 1, dtype=torch.float64), 1e-15)
    gradient = fastcam.attribute(net, x, "grad_cam", targets=1, layer="features", normalize=False)
    assert (gradient.weights == 0).all()
    with pytest.raises(ValueError, match="single position"):
        lift(net, x)


# --- the definition's other consequences ---


def test_dummy_symmetric_and_scaled_maps():
    net, x = head_net("vgg"), images()
    before = lift(net, x)
    with torch.no_grad():
        net.features[0].weight[2], net.features[0].bias[2] = 0, -1  # map 2 is zero
        net.features[0].weight[4], net.features[0].bias[4] = net.features[0].weight[0], net.features[0].bias[0]
        first = net.head[2].weight.unflatten(1, (MAPS, 9))
        first[:, 4] = first[:, 0]  # maps 0 and 4 are twins
    changed = lift(net, x)
    assert (changed.weights[:, 2] == 0).all()
    close(changed.weights[:, 4], changed.weights[:, 0], 1e-12)
    with torch.no_grad():
        last = net.head[-1]
        last.weight[1], last.bias[1] = 3 * last.weight[1], 3 * last.bias[1] + 5
    scaled = lift(net, x)
    close(scaled.weights, 3 * changed.weights, 1e-12)
    close(scaled.maps, changed.maps, 1e-12)
    assert (before.maps - changed.maps).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(HEADS))
def test_images_are_independent_and_targets_too(name):
    net, x = shared(name), images()
    whole = lift(net, x, [[0, 3], [1, 1], [4, 2]])
    assert whole.weights.shape == (3, 2, MAPS)
    assert whole.maps.shape == (3, 2, 12, 12)
    assert whole.delta.shape == (3, 2)
    for i, row in enumerate([[0, 3], [1, 1], [4, 2]]):
        for t, target in enumerate(row):
            alone = lift(net, x[i : i + 1], target)
            close(whole.weights[i, t], alone.weights[0], 1e-12)
            close(whole.raw[i, t], alone.raw[0], 1e-12)


@pytest.mark.parametrize("name", ["gap", "vgg", "quadratic"])
def test_callables_must_be_linear(name):
    net, x = shared(name), images()
    difference = lift(net, x, lambda output: output[:, 1] - 2 * output[:, 3])
    close(difference.weights, lift(net, x, 1).weights - 2 * lift(net, x, 3).weights, 1e-12)
    close(difference.delta + 1, torch.ones(3, dtype=torch.float64), 1e-12)
    for score in (lambda output: output.softmax(1)[:, 1], lambda output: output[:, 1] ** 2):
        with pytest.raises(ValueError, match="need a target that is linear in the model's output"):
            lift(net, x, score)


def test_probabilities_can_be_made_part_of_the_network():
    net, x = head_net("vgg"), images()
    net.head.append(nn.Softmax(1).eval())
    result = lift(net, x)
    difference = result.scores[:, 1] - zeros_score(net, x)
    close(result.weights.sum(1), difference, 1e-12)
    assert difference.abs().min() > 1e-6


def test_structured_outputs():
    for kind, pick in (("dict", lambda o: o["logits"][:, 2]), ("tuple", lambda o: o[0][:, 2])):
        net = models.structured(kind).double()
        result = fastcam.attribute(net, images(), "lift_cam", targets=pick, layer="features")
        close(result.delta + 1, torch.ones(3, dtype=torch.float64), 1e-12)
        assert result.weights.abs().sum() > 0.1


# --- edges ---


def test_maps_without_positive_evidence_are_zeros():
    net, x = head_net("gap"), images()
    with torch.no_grad():
        net.head[2].weight[1] = -net.head[2].weight[1].abs() - 0.1
    result = lift(net, x)
    assert (result.weights <= 0).all()
    assert (result.maps == 0).all()
    signed = lift(net, x, relu=False, size="layer", normalize=False)
    close(signed.maps, (signed.weights[..., None, None] * net.features(x).detach()).sum(1), 1e-12)
    assert signed.maps.min() < 0


@pytest.mark.parametrize("name", list(HEADS))
def test_features_of_zero(name):
    net, x = head_net(name), images()
    with torch.no_grad():
        net.features[0].bias.fill_(-1000)
    result = lift(net, x)
    for found in (result.weights, result.maps, result.delta):
        assert (found == 0).all()


def test_empty_batch_and_train_mode_and_nothing_left_behind():
    net, x = head_net("residual").train(), images()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        result = lift(net, x)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert not any(t.requires_grad for t in (result.maps, result.weights, result.delta))
    close(lift(net.eval(), x).weights, result.weights, 0)
    empty = lift(net, x[:0], [])
    assert empty.maps.shape == (0, 12, 12)
    assert empty.weights.shape == (0, MAPS)
    assert empty.delta.shape == (0,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(value):
    net, x = shared("vgg", dtype=torch.float32), images(dtype=torch.float32)
    x[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match="not finite for image 1"):
        lift(net, x)
    masked = lift(net, x, on_nonfinite="mask")
    assert masked.valid.tolist() == [True, False, True]
    assert (masked.maps[1] == 0).all()
    close(masked.maps[::2], lift(net, x[::2]).maps, 1e-6)


@pytest.mark.parametrize(("targets", "error"), [(5, IndexError), ([0, 1], ValueError), ([[0, 9]] * 3, IndexError)])
def test_bad_targets(targets, error):
    with pytest.raises(error):
        lift(shared("vgg"), images(), targets)


def test_a_network_that_cannot_be_captured():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            x = self.features(x)
            return self.fc((x if x.sum() > 0 else -x).relu().mean((2, 3)))

    net = Branches().double().eval()
    message = "method 'lift_cam' needs a captured network, but .*cannot trace it"
    with pytest.raises(RuntimeError, match=message):
        lift(net, images())
    assert not net.features._forward_hooks


@pytest.mark.parametrize("name", ["vgg", "residual", "gated"])
@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"channels_last": True}, {"precision": "fp64"}], ids=str)
def test_converted_runs_are_close(name, settings):
    net, x = shared(name, dtype=torch.float32), images(dtype=torch.float32)
    plain = lift(net, x)
    result = fastcam.Explainer(net, "lift_cam", layer="features", **settings)(x, 1)
    low = settings.get("precision") == "bf16"
    close(result.weights.float(), plain.weights, 0.05 if low else 1e-5)
    cosine = torch.nn.functional.cosine_similarity(result.maps.flatten(1).float(), plain.maps.flatten(1))
    assert cosine.min() > (0.995 if low else 1 - 1e-6)


def test_weights_of_a_kept_explainer_follow_the_model():
    net, x = head_net("vgg"), images()
    explainer = fastcam.Explainer(net, "lift_cam", layer="features")
    before = explainer(x, 1)
    net.head[2].weight.data.mul_(1.5)
    after = explainer(x, 1)
    close(after.weights, lift(copy.deepcopy(net), x).weights, 1e-12)
    assert (after.weights - before.weights).abs().max() > 1e-4


# --- RevealCancel in the place of Rescale ---


class Against(torch.nn.Module):
    """y = relu(sum of map 0 - sum of map 1 + c)."""

    def __init__(self, c: float):
        super().__init__()
        self.features = torch.nn.ReLU()
        self.c = c

    def forward(self, x):
        inner = self.features(x).sum((2, 3))
        return torch.relu(inner[:, :1] - inner[:, 1:] + self.c)


@pytest.mark.parametrize("c", [-2.0, 0.0, 1.5])
def test_maps_that_cancel_have_their_shap_values_by_reveal_cancel(c):
    """One map for a unit and one against it: the two orders of adding them, written out."""
    x = torch.tensor([[3.0, 1.0, 0.5, 2.0], [1.0, 0.0, 4.0, 1.0]], dtype=torch.float64).reshape(1, 2, 2, 2)
    a, b = 6.5, 6.0
    alone, against, both, none = max(a + c, 0), max(c - b, 0), max(a - b + c, 0), max(c, 0)
    want = [((alone - none) + (both - against)) / 2, ((against - none) + (both - alone)) / 2]
    found = fastcam.attribute(
        Against(c).eval(), x, "lift_cam", targets=0, layer="features", rule="reveal_cancel", normalize=False
    )
    assert found.weights[0].tolist() == pytest.approx(want, abs=1e-12)
    assert found.delta.tolist() == pytest.approx([0], abs=1e-12)
    rescale = fastcam.attribute(Against(c).eval(), x, "lift_cam", targets=0, layer="features", normalize=False)
    assert rescale.weights[0].tolist() != pytest.approx(want, abs=0.3)


@pytest.mark.parametrize("name", ["gap", "vgg", "overlapping pool", "residual"])
def test_reveal_cancel_is_that_of_deep_lift_at_the_head(name):
    net, x = shared(name), images()
    found = lift(net, x, rule="reveal_cancel", check_completeness="raise")
    with torch.no_grad():
        features = net.features(x)
    alone = fastcam.attribute(
        net.head,
        features,
        "deep_lift",
        targets=1,
        rule="reveal_cancel",
        reference=torch.zeros_like(features),
        return_contributions=True,
    )
    close(found.weights, alone.extra["contributions"].sum((2, 3)), 1e-12)
    close(found.weights.sum(1), net(x)[:, 1].detach() - zeros_score(net, x), 1e-11)
    same = torch.allclose(found.weights, lift(net, x).weights, rtol=1e-9, atol=1e-12)
    assert same == (name == "gap")  # on affine heads the rules are one


def test_steps_without_reveal_cancel_are_named():
    with pytest.raises(fastcam.UnsupportedOpError, match="RevealCancel"):
        lift(shared("gated"), images(), rule="reveal_cancel")
    with pytest.raises(ValueError, match="rule must be 'rescale' or 'reveal_cancel'; got 'reveal'"):
        fastcam.Explainer(shared("vgg"), "lift_cam", rule="reveal")
