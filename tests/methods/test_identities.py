"""What the methods' definitions imply on any network: conservation, invariances, and one image or class at a time."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models

METHODS = ["cam", "grad_cam", "grad_cam_pp", "xgrad_cam", "hires_cam", "layer_cam", "eigen_cam", "eigen_grad_cam"]
GENERAL = METHODS[1:]
NETS = {"gap": models.gap_linear, "vgg": models.vgg_like, "residual": models.residual}


def images(size=(11, 14), batch=3, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    return {name: build().double() for name, build in NETS.items()}


def raw(net, x, method, targets=1, **options) -> torch.Tensor:
    return fastcam.attribute(net, x, method, targets=targets, layer="features", relu=False, **options).raw


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


def differ(got, want, least=1e-3):
    assert float((got - want).abs().max()) > least * float(want.abs().max())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", GENERAL)
def test_written_formula_at_any_head(nets, oracle, method, name):
    x, classes = images(), [4, 0, 2]
    got = fastcam.attribute(nets[name], x, method, targets=classes, layer="features")
    maps, want = oracle.explain(nets[name], "features", x, method, oracle.logit(classes))
    assert want.amax((1, 2)).min() > 0  # else the comparison below says little
    close(got.raw, want)
    torch.testing.assert_close(got.maps, maps, rtol=0, atol=1e-11)
    if method in ("grad_cam", "grad_cam_pp", "xgrad_cam"):
        a, g, _ = oracle.tap(nets[name], "features", x, oracle.logit(classes))
        close(got.weights, torch.stack([oracle.coefficients(method, *pair) for pair in zip(a, g, strict=True)]))


@pytest.mark.parametrize("layer", ["features.0.conv", "features.0", "features.1.conv", "features"])
@pytest.mark.parametrize("method", GENERAL)
def test_written_formula_at_any_layer(nets, oracle, method, layer):
    x = images()
    got = fastcam.attribute(nets["vgg"], x, method, targets=3, layer=layer)
    close(got.raw, oracle.explain(nets["vgg"], layer, x, method, oracle.logit([3] * 3))[1], 1e-11)


# --- 2: on pool + linear the gradient methods are one ---


def test_one_map_on_pooled_linear_heads(nets, oracle):
    cam = raw(nets["gap"], images(), "cam")
    a, g, _ = oracle.tap(nets["gap"], "features", images(), oracle.logit([1] * 3))
    assert a.min() >= 0
    positions = a[0, 0].numel()
    for method in ("grad_cam", "xgrad_cam", "hires_cam"):
        close(raw(nets["gap"], images(), method), cam / positions)
        differ(raw(nets["vgg"], images(), method), raw(nets["vgg"], images(), "layer_cam"))
    close(raw(nets["gap"], images(), "layer_cam"), (g * a).clamp(min=0).sum(1))  # elementwise Grad-CAM


def test_the_methods_part_ways_on_other_heads(nets):
    found = {method: raw(nets["vgg"], images(), method) for method in ("grad_cam", "xgrad_cam", "hires_cam")}
    differ(found["grad_cam"], found["hires_cam"])
    differ(found["xgrad_cam"], found["hires_cam"])
    differ(found["grad_cam"], found["xgrad_cam"])


# --- 3: conservation ---


@pytest.mark.parametrize("name", NETS)
def test_xgrad_and_hires_conserve_gradient_times_activation(nets, oracle, name):
    x = images()
    a, g, _ = oracle.tap(nets[name], "features", x, oracle.logit([1] * 3))
    total = (g * a).sum((1, 2, 3))
    alpha = fastcam.attribute(nets[name], x, "xgrad_cam", targets=1, layer="features").weights
    close((alpha * a.sum((2, 3))).sum(1), total)
    close(raw(nets[name], x, "xgrad_cam").sum((1, 2)), total)
    close(raw(nets[name], x, "hires_cam").sum((1, 2)), total)


def test_bias_free_relu_head_hands_out_the_whole_score():
    net = models.vgg_like(bias=False).double()
    score = net(images())[:, 1].detach()
    for method in ("xgrad_cam", "hires_cam"):
        close(raw(net, images(), method).sum((1, 2)), score)
    biased = models.vgg_like().double()
    differ(raw(biased, images(), "hires_cam").sum((1, 2)), biased(images())[:, 1].detach())


def test_hires_sums_to_the_score_after_one_linear_layer(nets):
    """Pool + linear and flatten + linear: sum M + bias = score."""
    flat = models.seeded(
        lambda: models.Net(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh()), nn.Flatten(), nn.Linear(6 * 6 * 7, 5))
    ).double()
    for net, bias, x in ((nets["gap"], nets["gap"].head[2].bias, images()), (flat, flat.head[1].bias, images((8, 9)))):
        close(raw(net, x, "hires_cam").sum((1, 2)) + bias[1].detach(), net(x)[:, 1].detach())


# --- 4: the two spellings of Grad-CAM++'s a ---


def test_short_form_of_grad_cam_pp_is_equation_19(nets, oracle):
    """eq. 19's fraction where G != 0, against the weights; and a case where squaring G would underflow in float32."""
    a, g, _ = oracle.tap(nets["vgg"], "features", images(), oracle.logit([1] * 3))
    total = a.sum((2, 3), keepdim=True)
    fraction = torch.where(g == 0, 0, g**2 / (2 * g**2 + total * g**3))
    want = (fraction * g.clamp(min=0)).sum((2, 3))
    got = fastcam.attribute(nets["vgg"], images(), "grad_cam_pp", targets=1, layer="features").weights
    close(got, want)
    tiny = models.gap_linear().float()
    with torch.no_grad():
        tiny.head[2].weight.mul_(1e-25)
    small = fastcam.attribute(tiny, images().float(), "grad_cam_pp", targets=1, layer="features").weights
    # S G << 2: alpha = sum relu(G) / 2 = relu(W) / 2
    want = tiny.head[2].weight[1].detach().clamp(min=0).expand(3, -1) / 2
    torch.testing.assert_close(small, want, rtol=1e-6, atol=0)


# --- 5: the score times s > 0, and a negative scale as the control ---


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["grad_cam", "xgrad_cam", "hires_cam", "layer_cam", "eigen_grad_cam"])
def test_positive_scale_of_the_score_drops_out(nets, method, name):
    def maps(scale):
        return fastcam.attribute(nets[name], images(), method, targets=lambda y: scale * y[:, 1], layer="features").maps

    torch.testing.assert_close(maps(1000.0), maps(1.0), rtol=0, atol=1e-11)
    torch.testing.assert_close(maps(1e-3), maps(1.0), rtol=0, atol=1e-11)
    if method != "eigen_grad_cam":  # whose sign rule undoes it
        differ(maps(-1.0), maps(1.0))


def test_grad_cam_pp_feels_the_scale_of_the_score(nets):
    one, many = (
        fastcam.attribute(nets["gap"], images(), "grad_cam_pp", targets=lambda y, s=s: s * y[:, 1], layer="features")
        for s in (1.0, 1000.0)
    )
    differ(one.maps, many.maps)


# --- 6: a constant on every logit, and the order of channels ---


@pytest.mark.parametrize("name", NETS)
def test_constant_on_every_logit_drops_out(nets, name):
    shifted = copy.deepcopy(nets[name])
    with torch.no_grad():
        shifted.head[-1].bias += 17.0
        shifted_one = copy.deepcopy(shifted)
        shifted_one.head[-1].weight[1] += 0.5
    for method in GENERAL:
        close(raw(shifted, images(), method), raw(nets[name], images(), method))
    differ(raw(shifted_one, images(), "grad_cam"), raw(nets[name], images(), "grad_cam"))


@pytest.mark.parametrize("method", METHODS)
def test_order_of_channels_does_not_matter(nets, method):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    mixed = copy.deepcopy(nets["gap"])
    with torch.no_grad():
        last, linear = mixed.features[1].conv, mixed.head[2]
        last.weight.copy_(last.weight[order].clone())
        last.bias.copy_(last.bias[order].clone())
        linear.weight.copy_(linear.weight[:, order].clone())
    close(raw(mixed, images(), method), raw(nets["gap"], images(), method))
    with torch.no_grad():
        linear.weight.copy_(linear.weight.roll(1, 1).clone())
    if method != "eigen_cam":
        differ(raw(mixed, images(), method), raw(nets["gap"], images(), method))


# --- 7: Eigen-CAM ---


@pytest.mark.parametrize("name", NETS)
def test_eigen_cam_is_the_principal_component(nets, oracle, name):
    x = images()
    p = raw(nets[name], x, "eigen_cam").flatten(1)
    a = oracle.tap(nets[name], "features", x, oracle.logit([1] * 3))[0].flatten(2)
    centred = a - a.mean(2, keepdim=True)
    top = torch.linalg.eigvalsh(centred @ centred.mT)[:, -1]
    close(p.square().sum(1), top)
    assert float(p.mean(1).abs().max()) < 1e-12 * float(p.abs().max())
    assert (p.amax(1) >= -p.amin(1)).all()
    plain = raw(nets[name], x, "eigen_cam", center=False).flatten(1)
    close(plain.square().sum(1), torch.linalg.eigvalsh(a @ a.mT)[:, -1])
    assert (plain >= -1e-12).all()  # A >= 0, so without centring p can be chosen non-negative
    assert (plain.mean(1) > 1e-3).all()


def test_eigen_cam_ignores_orthogonal_mixing_of_channels():
    identity = models.by_hand([[1.0] * 4, [2.0] * 4]).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 7, 9, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    mixed, stretched = (torch.einsum("kc,bchw->bkhw", m, x) for m in (rotation, rotation * torch.arange(1.0, 5.0)))
    close(raw(identity, mixed, "eigen_cam"), raw(identity, x, "eigen_cam"))
    differ(raw(identity, stretched, "eigen_cam"), raw(identity, x, "eigen_cam"))


@pytest.mark.parametrize("shape", [(4, 7, 9), (40, 3, 4)], ids=["K<Z", "K>Z"])
def test_eigen_cam_on_either_gram_matrix(oracle, shape):
    net = models.by_hand([[1.0] * shape[0], [2.0] * shape[0]]).double()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for center in (True, False):
        want = torch.stack([oracle.principal(one, center) for one in x])
        close(raw(net, x, "eigen_cam", center=center), want, 1e-9)
        close(raw(net, -x, "eigen_cam", center=center), want, 1e-9)  # one sign, whatever the features' sign


def test_eigen_cam_repeats_itself_and_knows_no_class(nets):
    first = fastcam.attribute(nets["vgg"], images(), "eigen_cam", targets=[[0, 1], [2, 3], [4, 0]], layer="features")
    again = fastcam.attribute(nets["vgg"], images(), "eigen_cam", targets=2, layer="features")
    for t in range(2):
        assert torch.equal(first.maps[:, t], again.maps)
        assert torch.equal(first.raw[:, t], again.raw)
    of_class = fastcam.attribute(nets["vgg"], images(), "eigen_grad_cam", targets=[[0, 1]] * 3, layer="features")
    differ(of_class.maps[:, 0], of_class.maps[:, 1])


# --- 11: one image, one class at a time ---


@pytest.mark.parametrize("method", METHODS)
def test_batch_is_a_loop_over_images(nets, method):
    for net in nets.values() if method != "cam" else [nets["gap"]]:
        x, classes = images(batch=4), [1, 4, 0, 2]
        together = fastcam.attribute(net, x, method, targets=classes, layer="features")
        for b in range(4):
            alone = fastcam.attribute(net, x[b : b + 1], method, targets=classes[b : b + 1], layer="features")
            close(together.raw[b], alone.raw[0])
            torch.testing.assert_close(together.maps[b], alone.maps[0], rtol=0, atol=1e-11)
        differ(together.raw[0], together.raw[1])


@pytest.mark.parametrize("method", METHODS)
def test_several_classes_are_a_loop_over_classes(nets, method):
    classes = torch.tensor([[4, 0, 4], [1, 2, 3], [0, 1, 2]])
    for net in nets.values() if method != "cam" else [nets["gap"]]:
        together = fastcam.attribute(net, images(), method, targets=classes, layer="features")
        assert together.maps.shape == (3, 3, 11, 14)
        assert torch.equal(together.targets, classes)
        for t in range(3):
            alone = fastcam.attribute(net, images(), method, targets=classes[:, t], layer="features")
            close(together.raw[:, t], alone.raw)
            torch.testing.assert_close(together.maps[:, t], alone.maps, rtol=0, atol=1e-11)
            if together.weights is not None:
                close(together.weights[:, t], alone.weights)
        if method != "eigen_cam":
            differ(together.raw[:, 0], together.raw[:, 1])


@pytest.mark.parametrize("method", METHODS)
def test_default_and_top_targets(nets, method):
    net = nets["gap"]
    ranked = net(images()).topk(3).indices
    top = fastcam.attribute(net, images(), method, targets="top3", layer="features")
    assert torch.equal(top.targets, ranked)
    default = fastcam.attribute(net, images(), method, layer="features")
    assert torch.equal(default.targets, ranked[:, 0])
    close(top.raw[:, 0], default.raw)
    close(top.raw[:, 2], fastcam.attribute(net, images(), method, targets=ranked[:, 2], layer="features").raw)


# --- activations written in place, reused modules, networks that cannot be captured ---


@pytest.fixture(scope="module")
def twins() -> dict[str, nn.Module]:
    return {act: models.vgg_like(act=act).double() for act in ("module", "inplace", "functional")}


@pytest.mark.parametrize("layer", ["features.0.conv", "features.1.conv", "features"])
@pytest.mark.parametrize("method", GENERAL)
def test_in_place_and_functional_twins(oracle, twins, method, layer):
    """The layer's output is taken before an in-place ReLU overwrites it, gradient included."""
    x = images()
    want = oracle.explain(twins["module"], layer, x, method, oracle.logit([1] * 3))[1]
    for act in twins:
        close(fastcam.attribute(twins[act], x, method, targets=1, layer=layer).raw, want, 1e-11)


def test_reused_module_stands_for_its_last_run(nets, oracle):
    net, x = nets["residual"], images()
    for method in GENERAL:
        got = fastcam.attribute(net, x, method, targets=1, layer="features.relu")
        want = oracle.explain(net, "features.relu", x, method, oracle.logit([1] * 3))[1]
        close(got.raw, want)


@pytest.mark.parametrize("method", GENERAL)
def test_networks_that_cannot_be_captured(oracle, caplog, method):
    """A branch on the data: through a hook, the same numbers."""

    class Branching(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.features, self.head = net.features, net.head

        def forward(self, x):
            return self.head(self.features(x if bool(x.sum() > -1e9) else -x))

    net, x = Branching(models.vgg_like(act="inplace")).double().eval(), images()
    with caplog.at_level(logging.INFO, logger="fastcam"):
        got = fastcam.attribute(net, x, method, targets=[0, 3, 1], layer="features.1.conv")
    assert "through a forward hook" in caplog.text
    want = oracle.explain(net, "features.1.conv", x, method, oracle.logit([0, 3, 1]))[1]
    close(got.raw, want, 1e-11)


# --- 12: min-max scaling before and after the resize ---


@pytest.mark.parametrize("method", GENERAL)
def test_resize_commutes_with_min_max(nets, oracle, method):
    """min-max, resize, min-max = resize, min-max; without the second the maximum falls short of 1."""
    got = fastcam.attribute(nets["vgg"], images(), method, targets=1, layer="features", size=(23, 17))
    once = oracle.resized(oracle.min_max(got.raw), (23, 17))
    torch.testing.assert_close(got.maps, oracle.min_max(once), rtol=0, atol=1e-12)
    small = fastcam.attribute(nets["vgg"], images(), method, targets=1, layer="features", size=(5, 4)).maps
    unscaled = oracle.resized(oracle.min_max(got.raw), (5, 4))
    assert float(unscaled.amax((1, 2)).min()) < 0.999
    torch.testing.assert_close(small.amax((1, 2)), torch.ones(3, dtype=torch.float64), rtol=0, atol=0)
