"""DeepLIFT at pixels and at layers: definition, completeness, layers that connections go around, targets, edges.

Float64; tolerances relative to the largest value.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing import models
from fastcam._testing.heads import HEADS, head_net, saturated
from fastcam._testing.rescale import draw, multipliers

BUILDERS = {
    "gap": models.gap_linear,
    "vgg": models.vgg_like,
    "residual": models.residual,
    **{name: (lambda name=name: head_net(name)) for name in ("overlapping pool", "gated", "quadratic")},
}


#: For tests that change nothing: one capture for all.
shared = functools.cache(head_net)


@functools.cache
def built(name: str) -> nn.Module:
    return BUILDERS[name]().double()


def images(batch=3, seed=1, dtype=torch.float64) -> torch.Tensor:
    return draw(batch, 3, 12, 12, seed=seed, dtype=dtype)


OTHER = images(seed=2)


def deep_lift(net, x, targets=1, reference=OTHER, **options):
    return fastcam.attribute(net, x, "deep_lift", targets=targets, reference=reference, **options)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(float(expected.abs().max()), 1e-30))


def difference(net, x, reference, target=1):
    with torch.no_grad():
        return net(x)[:, target] - net(reference)[:, target]


@pytest.mark.parametrize("layer", [None, "features", "first convolution"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_definition_and_completeness(name, layer):
    net, x = built(name), images()
    if layer == "first convolution":
        layer = next(path for path, module in net.named_modules() if isinstance(module, nn.Conv2d))
    result = deep_lift(net, x, layer=layer, return_contributions=True)
    _, contributions, _ = multipliers(net, x, OTHER, layer=layer)
    close(result.extra["contributions"], contributions)
    close(result.raw, contributions.sum(1))
    close(result.raw.sum((1, 2)), difference(net, x, OTHER), 1e-11)
    assert (result.delta.abs() <= 1e-12 * contributions.abs().sum((1, 2, 3))).all()
    assert result.weights is None
    assert result.layer == (layer or "input")
    assert result.maps.shape == (3, 12, 12)


def test_maps_are_signed_and_divided_by_their_largest_magnitude():
    net, x = shared("vgg"), images()
    result = deep_lift(net, x)
    close(result.maps, result.raw / result.raw.abs().amax((1, 2), keepdim=True))
    assert result.raw.min() < 0 < result.raw.max()
    close(result.maps.abs().amax((1, 2)), torch.ones(3, dtype=torch.float64))
    close(deep_lift(net, x, normalize=False).maps, result.raw)


@pytest.mark.parametrize("name", list(HEADS))
def test_exchange_of_image_and_reference(name):
    net, x = shared(name), images()
    close(deep_lift(net, OTHER, reference=x).raw, -deep_lift(net, x).raw)


@pytest.mark.parametrize("name", list(HEADS))
def test_the_image_as_its_own_reference(name):
    found = deep_lift(shared(name), images(), reference=images())
    for tensor in (found.raw, found.maps, found.delta):
        assert (tensor == 0).all()


def test_linear_networks_are_gradient_times_difference():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(100, 3)).double().eval()
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[:, 1].sum(), x)
    close(deep_lift(net, x.detach()).raw, (gradient * (x.detach() - OTHER)).sum(1))


def test_saturation():
    net, x = saturated(), torch.ones(1, 2, 3, 1, dtype=torch.float64)
    found = deep_lift(net, x, reference=torch.zeros_like(x), return_contributions=True)
    close(found.extra["contributions"], torch.full((1, 2, 3, 1), 1 / 6, dtype=torch.float64))


def test_a_difference_from_reference_worked_out_by_hand():
    """y = 2 relu(a - b) between (3, 1) and (0, 1): y - y' = 4; the ReLU's slope is 2 / 3, so a gives 4, b nothing."""
    net = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1))
        net[3].weight.fill_(2)
    x, reference = (torch.tensor(pair, dtype=torch.float64).reshape(1, 2, 1, 1) for pair in ((3.0, 1.0), (0.0, 1.0)))
    options = {"reference": reference, "normalize": False, "return_contributions": True, "targets": 0}
    found = deep_lift(net.eval(), x, **options)
    close(found.extra["contributions"].flatten(), torch.tensor([4.0, 0.0], dtype=torch.float64))
    m, _, _ = multipliers(net, x, reference, 0)
    close(m.flatten(), torch.tensor([4 / 3, -4 / 3], dtype=torch.float64))


class Around(nn.Module):
    """y = fc(mean(relu(body(x) + x))): connections go around `body` and `body.0`."""

    def __init__(self, dense: bool):
        super().__init__()
        self.dense = dense
        self.stem, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.fc = nn.Linear(8 if dense else 4, 3)

    def forward(self, x):
        x = self.pool(self.stem(x))
        y = torch.cat([self.body(x), x], 1) if self.dense else self.body(x) + x
        return self.fc(functional.relu(y).mean((2, 3)))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("layer", ["body", "body.0"])
@pytest.mark.parametrize("reference", ["tensor", "black"])
def test_a_connection_around_the_layer_stays_the_images(dense, layer, reference):
    """Contributions explain the change of the score when this layer alone becomes the reference's."""
    torch.manual_seed(0)
    net, x = Around(dense).double().eval(), images()
    base, given = (OTHER, OTHER) if reference == "tensor" else (black(x), "black")
    explainer = fastcam.Explainer(net, "deep_lift", layer=layer, reference=given)
    kept = {}
    handle = net.get_submodule(layer).register_forward_hook(lambda m, a, out: kept.__setitem__("r", out.detach()))
    net(base)
    handle.remove()
    replaced = kept["r"].expand(3, -1, -1, -1)
    handle = net.get_submodule(layer).register_forward_hook(lambda m, a, out: replaced)
    hybrid = net(x)[:, 1].detach()
    handle.remove()
    for _ in range(2):
        found = explainer(x, 1)
        close(found.raw.sum((1, 2)), found.scores[:, 1] - hybrid, 1e-11)
        assert found.delta.abs().max() < 1e-12
    if reference == "black":
        close(explainer(x[1:], 1).raw, found.raw[1:], 1e-11)


def black(x):
    mean, std = (torch.tensor(v, dtype=x.dtype)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (-mean / std).expand(1, *x.shape[1:])


@pytest.mark.parametrize("name", ["gap", "vgg", "residual", "gated"])
def test_images_and_targets_are_independent(name):
    net, x = built(name), images()
    rows = [[0, 3], [1, 1], [4, 2]]
    whole = deep_lift(net, x, rows, reference="white", return_contributions=True)
    assert whole.maps.shape == (3, 2, 12, 12)
    assert whole.extra["contributions"].shape == (3, 2, 3, 12, 12)
    assert whole.delta.shape == (3, 2)
    for i, row in enumerate(rows):
        for t, target in enumerate(row):
            alone = deep_lift(net, x[i : i + 1], target, reference="white")
            close(whole.raw[i, t], alone.raw[0], 1e-11)
    top = deep_lift(net, x, "top2")
    best = top.scores.topk(2, dim=1).indices
    assert torch.equal(top.targets, best)
    close(top.raw, deep_lift(net, x, best).raw)


def test_callables():
    for name in ("gap", "vgg"):
        net, x = shared(name), images()
        found = deep_lift(net, x, lambda output: output[:, 1] - 2 * output[:, 3])
        close(found.raw, deep_lift(net, x, 1).raw - 2 * deep_lift(net, x, 3).raw, 1e-11)
        with pytest.raises(ValueError, match="linear in the model's output"):
            deep_lift(net, x, lambda output: output.softmax(1)[:, 1])


def test_callables_of_linear_networks_must_be_linear_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()
    with pytest.raises(ValueError, match="linear in the model's output"):
        fastcam.attribute(net, images(), "a_fmi", layer="0", targets=lambda output: output[:, 0] * output[:, 1])


def test_several_references_are_averaged():
    net, x = shared("vgg"), images()
    several = [OTHER, "black", images(1, seed=5)]
    found = deep_lift(net, x, reference=several, return_contributions=True)
    parts = [deep_lift(net, x, reference=one, return_contributions=True) for one in several]
    close(found.raw, torch.stack([part.raw for part in parts]).mean(0))
    contributions = torch.stack([part.extra["contributions"] for part in parts]).mean(0)
    close(found.extra["contributions"], contributions)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    net = models.vgg_like(rank=rank).double()
    x, base = (draw(2, 3, *(9, 8, 10)[:rank], seed=seed) for seed in (1, 2))
    for layer in (None, "features.0"):
        found = deep_lift(net, x, reference=base, layer=layer)
        close(found.raw.flatten(1).sum(1), difference(net, x, base), 1e-11)
        assert found.maps.shape == x[:, 0].shape


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"channels_last": True}, {"precision": "fp16"}], ids=str)
@pytest.mark.parametrize("name", ["residual", "vgg", "overlapping pool", "gated"])
def test_converted_runs_are_close(name, settings):
    net, x = BUILDERS[name]().float(), images(dtype=torch.float32)
    plain = deep_lift(net, x, reference="black").raw
    low = fastcam.Explainer(net, "deep_lift", reference="black", **settings)(x, 1).raw
    cosine = functional.cosine_similarity(low.float().flatten(1), plain.flatten(1))
    assert cosine.min() > (0.99 if "precision" in settings else 1 - 1e-5)


def test_half_precision_models():
    net, x = models.residual().bfloat16(), images(dtype=torch.bfloat16)
    found = deep_lift(net, x, reference="black")
    plain = deep_lift(models.residual(), x.float(), reference="black")
    assert found.maps.dtype == torch.float32
    assert functional.cosine_similarity(found.raw.flatten(1), plain.raw.flatten(1)).min() > 0.99


def test_nothing_of_the_model_changes():
    net, x = models.residual(), images(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pixels = x.clone()
    for _ in range(2):
        result = deep_lift(net, x, reference=["black", "blur"])
        deep_lift(net, x, reference="black", layer="features.conv1")
    assert torch.equal(x, pixels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in net.modules())
    assert not result.raw.requires_grad
    assert torch.is_grad_enabled()


def test_inside_inference_mode_and_with_a_graph_around():
    net, x = models.residual(), images(dtype=torch.float32)
    plain = deep_lift(net, x, reference="black").raw
    with torch.inference_mode():
        assert torch.equal(deep_lift(net, x, reference="black").raw, plain)
    assert torch.equal(deep_lift(net, x.requires_grad_(), reference="black").raw, plain)
    net.requires_grad_(False)
    assert torch.equal(deep_lift(net, x.detach(), reference="black").raw, plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(value):
    net, x = models.vgg_like(), images(dtype=torch.float32)
    x[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match="not finite for image 1"):
        deep_lift(net, x, reference="black")
    masked = deep_lift(net, x, reference="black", on_nonfinite="mask")
    assert masked.valid.tolist() == [True, False, True]
    assert (masked.raw[1] == 0).all()
    close(masked.raw[::2], deep_lift(net, x[::2], reference="black").raw, 1e-5)


def test_empty_batch_and_unknown_options():
    net = shared("vgg")
    assert deep_lift(net, images(0), [], reference="black").maps.shape == (0, 12, 12)
    assert deep_lift(net, images(0), [], reference=OTHER[:1]).raw.shape == (0, 12, 12)
    with pytest.raises(TypeError, match=r"no option 'baseline'.*its options are: .*reference, seed"):
        deep_lift(net, images(), baseline="black")


def test_a_network_that_cannot_be_captured_says_so():
    net = models.tokens().double()  # its forward takes len(x), which export fixes
    with pytest.raises(RuntimeError, match=r"method 'deep_lift' needs a captured network, but .*one fixed batch size"):
        deep_lift(net, images())
