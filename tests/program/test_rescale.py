"""Rescale rules one by one, each as a step between images and a linear read-out in float64: complete, symmetric in
image and reference, the plain gradient where they are equal, independent of the batch. Oracles: secants, autograd and
loops; tolerances are relative to the largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcam._testing.rescale import ReadOut, draw, max_pool_rule, multipliers, secant

MAP = (4, 6, 7)


def of(function: Callable[[Any], Any], shape: tuple[int, ...] = MAP, positive: bool = False) -> Any:
    return lambda: function, shape, positive


def module(build: Callable[[], nn.Module], shape: tuple[int, ...] = MAP) -> Any:
    return build, shape, False


class Attend(nn.Module):
    """Self-attention with its own projections, by `scaled_dot_product_attention` or written out."""

    def __init__(self, written: bool = False, crossed: bool = False):
        super().__init__()
        self.inputs, self.written, self.crossed = nn.Linear(6, 18), written, crossed

    def forward(self, x):
        q, k, v = self.inputs(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        if self.crossed:
            k, v = q, k * v
        if self.written:
            return ((q @ k.mT / 3**0.5).softmax(-1) @ v).mT.flatten(2)
        return F.scaled_dot_product_attention(q, k, v).mT.flatten(2)


class Gate(nn.Module):
    """Squeeze and excite: maps times a gate of one number each."""

    def __init__(self, divide: bool = False):
        super().__init__()
        self.divide = divide
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x / (1 + gate) if self.divide else x * gate


#: Smooth and piecewise functions of one number, which their secants explain.
FUNCTIONS = {
    "relu": F.relu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky relu default": F.leaky_relu,
    "elu": lambda x: F.elu(x, 0.7),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": lambda x: F.softplus(x, 2.0, 1.0),
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "relu6": lambda x: F.relu6(4 * x),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.8),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 1.5),
    "threshold": lambda x: F.threshold(x, 0.1, -0.3),
    "clamp": lambda x: x.clamp(-0.4, 0.6),
    "clamp_min": lambda x: x.clamp(min=0),
    "clamp_max": lambda x: x.clamp(max=0.2),
    "square": torch.square,
    "cube": lambda x: x**3,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "abs": torch.abs,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "exp2": torch.exp2,
    "floor": lambda x: (3 * x).floor(),
}
POSITIVE = {
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "one over": lambda x: 2 / x,
    "log": torch.log,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "log10": torch.log10,
    "pow": lambda x: x**1.7,
}
OTHERS = {
    "prelu": module(lambda: nn.PReLU(4, 0.3)),
    "softmax": of(lambda x: x.softmax(1)),
    "softmax last": of(lambda x: 3 * x.softmax(-1)),
    "log_softmax": of(lambda x: x.log_softmax(1)),
    "log_softmax rows": of(lambda x: x.log_softmax(2)),
    "softmin": of(lambda x: F.softmin(x, 1)),
    "layer norm": module(lambda: nn.LayerNorm((6, 7))),
    "layer norm plain": of(lambda x: F.layer_norm(x, (7,), eps=0.1)),
    "group norm": module(lambda: nn.GroupNorm(2, 4)),
    "group norm plain": of(lambda x: F.group_norm(x, 2)),
    "instance norm": module(lambda: nn.InstanceNorm2d(4, affine=True)),
    "instance norm 1d": module(lambda: nn.InstanceNorm1d(4), (4, 9)),
    "rms norm": module(lambda: nn.RMSNorm((6, 7), eps=0.01)),
    "rms norm default": module(lambda: nn.RMSNorm(7)),
    "max_pool1d": module(lambda: nn.MaxPool1d(3, 2), (4, 11)),
    "max_pool2d 2/2": module(lambda: nn.MaxPool2d(2)),
    "max_pool2d 3/1": module(lambda: nn.MaxPool2d(3, 1)),
    "max_pool2d 3/2 padded": module(lambda: nn.MaxPool2d(3, 2, 1)),
    "max_pool2d dilated": module(lambda: nn.MaxPool2d(2, 1, dilation=2)),
    "max_pool2d ceil": module(lambda: nn.MaxPool2d(3, 2, ceil_mode=True), (4, 6, 8)),
    "max_pool2d uneven": module(lambda: nn.MaxPool2d((2, 3), (1, 2), (1, 0))),
    "max_pool2d indices": of(lambda x: F.max_pool2d(x, 3, 2, return_indices=True)[0]),
    "max_pool3d": module(lambda: nn.MaxPool3d(3, 2, 1), (2, 5, 4, 6)),
    "adaptive_max_pool1d": module(lambda: nn.AdaptiveMaxPool1d(4), (4, 10)),
    "adaptive_max_pool2d": module(lambda: nn.AdaptiveMaxPool2d((4, 3))),
    "adaptive_max_pool3d": module(lambda: nn.AdaptiveMaxPool3d(2), (2, 3, 4, 5)),
    "amax": of(lambda x: x.amax((2, 3))),
    "amax kept": of(lambda x: x.amax((-1,), keepdim=True) + x),
    "max over channels": of(lambda x: x.max(1)[0]),
    "max kept": of(lambda x: x.max(2, keepdim=True).values * 2),
    "max of two": of(lambda x: torch.max(x, x.flip(1))),
    "maximum": of(lambda x: torch.maximum(x[:, :2], x[:, 2:])),
    "minimum": of(lambda x: torch.minimum(x[:, :2], 0.3 * x[:, 2:3])),
    "maximum of a constant": of(lambda x: torch.maximum(x, torch.linspace(-1, 1, 7, dtype=x.dtype))),
    "amin": of(lambda x: x.amin((2, 3))),
    "min over channels": of(lambda x: x.min(1)[0]),
    "mul": of(lambda x: x * x.flip(1)),
    "mul broadcast": of(lambda x: x * x.mean((2, 3), keepdim=True)),
    "mul broadcast left": of(lambda x: x[:, :1] * x),
    "squared": of(lambda x: x * x),
    "div": of(lambda x: x / (x.flip(2) + 3), positive=True),
    "div by itself": of(lambda x: x / (x + 1), positive=True),
    "normalise": of(lambda x: x / x.sum(1, keepdim=True), positive=True),
    "squeeze excite": module(Gate),
    "squeeze excite divided": module(lambda: Gate(divide=True)),
    "matmul": of(lambda x: x @ x.mT),
    "matmul broadcast": of(lambda x: x[:, :1] @ x.mT),
    "bmm": of(lambda x: torch.bmm(x.flatten(2), x.flatten(2).mT)),
    "attention": module(Attend, (5, 6)),
    "attention shared": module(lambda: Attend(crossed=True), (5, 6)),
    "attention written out": module(lambda: Attend(written=True), (5, 6)),
    "multihead attention": module(lambda: Multihead(), (5, 6)),
    "glu": module(lambda: nn.GLU(1)),
}
#: Steps whose multipliers are their gradients.
AFFINE = {
    "add": of(lambda x: x + x.flip(1)),
    "add twice": of(lambda x: x + x),
    "add scaled": of(lambda x: torch.add(x, x.mean(1, keepdim=True), alpha=3)),
    "sub broadcast": of(lambda x: x.mean((2, 3), keepdim=True) - x),
    "sub scaled": of(lambda x: torch.sub(x.flip(1), x, alpha=0.5)),
    "one minus": of(lambda x: 1 - x),
    "scaled": of(lambda x: x * 3 / 2),
    "scaled by a tensor": of(lambda x: torch.linspace(0, 1, 7, dtype=x.dtype) * x / torch.tensor(2.0)),
    "broadcast by a weight": of(lambda x: x[:, :1] * torch.ones(3, 1, 1, dtype=x.dtype)),
    "negative": of(lambda x: -x),
    "cat": of(lambda x: torch.cat([x, x[:, 1:], x.flip(1)], 1)),
    "cat with a constant": of(lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1)),
    "stack": of(lambda x: torch.stack([x, x.flip(2)], 1)),
    "split": of(lambda x: x.split([1, 3], 1)[1]),
    "chunk": of(lambda x: (lambda a, b: a - 2 * b)(*x.chunk(2, 1))),
    "unbind": of(lambda x: x.unbind(1)[0] + x.unbind(1)[2]),
    "reshape": of(lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)),
    "permute": of(lambda x: x.permute(0, 2, 3, 1)),
    "slice": of(lambda x: x[:, :, ::2, 1:-1]),
    "index": of(lambda x: x[:, [0, 0, 3]]),
    "roll": of(lambda x: x.roll((1, 2), (2, 3))),
    "expand": of(lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1)),
    "repeat": of(lambda x: x.repeat(1, 2, 1, 1)),
    "pixel shuffle": of(lambda x: F.pixel_shuffle(x, 2)),
    "pad": of(lambda x: F.pad(x, (1, 2, 0, 1), value=0.7)),
    "pad reflect": of(lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect")),
    "pad replicate": of(lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate")),
    "pad circular": of(lambda x: F.pad(x, (1, 2, 0, 1), mode="circular")),
    "nearest": of(lambda x: F.interpolate(x, scale_factor=2)),
    "bilinear": of(lambda x: F.interpolate(x, (9, 5), mode="bilinear")),
    "bicubic": of(lambda x: F.interpolate(x, (9, 5), mode="bicubic", align_corners=True)),
    "area": of(lambda x: F.interpolate(x, (3, 4), mode="area")),
    "avg pool": of(lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "adaptive avg pool": of(lambda x: F.adaptive_avg_pool2d(x, (4, 3))),
    "mean": of(lambda x: x.mean((2, 3))),
    "sum": of(lambda x: x.sum(1)),
    "cumsum": of(lambda x: x.cumsum(2)),
    "unfold": of(lambda x: F.unfold(x, 3, padding=1)),
    "conv": module(lambda: nn.Conv2d(4, 5, 3)),
    "conv strided": module(lambda: nn.Conv2d(4, 5, 3, 2, 1), (4, 8, 7)),
    "conv kernel below stride": module(lambda: nn.Conv2d(4, 5, 1, 3), (4, 9, 8)),
    "conv grouped dilated": module(lambda: nn.Conv2d(4, 8, 3, 2, 2, dilation=2, groups=2)),
    "conv depthwise": module(lambda: nn.Conv2d(4, 4, (3, 1), (2, 1), (1, 0), groups=4, bias=False)),
    "conv same": module(lambda: nn.Conv2d(4, 5, (3, 4), padding="same", dilation=2)),
    "conv valid": module(lambda: nn.Conv2d(4, 5, 3, padding="valid")),
    "conv reflect": module(lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect")),
    "conv1d": module(lambda: nn.Conv1d(4, 5, 3, 2), (4, 10)),
    "conv3d": module(lambda: nn.Conv3d(2, 3, 2, 2, 1), (2, 5, 4, 6)),
    "transposed conv": module(lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)),
    "linear": module(lambda: nn.Linear(7, 3)),
    "matmul by a weight": of(lambda x: x @ torch.linspace(0, 1, 21, dtype=x.dtype).reshape(7, 3)),
    "einsum": of(lambda x: torch.einsum("bchw,wk->bckh", x, torch.linspace(0, 1, 21, dtype=x.dtype).reshape(7, 3))),
    "batch norm": module(lambda: norm(nn.BatchNorm2d(4))),
    "batch norm plain": module(lambda: norm(nn.BatchNorm1d(4, affine=False)), (4, 9)),
    "where": of(lambda x: torch.where(torch.arange(7) > 2, x, -2 * x + 1)),
    "dropout": module(lambda: nn.Dropout(0.5)),
    "identity": of(lambda x: x.clone()),
    "number into a slice": of(lambda x: numbers_written(x * 2)),
    "filled": of(lambda x: x + torch.fill(x, 2.0)),
    "index_fill": of(lambda x: x.index_fill(1, torch.tensor([0, 2]), 0.3)),
    "index_copy": of(lambda x: x.index_copy(1, torch.tensor([0, 2]), x[:, :2] * 2)),
    "scatter_add": of(lambda x: x.scatter_add(3, torch.zeros(x.shape, dtype=torch.long), x)),
    "diagonal": of(lambda x: x.rot90(1, (2, 3)).diagonal(dim1=2, dim2=3).repeat_interleave(2, 1)),
    "nearest exact": of(lambda x: F.interpolate(x, (9, 5), mode="nearest-exact")),
}


def numbers_written(y):
    """`y[...] = 0` and its spellings: select, slice, a mask, fill_, zero_."""
    y[:, 0] = 0
    y[:, 1:3, 2:4] = 0.7
    y[..., 1].fill_(-1.0)
    y[:, 3, 0].zero_()
    y[:, :, torch.arange(6) > 4] = 0.2
    return y.masked_fill_(torch.arange(7) > 5, 1.5)


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def norm(layer: nn.Module) -> nn.Module:
    layer.running_mean.copy_(draw(4, seed=3))
    layer.running_var.copy_(draw(4, seed=4).square() + 0.1)
    return layer


class Together(nn.Module):
    """Many steps in one network, which is captured once: step i reads its own channels of the images."""

    def __init__(self, steps: list[Any], channels: int):
        super().__init__()
        self.steps, self.channels = steps, channels
        self.modules_among = nn.ModuleList([step for step in steps if isinstance(step, nn.Module)])

    def forward(self, x):
        return torch.cat([step(part).flatten(1) for step, part in zip(self.steps, self.split(x), strict=True)], 1)

    def split(self, x):
        return x.split(self.channels, 1)


def together(cases: dict[str, Any], channels: int = 4) -> Any:
    positive = any(case[2] for case in cases.values())
    return lambda: Together([case[0]() for case in cases.values()], channels), (channels * len(cases), 6, 7), positive


def functions(group: str) -> Any:
    return together({name: of(f, positive=GROUPS[group] is POSITIVE) for name, f in GROUPS[group].items()}, 1)


GROUPS = {"functions": FUNCTIONS, "functions of positive numbers": POSITIVE}
AFFINE_MAPS = {name: case for name, case in AFFINE.items() if case[1] == MAP}
CASES = {group: functions(group) for group in GROUPS} | {"affine": together(AFFINE_MAPS)}
CASES |= OTHERS | {name: case for name, case in AFFINE.items() if name not in AFFINE_MAPS}


class Case:
    def __init__(self, name: str):
        build, shape, self.positive = CASES[name]
        torch.manual_seed(0)
        self.net = ReadOut(build(), shape)
        self.shape = shape
        self.x, self.reference = self.images(3, 1), self.images(3, 2)

    def images(self, batch: int, seed: int) -> torch.Tensor:
        drawn = draw(batch, *self.shape, seed=seed)
        return drawn.abs() + 0.2 if self.positive else drawn


_MADE: dict[str, Case] = {}


def made(name: str) -> Case:
    """The case, built and captured once."""
    if name not in _MADE:
        _MADE[name] = Case(name)
    return _MADE[name]


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_nothing_kept():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    _MADE.clear()


def close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(scale.abs().max()))


@pytest.mark.parametrize("name", list(CASES))
def test_complete_and_symmetric(name):
    case = made(name)
    m, contributions, difference = multipliers(case.net, case.x, case.reference)
    close(contributions.flatten(1).sum(1), difference, contributions.flatten(1).abs().sum(1))
    assert difference.abs().min() > 1e-6
    back, swapped, _ = multipliers(case.net, case.reference, case.x)
    close(swapped, -contributions, contributions)
    close(back, m, m)


@pytest.mark.parametrize("name", list(CASES))
def test_equal_images_give_the_gradient(name):
    case = made(name)
    m, contributions, difference = multipliers(case.net, case.x, case.x.clone())
    x = case.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(case.net(x)[:, 1].sum(), x)
    assert (contributions == 0).all()
    assert (difference == 0).all()
    close(m, gradient, gradient)


@pytest.mark.parametrize("name", list(CASES))
def test_each_image_alone_and_one_reference_for_all(name):
    case = made(name)
    base = case.reference[:1]
    m, _, difference = multipliers(case.net, case.x, base)
    expanded, _, _ = multipliers(case.net, case.x, base.expand_as(case.x))
    close(m, expanded, m, 1e-13)
    for i in (0, 2):
        alone, _, lone = multipliers(case.net, case.x[i : i + 1], base)
        close(alone, m[i : i + 1], m, 1e-13)
        close(lone, difference[i : i + 1], m, 1e-12)


@pytest.mark.parametrize("group", list(GROUPS))
def test_functions_against_their_secants(group):
    case = made(group)
    m, _, _ = multipliers(case.net, case.x, case.reference)
    cotangent = case.net.cotangent(1).reshape(case.shape)
    for i, (name, function) in enumerate(GROUPS[group].items()):
        expected = secant(function, case.x[:, i], case.reference[:, i]) * cotangent[i]
        error = (m[:, i] - expected).abs().max() / expected.abs().max()
        assert error < 1e-9, f"{name}: {error:.2g}"


@pytest.mark.parametrize("name", ["affine", *(name for name in AFFINE if name not in AFFINE_MAPS)])
def test_affine_steps_against_autograd(name):
    case = made(name)
    x = draw(*case.x.shape, seed=9).requires_grad_()
    (gradient,) = torch.autograd.grad(case.net(x)[:, 1].sum(), x)
    m, _, _ = multipliers(case.net, case.x, case.reference)
    error = (m - gradient).abs().amax((0, *range(2, m.ndim))) / gradient.abs().max()
    wrong = [list(AFFINE_MAPS)[int(i) // 4] if name == "affine" else name for i in (error > 1e-12).nonzero()]
    assert not wrong, dict.fromkeys(wrong)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil", "shape"),
    [
        ((2,), (2,), (0,), (1,), False, (7,)),
        ((3, 3), (2, 2), (1, 1), (1, 1), False, (6, 7)),
        ((3, 3), (1, 1), (0, 0), (1, 1), False, (5, 5)),
        ((2, 2), (2, 2), (0, 0), (1, 1), True, (5, 6)),
        ((2, 3), (1, 2), (1, 0), (2, 1), False, (6, 7)),
        ((2, 2, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1), False, (3, 4, 5)),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_max_pools_against_a_loop(kernel, stride, padding, dilation, ceil, shape, ties):
    """`ties` rounds to halves: equal maxima inside windows, between the passes, and equal pixels."""
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    net = ReadOut(lambda x: pool(x, kernel, stride, padding, dilation, ceil), (2, *shape))
    x, reference = draw(2, 2, *shape, seed=1), draw(2, 2, *shape, seed=2)
    if ties:
        x, reference = (x * 2).round() / 2, (reference * 2).round() / 2
    m, contributions, difference = multipliers(net, x, reference)
    cotangent = net.cotangent(1)
    for b in range(2):
        for c in range(2):
            arguments = (x[b, c], reference[b, c], cotangent[c], kernel, stride, padding, dilation)
            close(m[b, c], max_pool_rule(*arguments), m, 1e-13)
    close(contributions.flatten(1).sum(1), difference, contributions, 1e-12)
