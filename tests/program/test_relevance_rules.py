"""Every rule of weighted layers against dense matrices: contributions W_ji x_i, float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam.program.relevance import AlphaBeta, Epsilon, Flat, Gamma, Gradient, Raised, WSquare, ZBox, ZPlus
from fastcam.program.relevance.layer import Geometry, Layer, ModifiedWeights
from fastcam.program.relevance.messages import Relevance

EPSILON = 1e-6

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (2, 7)),
    "linear, tokens": (lambda: nn.Linear(7, 5), (2, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 6, 7)),
    "conv2d padded": (lambda: nn.Conv2d(3, 4, (3, 5), padding=(1, 3)), (2, 3, 6, 7)),
    "conv2d strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 8)),
    "conv2d, last rows unread": (lambda: nn.Conv2d(3, 4, 2, stride=3), (2, 3, 7, 10)),
    "conv2d strided, many channels": (lambda: nn.Conv2d(9, 4, 3, stride=2, padding=1), (2, 9, 6, 7)),
    "conv2d patches": (lambda: nn.Conv2d(3, 4, 4, stride=4), (2, 3, 9, 11)),
    "conv2d two strides": (lambda: nn.Conv2d(3, 4, (5, 2), stride=(2, 3), padding=(2, 1)), (2, 3, 9, 8)),
    "conv2d 1x1 strided": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 7, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2), (2, 3, 7, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 7, 7)),
    "conv2d no bias": (lambda: nn.Conv2d(3, 5, 3, bias=False), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, stride=(1, 2, 1), padding=1), (2, 2, 4, 5, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 4, 5)),
    "conv_transpose2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 4, 4)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
}
GEOMETRY = {
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip


def geometry_of(module: nn.Module) -> Geometry:
    if isinstance(module, nn.Linear):
        return Geometry(0)
    rank, transposed = GEOMETRY[type(module)], "Transpose" in type(module).__name__
    extra = tuple(module.output_padding) if transposed else ()
    stride, padding, dilation = tuple(module.stride), tuple(module.padding), tuple(module.dilation)
    return Geometry(rank, transposed, stride, padding, dilation, module.groups, extra)


def _own(w: torch.Tensor) -> torch.Tensor:
    return w


def matrix(module: nn.Module, shape, change) -> torch.Tensor:
    """The layer without bias on one input, as (outputs, inputs): what it makes of every unit vector."""
    weights = {name: change(p) if name == "weight" else torch.zeros_like(p) for name, p in module.named_parameters()}
    units = torch.eye(torch.Size(shape[1:]).numel(), dtype=torch.float64).reshape(-1, *shape[1:])
    with torch.no_grad():
        return torch.func.functional_call(module, weights, (units,)).flatten(1).T


def st(d: torch.Tensor, epsilon: float) -> torch.Tensor:
    return d + epsilon * torch.where(d >= 0, 1.0, -1.0).double()


def expected(rule, module, x, r, pairs) -> torch.Tensor:
    """R' of flat x (n, I) and R (n, O) by sums over all `pairs` of an input and an output."""
    w = pairs[_own]
    flat, given = x.flatten(1), r.flatten(1)
    bias = torch.zeros_like(given)
    if module.bias is not None and rule.bias:
        channel = -1 if isinstance(module, nn.Linear) else 1
        view = [1] * r.ndim
        view[channel] = -1
        bias = module.bias.detach().reshape(view).expand_as(r).flatten(1)
    c = w.unsqueeze(0) * flat.unsqueeze(1)
    up, down = c.clamp(min=0), c.clamp(max=0)
    z, p, n = c.sum(2) + bias, up.sum(2) + bias.clamp(min=0), down.sum(2) + bias.clamp(max=0)
    e = rule.epsilon

    def shares(parts: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
        return (parts * (given / st(divisor, e)).unsqueeze(2)).sum(1)

    if isinstance(rule, Epsilon):
        found = shares(c, z)
    elif isinstance(rule, Raised):
        c = (rule.own * w + rule.positive * w.clamp(min=0)).unsqueeze(0) * flat.unsqueeze(1)
        found = shares(c, c.sum(2) + bias)
    elif isinstance(rule, ZPlus):
        found = shares(up, p)
    elif isinstance(rule, AlphaBeta):
        found = rule.alpha * shares(up, p) - rule.beta * shares(down, n)
    elif isinstance(rule, Gamma):
        g = rule.gamma
        high, low = (z > 0).unsqueeze(2), (z < 0).unsqueeze(2)
        found = shares((c + g * up) * high, z + g * p) + shares((c + g * down) * low, z + g * n)
    elif isinstance(rule, ZBox):
        low, high = (bound.expand_as(x).flatten(1).unsqueeze(1) for bound in rule.bounds(x))
        parts = c - low * w.clamp(min=0) - high * w.clamp(max=0)
        found = shares(parts, parts.sum(2))
    elif isinstance(rule, WSquare):
        squares = pairs[torch.square].expand_as(c)
        found = shares(squares, squares.sum(2) + bias.square())
    elif isinstance(rule, Flat):
        ones = pairs[torch.ones_like].expand_as(c)
        found = shares(ones, ones.sum(2))
    else:
        found = given @ w
    return found.reshape(x.shape)


RULES = {
    "epsilon": Epsilon(epsilon=0.01),
    "epsilon, no bias": Epsilon(bias=False),
    "zplus": ZPlus(),
    "zplus, no bias": ZPlus(bias=False),
    "alpha 2 beta 1": AlphaBeta(),
    "alpha 1 beta 0": AlphaBeta(alpha=1.0, beta=0.0),
    "gamma": Gamma(),
    "captum's gamma": Raised(1.0, 0.5),
    "gamma 3, no bias": Gamma(gamma=3.0, bias=False),
    "zbox": ZBox(low=-2.0, high=3.0),
    "zbox, minmax": ZBox(),
    "wsquare": WSquare(),
    "flat": Flat(),
    "gradient": Gradient(),
}


@pytest.mark.parametrize("signed", [False, True], ids=["x >= 0", "signed x"])
@pytest.mark.parametrize("layer", LAYERS)
def test_rules_are_their_sums_over_pairs(layer, signed):
    build, shape = LAYERS[layer]
    torch.manual_seed(3)
    module = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    x = x if signed else x.relu()
    r = torch.randn_like(module(x).detach())
    pairs = {change: matrix(module, (1, *shape[1:]), change) for change in (_own, torch.square, torch.ones_like)}
    for name, rule in RULES.items():
        found = sent(rule, module, x, r, signed)
        want = expected(rule, module, x, r, pairs)
        error = float((found - want).abs().max() / want.abs().max())
        assert error < 1e-10, f"{name}: {error:.2g}"


def sent(rule, module, x, r, signed, output=None) -> torch.Tensor:
    bias = None if module.bias is None else module.bias.detach()
    layer = Layer(geometry_of(module), x, output, module.weight.detach(), bias, signed, ModifiedWeights())
    return rule.send(layer, rule.prepare(layer), Relevance(r)).tensor()


def test_relevance_kept_as_a_product_gives_the_same():
    module = nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    one, other = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64).unbind(0)
    layer = Layer(geometry_of(module), x, None, module.weight.detach(), module.bias.detach(), False, ModifiedWeights())
    for rule in RULES.values():
        prepared = rule.prepare(layer)
        whole = rule.send(layer, prepared, Relevance(one * other)).tensor()
        torch.testing.assert_close(
            rule.send(layer, prepared, Relevance(one, other)).tensor(), whole, rtol=1e-12, atol=1e-12
        )


def test_identities_between_rules():
    module = nn.Conv2d(3, 4, 3, padding=1, bias=False).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    r = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    same = [
        (AlphaBeta(alpha=1.0, beta=0.0), ZPlus()),
        (Gamma(gamma=0.0), Epsilon()),
        (ZBox(low=0.0, high=0.0, epsilon=0.0), Epsilon(epsilon=0.0)),
    ]
    for one, other in same:
        torch.testing.assert_close(sent(one, module, x, r, True), sent(other, module, x, r, True), rtol=1e-9, atol=1e-9)
    # Without biases every rule but the gradient hands on what it was given, up to the stabiliser.
    for rule in RULES.values():
        if not isinstance(rule, (Gradient, AlphaBeta)) and rule.epsilon < 1e-3:
            total = sent(rule, module, x, r, True).sum()
            torch.testing.assert_close(total, r.sum(), rtol=1e-3, atol=1e-3)


def test_large_gamma_tends_to_zplus_where_the_output_is_positive():
    module = nn.Conv2d(3, 4, 3, bias=False).double()
    x = torch.rand(1, 3, 5, 5, dtype=torch.float64)
    r = torch.randn(1, 4, 3, 3, dtype=torch.float64) * (functional.conv2d(x, module.weight.detach()) > 0)
    torch.testing.assert_close(
        sent(Gamma(gamma=1e9), module, x, r, False), sent(ZPlus(), module, x, r, False), rtol=1e-5, atol=1e-5
    )


def test_box_rule_on_a_constant_image_is_zero():
    module = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.full((2, 3, 5, 5), 0.3)
    assert sent(ZBox(low=0.3, high=0.3, epsilon=0.0), module, x, torch.randn(2, 4, 5, 5), True).count_nonzero() == 0


def test_float32_on_the_networks_layer_shapes():
    """What cancels is no divisor: float32 against float64 at a wide and a depthwise layer."""
    torch.manual_seed(0)
    for module, side in ((nn.Conv2d(256, 256, 3, padding=1), 14), (nn.Conv2d(64, 64, 3, padding=1, groups=64), 28)):
        x = torch.randn(2, module.in_channels, side, side).relu()
        r = torch.randn(2, module.out_channels, side, side).abs()
        for rule in (ZPlus(), AlphaBeta(), Gamma(), Epsilon(epsilon=1e-2)):
            found = sent(rule, module, x, r, False)
            exact = sent(rule, module.double(), x.double(), r.double(), False)
            module.float()
            error = (found - exact).norm() / exact.norm()
            assert error < 1e-3, f"{rule}: {error:.2g}"


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: AlphaBeta(alpha=2.0, beta=0.5), "alpha - beta"),
        (lambda: AlphaBeta(alpha=-1.0, beta=-2.0), "neither negative"),
        (lambda: Gamma(gamma=-0.1), "gamma"),
        (lambda: Epsilon(epsilon=-1e-6), "epsilon"),
        (lambda: Epsilon(epsilon=float("nan")), "epsilon"),
        (lambda: ZBox(low=1.0, high=0.0), "low must not exceed high"),
        (lambda: ZBox(low="least"), "minmax"),
    ],
)
def test_numbers_out_of_range_are_named(build, error):
    with pytest.raises(ValueError, match=error):
        build()


# ---- how rules are written and found ----


def test_a_rules_own_number_comes_first():
    from fastcam.relevance import AlphaBeta, Epsilon, Gamma, ZBox

    assert Gamma(0.1) == Gamma(gamma=0.1)
    assert Epsilon(1e-3) == Epsilon(epsilon=1e-3)
    assert AlphaBeta(3, 2) == AlphaBeta(alpha=3, beta=2)
    assert ZBox(-2, 2) == ZBox(low=-2, high=2)
    with pytest.raises(TypeError, match="bias must be True or False"):
        Gamma(bias=0.1)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_is_symmetric_padding(kernel, dilation):
    torch.manual_seed(0)
    same = nn.Sequential(nn.Conv2d(3, 4, kernel, padding="same", dilation=dilation), nn.ReLU(), nn.Conv2d(4, 5, 3))
    same = nn.Sequential(*same, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).double().eval()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    maps = [fastcam.attribute(same, images, method, normalize=False).maps for method in METHODS_OF_LAYERS]
    same[0].padding = (dilation * (kernel - 1) // 2,) * 2
    for found, method in zip(maps, METHODS_OF_LAYERS, strict=True):
        torch.testing.assert_close(found, fastcam.attribute(same, images, method, normalize=False).maps)


METHODS_OF_LAYERS = ("lrp", "rap", "attribution_equilibrium")


@pytest.mark.parametrize("kernel", [(2, 2), (3, 4)], ids=str)
def test_same_padding_of_even_kernels_is_padding_and_convolution(kernel):
    """Every rule, matrix by matrix: the columns of the padding taken out of the matrix of the unpadded convolution."""
    torch.manual_seed(0)
    same = nn.Conv2d(2, 3, kernel, padding="same").double()
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    r = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    pairs = {change: matrix(same, (1, *x.shape[1:]), change) for change in (_own, torch.square, torch.ones_like)}
    pads = [k - 1 for k in kernel]
    geometry = Geometry(2, False, (1, 1), tuple(n // 2 for n in pads), (1, 1), 1, (), tuple(n % 2 for n in pads))
    weight, bias = same.weight.detach(), same.bias.detach()
    torch.testing.assert_close(geometry.apply(x, weight, bias), same(x).detach())
    for name, rule in RULES.items():
        layer = Layer(geometry, x, None, weight, bias, True, ModifiedWeights())
        found = rule.send(layer, rule.prepare(layer), Relevance(r)).tensor()
        want = expected(rule, same, x, r, pairs)
        assert float((found - want).abs().max() / want.abs().max()) < 1e-10, name
    net = nn.Sequential(same, nn.ReLU(), nn.Conv2d(3, 4, 2, padding="same"), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(*net, nn.Flatten()).double().eval()
    spelled = nn.Sequential(net[0], net[1], nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 2).double(), *net[3:]).eval()
    spelled[3].load_state_dict(net[2].state_dict())
    for method in METHODS_OF_LAYERS[::2]:
        one, other = (fastcam.attribute(m, x, method, targets=1, normalize=False).maps for m in (net, spelled))
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", ["lrp", "attribution_equilibrium"])
def test_a_registered_rule_comes_before_every_other(method, monkeypatch):
    from fastcam.program.relevance import walk

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
    net = nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).double().eval()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    monkeypatch.setattr(walk, "_registered", {})
    seen = []

    def rule(step, given):
        seen.append(step.node)
        return {step.source: given}

    fastcam.register_relevance_rule("aten::group_norm", rule)
    assert fastcam.attribute(net, images, method, targets=0).maps.isfinite().all()
    assert len(seen) == 1
    fastcam.register_relevance_rule("aten::conv2d", "gradient")
    assert fastcam.attribute(net, images, method, targets=0).maps.isfinite().all()


POOLS = {
    "max_pool1d": (7,),
    "max_pool2d": (7, 8),
    "max_pool3d": (4, 5, 3),
}
WINDOWS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 2, "ceil_mode": True},
    {"kernel_size": 2, "stride": 1, "dilation": 2},
]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_max_pools_share_as_written(name, options):
    """Window by window, in plain Python: the winner, proportional to max(x, 0), equal parts among the maxima."""
    size = POOLS[name]

    class Pooled(nn.Module):
        def forward(self, x):
            return getattr(functional, name)(x, **options).flatten(1)

    x = torch.randint(-2, 4, (1, 2, *size), generator=torch.Generator().manual_seed(1)).double()
    z = getattr(functional, name)(x, **options)
    r = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = {share: torch.zeros_like(x) for share in ("winner", "proportional", "ties")}
    kernel, stride = options["kernel_size"], options["stride"]
    padding, dilation = options.get("padding", 0), options.get("dilation", 1)
    for channel in range(2):
        for at in itertools.product(*map(range, z.shape[2:])):
            reach = [[a * stride - padding + k * dilation for k in range(kernel)] for a in at]
            places = [(0, channel, *p) for p in itertools.product(*reach)]
            places = [p for p in places if all(0 <= i < n for i, n in zip(p[2:], size, strict=True))]
            values = [float(x[p]) for p in places]
            one = float(r[(0, channel, *at)])
            want["winner"][places[values.index(max(values))]] += one
            positive = [max(v, 0.0) for v in values]
            positive = positive if sum(positive) else [1.0] * len(values)
            for place, value, share in zip(places, values, positive, strict=True):
                want["proportional"][place] += one * share / sum(positive)
                want["ties"][place] += one * (value == max(values)) / values.count(max(values))
    for share, expect in want.items():
        found = fastcam.attribute(
            Pooled().eval(), x, "lrp", composite="epsilon_plus", seed=r.flatten(1), max_pool=share, normalize=False,
            return_relevance=True,
        )  # fmt: skip
        torch.testing.assert_close(found.extra["relevance"], expect, rtol=1e-12, atol=1e-12)


class Selecting(nn.Module):
    """A linear layer on what `select` makes of the image."""

    def __init__(self, select):
        super().__init__()
        self.select, self.head = select, nn.Linear(12, 3, bias=False)

    def forward(self, x):
        return self.head(self.select(x).flatten(1))


def written(x):
    y = 2 * x
    y[..., 0] = 0.5
    y[:, :, 1].zero_()
    return y


def masked(x):
    return x.masked_fill(torch.arange(4) == 0, 0.5)


#: The constant operand of the linear maps below.
MATRIX = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

#: What lets relevance through where it stands, and the factor of each entry: 0 where a constant was written.
PASSED = {
    "one minus": (lambda x: 1 - x, None),
    "scaled rsub": (lambda x: torch.rsub(x, 2.0, alpha=3), None),
    "softsign": (functional.softsign, None),
    "softshrink": (lambda x: functional.softshrink(x, 0.1), None),
    "hardshrink": (lambda x: functional.hardshrink(x, 0.1), None),
    "zeros_like": (lambda x: x + torch.zeros_like(x) + torch.fill(x, 2.0), None),
    "written": (written, ((..., 0), (slice(None), slice(None), 1))),
    "masked_fill": (masked, ((..., 0),)),
}


@pytest.mark.parametrize("name", PASSED)
def test_functions_and_writes_pass_relevance_where_it_stands(name):
    select, blank = PASSED[name]
    torch.manual_seed(0)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    model = Selecting(select).double().eval()
    z = select(x).detach()
    products = z.flatten(1) * model.head.weight.detach()[[0, 2]]
    want = (products / products.sum(1, keepdim=True)).reshape(z.shape)
    for place in blank or ():
        want[place] = 0
    torch.testing.assert_close(relevance_of(model, x), want, rtol=1e-10, atol=1e-12)


def relevance_of(model, x, composite="epsilon_plus"):
    return fastcam.attribute(
        model, x, "lrp", composite=composite, epsilon=0.0, targets=[0, 2], normalize=False, return_relevance=True
    ).extra["relevance"]


def test_differences_of_two_share_with_their_signs():
    """rsub(a, b, alpha=3) = b - 3 a: each in proportion to its own part of the result."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    model = Selecting(lambda x: torch.rsub(x[:, :1], x[:, 1:], alpha=3)).double().eval()
    z = x[:, 1:] - 3 * x[:, :1]
    products = z.flatten(1) * model.head.weight.detach()[[0, 2]]
    above = (products / products.sum(1, keepdim=True)).reshape(z.shape)
    z = z + 1e-6 * z.sign()
    found = relevance_of(model, x)
    torch.testing.assert_close(found, torch.cat([-3 * x[:, :1], x[:, 1:]], 1) * above / z, rtol=1e-8, atol=1e-10)


def test_gated_linear_units_give_all_to_the_gated_half():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    model = Selecting(lambda x: functional.glu(x, 1)).double().eval()
    products = functional.glu(x, 1).flatten(1) * model.head.weight.detach()[[0, 2]]
    above = (products / products.sum(1, keepdim=True)).reshape(2, 1, 3, 4)
    torch.testing.assert_close(relevance_of(model, x), torch.cat([above, torch.zeros_like(above)], 1))


@pytest.mark.parametrize("spelled", ["einsum", "tensordot"])
def test_einsum_with_one_constant_is_a_linear_map(spelled):
    """The epsilon rule on the step's dense matrix; other rules of linear layers are refused by name."""

    def select(x):
        if spelled == "einsum":
            return torch.einsum("kw,bchw->bhkc", MATRIX, x)
        return torch.tensordot(x, MATRIX.mT, 1)

    torch.manual_seed(0)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    model = Selecting(select).double().eval()
    weight = torch.stack(
        [select(one).flatten() for one in torch.eye(12, dtype=torch.float64).reshape(12, 1, 1, 3, 4)], 1
    )
    z = x.flatten(1) @ weight.T
    products = z * model.head.weight.detach()[[0, 2]]
    above = products / products.sum(1, keepdim=True)
    want = torch.einsum("bji,bj->bi", weight * x.flatten(1).unsqueeze(1), above / z).reshape(x.shape)
    found = relevance_of(model, x)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.flatten(1).sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
    with pytest.raises(fastcam.UnsupportedOpError, match=f"no relevance rule for aten::{spelled} .*not ZPlus"):
        relevance_of(model, x, "excitation_backprop")


SELECTIONS = {
    "neg": lambda x: -x,
    "maximum": lambda x: torch.maximum(x, 0.5 * x),
    "minimum": lambda x: torch.minimum(x[:, :1], x[:, 1:]),
    "where": lambda x: torch.where(x > 0, x, 2 * x),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_and_signs_hand_relevance_to_what_they_took(name):
    select = SELECTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 2 if name == "minimum" else 1, 3, 4, dtype=torch.float64)
    model = Selecting(select).double().eval()
    found = fastcam.attribute(
        model, x, "lrp", composite="epsilon_plus", epsilon=0.0, targets=[0, 2], normalize=False, return_relevance=True
    ).extra["relevance"]
    z = select(x).detach()
    products = z.flatten(1) * model.head.weight.detach()[[0, 2]]
    above = (products / products.sum(1, keepdim=True)).reshape(z.shape)
    first = (x[:, :1] <= x[:, 1:]).double() if name == "minimum" else None
    want = above if first is None else torch.cat([above * first, above * (1 - first)], 1)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("operator", ["exp", "pow"])
def test_functions_without_a_share_to_give_are_refused_with_the_cure(operator):
    def select(x):
        return x.exp() if operator == "exp" else x**3

    model = Selecting(select).eval()
    with pytest.raises(fastcam.UnsupportedOpError) as caught:
        fastcam.attribute(model, torch.rand(1, 1, 3, 4), "lrp", targets=0)
    text = str(caught.value)
    assert f"aten::{operator}" in text
    assert "test_relevance_rules.py" in text  # the line of the user's code
    assert f'fastcam.register_relevance_rule("aten::{operator}", "pass")' in text
