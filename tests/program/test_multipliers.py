"""The DeepLIFT walk over whole networks: naive oracles, spellings, numbers. Float64 unless said otherwise, tolerances
relative to the largest value.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcam._testing.rescale import ReadOut, complete, draw, max_pool_rule, multipliers

MAP = (4, 6, 7)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# --- oracles ---


def test_a_small_network_against_the_rules_written_out_by_hand():
    """conv - ReLU - overlapping max-pool - linear - ReLU - linear, its two passes and its way back in loops."""
    torch.manual_seed(0)
    conv, first, last = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3 * 2 * 3, 6), nn.Linear(6, 3)
    net = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), first, nn.ReLU(), last).double().eval()
    x, r = draw(1, 2, 5, 7, seed=1), draw(1, 2, 5, 7, seed=2)

    def passes(t):
        a = F.conv2d(t, conv.weight, conv.bias, padding=1)
        b = a.clamp(min=0)
        c = F.max_pool2d(b, 3, 2)
        d = c.flatten(1) @ first.weight.T + first.bias
        return a, b, c, d

    def slopes(u, v):
        both, neither = (u > 0) & (v > 0), (u <= 0) & (v <= 0)
        ratio = torch.maximum(u, v) / (u - v).abs()
        return torch.where(both, 1.0, torch.where(neither, 0.0, ratio))

    with torch.no_grad():
        (a, b, c, d), (a_r, b_r, _, d_r) = passes(x), passes(r)
        g = (last.weight[1] * slopes(d, d_r)) @ first.weight
        g = g.reshape(c.shape)
        pooled = [max_pool_rule(b[0, k], b_r[0, k], g[0, k], (3, 3), (2, 2), (0, 0), (1, 1)) for k in range(3)]
        g = torch.stack(pooled)[None] * slopes(a, a_r)
        expected = torch.zeros_like(x)
        for k in range(3):
            for i in range(5):
                for j in range(7):
                    for di in range(3):
                        for dj in range(3):
                            at = i + di - 1, j + dj - 1
                            if 0 <= at[0] < 5 and 0 <= at[1] < 7:
                                expected[0, :, at[0], at[1]] += g[0, k, i, j] * conv.weight[k, :, di, dj]
    m, contributions, difference = multipliers(net, x, r)
    close(m, expected, 1e-13)
    close(contributions.sum(), difference.sum(), 1e-12)


class Deep(nn.Module):
    """Stem with overlapping max-pool, a residual block with one re-used ReLU, a branch, a gate, attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.left, self.right = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 5, 3, padding=1, groups=1)
        self.gate = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.pool(self.stem(x))
        y = self.relu(self.a(x))
        x = self.relu(self.b(y) + x)
        x = torch.cat([F.silu(self.left(x)), F.gelu(self.right(x))], 1)
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.fc(x.mean(1))


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    return Deep().double().eval()


@pytest.mark.parametrize("layer", [None, "stem.0", "stem", "pool", "b"])
def test_deep_network(deep, layer):
    """Complete and symmetric at the pixels, behind the pool, and at a layer that a skip connection goes around."""
    x, reference = draw(3, *MAP, seed=1), draw(3, *MAP, seed=2)
    _, contributions, difference = multipliers(deep, x, reference, layer=layer)
    close(contributions.flatten(1).sum(1), difference)
    if layer != "b":  # there the way around the layer stays the image's, whichever that is
        _, swapped, _ = multipliers(deep, reference, x, layer=layer)
        close(swapped, -contributions)
    _, alone, _ = multipliers(deep, x[1:2], reference[1:2], layer=layer)
    close(alone, contributions[1:2], 1e-12)
    _, shared, _ = multipliers(deep, x, reference[:1], layer=layer)
    close(shared[:1], contributions[:1], 1e-12)


def test_equal_passes_give_the_gradient_of_a_deep_network(deep):
    x = draw(2, *MAP, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(deep(x)[:, 1].sum(), x)
    m, contributions, _ = multipliers(deep, x.detach(), x.detach().clone())
    assert (contributions == 0).all()
    close(m, gradient)


# --- spellings ---


class Spelled(nn.Module):
    """conv - relu - conv - relu - pool - linear with the same weights, the rectifier as `relu` says."""

    def __init__(self, relu):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 5, 3)
        self.fc = nn.Linear(5, 3)
        self.relu = relu

    def forward(self, x):
        first, second = self.relu if isinstance(self.relu, nn.ModuleList) else (self.relu, self.relu)
        return self.fc(second(self.two(first(self.one(x)))).mean((2, 3)))


SPELLINGS = {
    "modules": lambda: nn.ModuleList([nn.ReLU(), nn.ReLU()]),
    "module twice": nn.ReLU,
    "in-place modules": lambda: nn.ModuleList([nn.ReLU(inplace=True), nn.ReLU(inplace=True)]),
    "in-place module twice": lambda: nn.ReLU(inplace=True),
    "F.relu": lambda: F.relu,
    "F.relu in place": lambda: lambda x: F.relu(x, inplace=True),
    "F.relu_": lambda: F.relu_,
    "torch.relu": lambda: torch.relu,
    "x.relu()": lambda: lambda x: x.relu(),
    "x.relu_()": lambda: lambda x: x.relu_(),
    "clamp": lambda: lambda x: x.clamp(min=0),
    "clamp_": lambda: lambda x: x.clamp_(0),
    "clamp_min": lambda: lambda x: torch.clamp_min(x, 0.0),
}


def test_all_spellings_of_relu_are_bitwise_equal():
    x, reference = draw(2, *MAP, seed=1), draw(2, *MAP, seed=2)
    found = {}
    for name, relu in SPELLINGS.items():
        torch.manual_seed(0)
        net = Spelled(relu()).double().eval()
        found[name] = multipliers(net, x, reference)[0]
    for name, m in found.items():
        assert torch.equal(m, found["modules"]), name


OTHER_SPELLINGS = [
    (lambda x: x + x.mean(1, keepdim=True), lambda x: x.clone().add_(x.mean(1, keepdim=True))),
    (lambda x: F.silu(x), lambda x: F.silu(x.clone(), inplace=True)),
    (lambda x: F.hardswish(x), lambda x: nn.Hardswish(inplace=True)(x * 1)),
    (lambda x: F.relu6(2 * x), lambda x: nn.ReLU6(inplace=True)(x * 2)),
    (lambda x: F.leaky_relu(x, 0.1), lambda x: F.leaky_relu_(x.clone(), 0.1)),
    (lambda x: x.sigmoid() * x, lambda x: x.sigmoid().mul_(x)),
    (lambda x: torch.cat([x[:, :2] * 2, x[:, 2:]], 1), lambda x: doubled_in_place(x.clone())),
]


def doubled_in_place(x):
    x[:, :2].mul_(2)
    return x


@pytest.mark.parametrize("pair", OTHER_SPELLINGS)
def test_in_place_spellings_are_equal(pair):
    x, reference = draw(2, *MAP, seed=1), draw(2, *MAP, seed=2)
    one, other = (multipliers(ReadOut(step, MAP), x, reference)[0] for step in pair)
    close(one, other, 1e-15)


class Writes(nn.Module):
    """Writes into views, which torch.export has to take apart."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, x):
        y = x * 2
        part = y[:, :2]
        y[:, 0] = part[:, 1] * part[:, 0]
        part.mul_(0.5)
        return self.after(y)


@pytest.mark.parametrize("after", [nn.GroupNorm(2, 4), nn.LayerNorm(7), nn.MaxPool2d(3, 2), nn.Softmax(1), nn.GELU()])
def test_writes_through_views(after):
    complete(ReadOut(Writes(after), MAP), MAP)


# --- numbers ---


@pytest.mark.parametrize("function", [torch.rsqrt, torch.sqrt, torch.log, torch.reciprocal, lambda x: x**0.3])
def test_functions_that_bend_near_zero_in_float32(function):
    """Numbers and differences far below any absolute bound: the midpoint's slope would be wrong by factors."""
    net = ReadOut(lambda x: function(x * x + 1e-6), MAP).float()
    x, reference = draw(2, *MAP, seed=1).float() * 1e-3, draw(2, *MAP, seed=2).float() * 1e-3
    _, contributions, difference = multipliers(net, x, reference)
    error = contributions.flatten(1).sum(1) - difference
    assert (error.abs() <= 1e-5 * contributions.flatten(1).abs().sum(1)).all()


@pytest.mark.parametrize("function", [F.gelu, F.silu, torch.sigmoid, torch.tanh, F.mish, torch.log])
def test_slopes_of_nearly_equal_numbers_do_not_cancel_in_float32(function):
    net = ReadOut(function, MAP).float()
    x = draw(2, *MAP, seed=1).float().abs() + 0.1
    m, _, _ = multipliers(net, x, x + 1e-6)
    exact = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(ReadOut(function, MAP)(exact)[:, 1].sum(), exact)
    assert (m - gradient).abs().max() < 1e-4 * gradient.abs().max()


@pytest.mark.parametrize("level", [0, 20, 1000])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_softmax_of_large_and_far_numbers_is_bounded(function, level):
    """Softmax does not see the level of its inputs, so multipliers must not grow with its change."""
    net = ReadOut(lambda x: function(torch.cat([50 * x, torch.full_like(x[:, :1], -torch.inf)], 1), 1)[:, :4], MAP)
    net = net.float()
    x, reference = draw(2, *MAP, seed=1).float(), draw(2, *MAP, seed=2).float() + level
    m, contributions, difference = multipliers(net, x, reference)
    assert m.abs().max() <= 2 * 50 * net.fc.weight.abs().max() * 4
    error = contributions.flatten(1).sum(1) - difference
    assert (error.abs() <= 1e-5 * contributions.flatten(1).abs().sum(1)).all()


# --- what steps read beside activations ---


def test_values_made_from_sizes():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.mark = nn.Parameter(torch.ones(1, 4, 1, 1))

        def forward(self, x):
            mark = self.mark.expand(x.shape[0], -1, 6, -1)
            x = torch.cat([x * torch.ones_like(x), mark, torch.zeros_like(x[..., :1])], 3)
            return x * torch.arange(9, dtype=x.dtype) * torch.full_like(x, 2)

    torch.manual_seed(0)
    net = ReadOut(Positions(), MAP)
    x, reference = draw(3, *MAP, seed=1), draw(1, *MAP, seed=2)
    m = complete(net, MAP)
    assert m.shape == (2, *MAP)
    close(multipliers(net, x, reference)[0], multipliers(net, x, reference.expand_as(x))[0], 1e-14)
