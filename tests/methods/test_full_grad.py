"""FullGrad: completeness on piecewise-linear networks, and its maps against hooks and loops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastcam
from fastcam._testing import models

CLASSES = [4, 0, 2]


class Functional(nn.Module):
    """Every way to add: conv, batch norm, transposed conv, parameter, buffer, number, concatenation, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.shift = nn.Parameter(torch.randn(4, 1, 1))
        self.plane = nn.Parameter(torch.randn(1, 2, 8, 10))
        self.register_buffer("mean", torch.randn(3, 1, 1))
        self.mix = nn.Linear(6, 7)
        self.flat_norm = nn.BatchNorm1d(7)
        self.fc = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.conv(x - self.mean)))
        x = functional.max_pool2d(x, 3, 2, 1)
        x = functional.leaky_relu(self.up(x) + self.shift, 0.1)
        x = functional.avg_pool2d(2 - x, 2) - 0.25
        x = torch.cat([x, self.plane.expand(x.shape[0], -1, -1, -1)[:, :, : x.shape[2], : x.shape[3]]], dim=1)
        x = functional.relu(self.mix(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # a linear layer on positions
        return self.fc(functional.relu(self.flat_norm(x.mean((2, 3)))))


def sequential() -> nn.Module:
    """Modules only, so that hooks see everything: bias in front of a norm, a stride, a dead end for the resize."""
    layers = [nn.Conv2d(3, 5, 3, 1, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3, 2, bias=False)]
    layers += [nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


NETS = {
    "gap": models.gap_linear,
    "vgg": models.vgg_like,
    "in place": lambda: models.vgg_like(act="inplace"),
    "functional": lambda: models.vgg_like(act="functional"),
    "residual": models.residual,
    "sequential": lambda: models.seeded(sequential),
    "all sums": lambda: models.seeded(Functional),
}


def images(size=(13, 16), batch=3, seed=0, channels=3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    return {name: build().double() for name, build in NETS.items()}


def explain(net, x, targets=CLASSES, **options):
    return fastcam.attribute(net, x, "full_grad", targets=targets, **options)


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


# --- completeness ---


@pytest.mark.parametrize("name", NETS)
def test_products_add_up_to_the_score(nets, name):
    x = images()
    got = explain(nets[name], x, [[4, 0], [1, 2], [3, 3]])
    assert got.delta.shape == (3, 2)
    assert got.delta.abs().max() <= 1e-10 * got.scores.abs().max()
    single = explain(copy.deepcopy(nets[name]).float(), x.float())
    assert single.delta.abs().max() <= 1e-4 * single.scores.abs().max()


@pytest.mark.parametrize("rank", [1, 3])
def test_other_dimensions(rank):
    net, x = models.vgg_like(rank=rank).double(), images((9, 8, 10)[:rank], batch=2)
    got = explain(net, x, [1, 2])
    assert got.maps.shape == (2, *x.shape[2:])
    assert got.delta.abs().max() < 1e-12


def test_what_a_smooth_step_adds_is_missing():
    """sigmoid(u) = u s' + (s - u s'): the residual is the second term, weighted."""
    net = models.Net(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net = models.seeded(lambda: net).double()
    got = explain(net, images(), 1)
    u = net.features(images()).detach()
    s = u.sigmoid()
    missing = ((s - u * s * (1 - s)).mean((2, 3)) * net.head[3].weight[1]).sum(1)
    close(got.delta, -missing.detach())


def test_completeness_from_a_layer_on(nets):
    """Also around the layer: what does not follow from it is a bias."""
    got = explain(nets["residual"], images(), layer="features.norm2")
    assert got.delta.abs().max() < 1e-12
    assert got.raw.shape == got.maps.shape == (3, 13, 16)
    small = explain(nets["vgg"], images(), layer="features")
    assert small.raw.shape == (3, 7, 8)
    assert small.delta.abs().max() < 1e-12


# --- the maps ---


def taken(net: nn.Module, x: Tensor, classes: list[int]) -> list[Tensor]:
    """[input x gradient, bias x gradient of every conv and 2-d batch norm in order], by hooks on a copy."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    biases, results = [], []

    def hook(module, args, result):
        result.retain_grad()
        results.append(result)
        if isinstance(module, nn.BatchNorm2d):
            biases.append(
                module.bias - module.running_mean * module.weight / torch.sqrt(module.running_var + module.eps)
            )
        else:
            biases.append(module.bias)

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) and module.bias is not None:
            module.register_forward_hook(hook)
    net(x).gather(1, torch.tensor(classes)[:, None]).sum().backward()
    found = [x.detach() * x.grad]
    return found + [b.detach()[None, :, None, None] * r.grad for b, r in zip(biases, results, strict=True)]


def corner_aligned(plane: Tensor, size) -> Tensor:
    """(h, w) -> size, bilinear, with the corners of both on one another."""
    found = torch.zeros(*size, dtype=plane.dtype)
    places = [[i * (given - 1) / max(n - 1, 1) for i in range(n)] for given, n in zip(plane.shape, size, strict=True)]
    for i, y in enumerate(places[0]):
        for j, x in enumerate(places[1]):
            top, left = int(y), int(x)
            below, right = min(top + 1, plane.shape[0] - 1), min(left + 1, plane.shape[1] - 1)
            dy, dx = y - top, x - left
            upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
            lower = plane[below, left] * (1 - dx) + plane[below, right] * dx
            found[i, j] = upper * (1 - dy) + lower * dy
    return found


@pytest.mark.parametrize("eps", [None, 0.0, 1e-3])
@pytest.mark.parametrize("name", ["gap", "vgg", "sequential"])
def test_authors_form_by_hooks_and_loops(nets, oracle, name, eps):
    x = images((9, 11))
    want = torch.zeros(3, 9, 11, dtype=torch.float64)
    for layer in taken(nets[name], x, CLASSES):
        for b in range(3):
            psi = layer[b].abs() - layer[b].abs().min()
            if psi.max() > 0:
                psi = psi / (psi.max() + (1e-6 if eps is None else eps))
            for channel in psi:
                want[b] += corner_aligned(channel, (9, 11))
    got = explain(nets[name], x, eps=eps)
    close(got.raw, want)
    torch.testing.assert_close(got.maps, oracle.min_max(want), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["vgg", "sequential"])
def test_per_channel_form_by_hooks_and_loops(nets, oracle, name):
    x = images((9, 11))
    want = torch.zeros(3, 9, 11, dtype=torch.float64)
    for layer in taken(nets[name], x, CLASSES):
        for k in range(layer.shape[1]):
            psi = layer[:, k].abs()
            psi = psi - psi.amin((1, 2), keepdim=True)
            want += oracle.resized(psi / (psi.amax((1, 2), keepdim=True) + 1e-7), (9, 11))
    close(explain(nets[name], x, postprocess="per_channel").raw, want)


def test_twins(nets):
    for name in ("in place", "functional"):
        assert torch.equal(explain(nets[name], images()).raw, explain(nets["vgg"], images()).raw)


def test_a_module_that_runs_twice_has_two_biases():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

        def forward(self, x):
            return self.fc(self.conv(self.conv(x).relu()).relu().mean((2, 3)))

    net = models.seeded(Twice).double()
    twin = nn.Sequential(net.conv, nn.ReLU(), copy.deepcopy(net.conv), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    got, want = (explain(n, images()) for n in (net, nn.Sequential(*twin, nn.Flatten(), net.fc).eval()))
    close(got.raw, want.raw)
    assert got.delta.abs().max() < 1e-12


def test_channels_last_linear_layers_are_maps_of_positions(nets):
    """A linear layer on (B, H, W, C) is a 1 x 1 convolution, in the map too."""

    class OnPositions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x):
            x = self.mix(self.conv(x).relu().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.fc(x.relu().mean((2, 3)))

    net = models.seeded(OnPositions).double()
    conv = nn.Conv2d(4, 6, 1).double()
    conv.weight.data, conv.bias.data = net.mix.weight.data[..., None, None], net.mix.bias.data
    twin = nn.Sequential(net.conv, nn.ReLU(), conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc).eval()
    close(explain(net, images()).raw, explain(twin, images()).raw)


# --- batches, targets, precision ---


@pytest.mark.parametrize("name", NETS)
def test_batch_is_a_loop(nets, name):
    together = explain(nets[name], images())
    for b in range(3):
        alone = explain(nets[name], images()[b : b + 1], CLASSES[b : b + 1])
        close(together.raw[b], alone.raw[0])


def test_several_targets_are_a_loop(nets):
    classes = torch.tensor([[4, 0, 1], [1, 2, 1], [0, 3, 1]])
    for name in ("residual", "sequential", "all sums"):
        together = explain(nets[name], images(), classes)
        assert together.maps.shape == (3, 3, 13, 16)
        for t in range(3):
            close(together.raw[:, t], explain(nets[name], images(), classes[:, t]).raw)


def test_callable_target(nets):
    got = explain(nets["sequential"], images(), lambda y: y[:, 2] - 2 * y[:, 0])
    assert got.delta.abs().max() < 1e-12
    close(explain(nets["sequential"], images(), lambda y: y[:, 1]).raw, explain(nets["sequential"], images(), 1).raw)


def test_converted_weights_keep_every_bias(nets):
    """precision= folds batch norms elsewhere; here conv and norm each have their own map."""
    net = copy.deepcopy(nets["sequential"]).float()
    wide = explain(net, images().float(), precision="fp64")
    close(wide.raw, explain(copy.deepcopy(net).double(), images().float().double()).raw)
    half = explain(net, images().float(), precision="bf16")
    assert half.maps.dtype == torch.float32
    assert half.delta.abs().max() < 0.1


def test_zero_image_and_empty_batch(nets):
    """No pixel explains a black image: all of the score is in the biases."""
    net = nets["sequential"]
    got = explain(net, torch.zeros_like(images()))
    assert got.delta.abs().max() < 1e-12
    assert got.valid.all()
    for eps in (None, 0.0):
        assert explain(net, torch.zeros_like(images()), eps=eps).maps.isfinite().all()
    empty = explain(net, images()[:0], [])
    assert empty.maps.shape == (0, 13, 16)
    assert empty.delta.shape == (0,)


def test_nothing_of_the_model_changes(nets):
    net = copy.deepcopy(nets["residual"])
    before = copy.deepcopy(net.state_dict())
    explain(net, images())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key])


# --- errors ---


def test_errors(nets):
    with pytest.raises(ValueError, match="'authors', 'per_channel'; got 'paper'"):
        explain(nets["vgg"], images(), postprocess="paper")
    with pytest.raises(ValueError, match="eps must"):
        explain(nets["vgg"], images(), eps=-1.0)
    with pytest.raises(RuntimeError, match="does not depend on layer 'input'"):
        explain(nets["vgg"], images(), lambda y: y[:, 0].detach())


def test_networks_that_cannot_be_captured():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = models.gap_linear()

        def forward(self, x):
            return self.net(x if bool(x.sum() > -1e9) else -x)

    with pytest.raises(RuntimeError, match="method 'full_grad' needs a captured network"):
        explain(Branching().double().eval(), images())
