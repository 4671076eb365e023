"""RevealCancel against the paper's rules written out for dense networks, its toys, and completeness on real steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastcam
from fastcam._testing import models
from fastcam.program.rescale import UnsupportedOpError


def images(size=(13, 16), batch=3, seed=0, channels=3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def explain(net, x, reference, targets=0, rule="reveal_cancel", **options):
    return fastcam.attribute(net, x, "deep_lift", targets=targets, rule=rule, reference=reference, **options)


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


# --- toys: an image of one row, whose pixels are the inputs ---


class Toy(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(*x.flatten(1).unbind(1)).unsqueeze(1)


def toy(function, *inputs, rule="reveal_cancel") -> list[float]:
    """Contributions of the inputs, from all of them 0."""
    x = torch.tensor(inputs, dtype=torch.float64).reshape(1, 1, 1, -1)
    got = explain(Toy(function).eval(), x, torch.zeros_like(x), rule=rule)
    assert abs(float(got.delta)) < 1e-12
    return got.raw.flatten().tolist()


@pytest.mark.parametrize(("first", "second"), [(5.0, 3.0), (3.0, 5.0), (2.0, 2.0)])
def test_minimum_is_shared(first, second):
    """The paper's example, min(a, b) = a - relu(a - b): each input half of it; Rescale gives all to one."""

    def smallest(a, b):
        return a - functional.relu(a - b)

    half = min(first, second) / 2
    assert toy(smallest, first, second) == pytest.approx([half, half], abs=1e-12)
    if first != second:
        all_to_one = [0, second] if first > second else [first, 0]
        assert toy(smallest, first, second, rule="rescale") == pytest.approx(all_to_one, abs=1e-12)


def test_and_or():
    def both(a, b):
        return functional.relu(a + b - 1)

    def either(a, b):
        return 1 - functional.relu(1 - a - b)

    for rule in ("rescale", "reveal_cancel"):
        assert toy(both, 1.0, 1.0, rule=rule) == pytest.approx([0.5, 0.5])
        assert toy(either, 1.0, 1.0, rule=rule) == pytest.approx([0.5, 0.5])
        assert toy(either, 1.0, 0.0, rule=rule) == pytest.approx([1, 0])
    # One input for and one against: Rescale sees no change at all.
    assert toy(lambda a, b: functional.relu(a - b), 2.0, 2.0, rule="rescale") == [0, 0]
    assert toy(lambda a, b: functional.relu(a - b), 2.0, 2.0) == pytest.approx([1, -1])


def test_two_inputs_at_a_relu_have_their_shapley_values():
    """relu(a - b + c): the two orders of adding what is for it and what is against it."""
    for a, b, c in ((3.0, 1.0, -2.0), (1.0, 4.0, 2.0), (0.5, -1.0, 0.2), (-1.0, 1.0, 0.3)):

        def f(x, y, c=c):
            return functional.relu(x - y + c)

        def v(x, y, c=c):
            return max(x - y + c, 0.0)

        if a * -b > 0:  # both push one way: one part, shared in proportion
            total = v(a, b) - v(0, 0)
            want = [total * a / (a - b), total * -b / (a - b)]
        else:
            want = [
                (v(a, 0) - v(0, 0) + v(a, b) - v(0, b)) / 2,
                (v(0, b) - v(0, 0) + v(a, b) - v(a, 0)) / 2,
            ]
        assert toy(f, a, b) == pytest.approx(want, abs=1e-12)


# --- the paper's rules, written out ---


def by_hand(layers, x: list[float], base: list[float], out: int) -> list[float]:
    """Multipliers of output `out`; layers are ("dense", W, b), ("scale", s, t) or ("f", function)."""
    values, tape = [base], []
    d = [(max(a - b, 0.0), min(a - b, 0.0)) for a, b in zip(x, base, strict=True)]
    for layer in layers:
        u, before = values[-1], d
        tape.append((u, before))
        if layer[0] == "dense":
            whole = [p + n for p, n in d]
            values.append(
                [sum(w * v for w, v in zip(row, u, strict=True)) + b for row, b in zip(*layer[1:], strict=True)]
            )
            d = [
                (
                    sum(w * t for w, t in zip(row, whole, strict=True) if w * t > 0),
                    sum(w * t for w, t in zip(row, whole, strict=True) if w * t < 0),
                )
                for row in layer[1]
            ]
        elif layer[0] == "scale":
            values.append([s * v + t for s, v, t in zip(layer[1], u, layer[2], strict=True)])
            d = [(s * p, s * n) if s > 0 else (s * n, s * p) for s, (p, n) in zip(layer[1], d, strict=True)]
        else:
            f = layer[1]
            values.append([f(v) for v in u])
            d = [
                ((f(v + p) - f(v) + f(v + p + n) - f(v + n)) / 2, (f(v + n) - f(v) + f(v + p + n) - f(v + p)) / 2)
                for v, (p, n) in zip(u, d, strict=True)
            ]
    m = [(1.0, 1.0) if i == out else (0.0, 0.0) for i in range(len(values[-1]))]
    for layer, (u, before) in zip(reversed(layers), reversed(tape), strict=True):
        if layer[0] == "dense":
            found = []
            for j, (p, n) in enumerate(before):
                total = 0.0
                for row, (up, down) in zip(layer[1], m, strict=True):
                    at = row[j] * (p + n)
                    total += row[j] * (up if at > 0 else down if at < 0 else (up + down) / 2)
                found.append((total, total))
            m = found
        elif layer[0] == "scale":
            m = [(s * up, s * dn) if s > 0 else (s * dn, s * up) for s, (up, dn) in zip(layer[1], m, strict=True)]
        else:
            f = layer[1]
            found = []
            for v, (p, n), (up, down) in zip(u, before, m, strict=True):
                rise, fall = f(v + p) - f(v) + f(v + p + n) - f(v + n), f(v + n) - f(v) + f(v + p + n) - f(v + p)
                found.append((up * rise / 2 / p if p else 0.0, down * fall / 2 / n if n else 0.0))
            m = found
    return [up if a > b else down for a, b, (up, down) in zip(x, base, m, strict=True)]


def relu(v: float) -> float:
    return max(v, 0.0)


@pytest.mark.parametrize("name", ["relu", "tanh"])
@pytest.mark.parametrize("norm", [False, True], ids=["dense", "norm"])
def test_dense_networks_by_hand(name, norm):
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes, steps, layers = [6, 9, 8, 4], [nn.Flatten()], []
    for i in range(3):
        weight, bias = draw(sizes[i + 1], sizes[i]), draw(sizes[i + 1])
        linear = nn.Linear(sizes[i], sizes[i + 1]).double()
        linear.weight.data, linear.bias.data = weight, bias
        steps.append(linear)
        layers.append(("dense", weight.tolist(), bias.tolist()))
        if i == 2:
            break
        if norm:
            scaling = nn.BatchNorm1d(sizes[i + 1]).double()
            scaling.weight.data, scaling.bias.data = draw(sizes[i + 1]), draw(sizes[i + 1])
            scaling.running_mean, scaling.running_var = draw(sizes[i + 1]), draw(sizes[i + 1]).square() + 0.5
            steps.append(scaling)
            factor = (scaling.weight / (scaling.running_var + scaling.eps).sqrt()).detach()
            layers.append(("scale", factor.tolist(), (scaling.bias - scaling.running_mean * factor).tolist()))
        steps.append(nn.ReLU() if name == "relu" else nn.Tanh())
        layers.append(("f", relu if name == "relu" else math.tanh))
    net, x, base = nn.Sequential(*steps).eval(), draw(3, 1, 2, 3), draw(3, 1, 2, 3)
    got = explain(net, x, base, [2, 0, 3])
    want = [
        by_hand(layers, one.flatten().tolist(), ref.flatten().tolist(), out)
        for one, ref, out in zip(x, base, [2, 0, 3], strict=True)
    ]
    contributions = torch.tensor(want, dtype=torch.float64).reshape(3, 2, 3) * (x - base)[:, 0]
    close(got.raw, contributions)
    other = explain(net, x, base, [2, 0, 3], rule="rescale").raw
    assert float((got.raw - other).abs().max()) > 1e-2 * float(other.abs().max())


# --- completeness on real steps ---


class Steps(nn.Module):
    """What convolutional networks are made of, beside convolution and ReLU."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.group = nn.Conv2d(6, 6, 3, 1, 1, groups=3, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.matrix = nn.Parameter(torch.randn(8, 7))
        self.pool, self.fc = pool, nn.Linear(7, 5)

    def forward(self, x):
        x = functional.gelu(self.norm(self.conv(2 - x)))
        x = x - 0.5 * functional.silu(self.group(x)) / self.scale.abs().sum()
        x = functional.pad(functional.leaky_relu(self.up(self.pool(x))), (1, 2, 0, 1), value=0.3) * self.scale
        left, right = x.chunk(2, dim=1)
        x = torch.cat([-left, torch.sigmoid(right), functional.interpolate(x, scale_factor=1)], dim=1).clamp(-1, 1)
        return self.fc(functional.relu(x.flatten(2).mean(2) @ self.matrix))


POOLS = {
    "overlapping max": nn.MaxPool2d(3, 2, 1),
    "adaptive max": nn.AdaptiveMaxPool2d((4, 5)),
    "average": nn.AvgPool2d(2),
}
NETS = {
    **{name: lambda pool=pool: models.seeded(lambda: Steps(pool)) for name, pool in POOLS.items()},
    "vgg": models.vgg_like,
    "in place": lambda: models.vgg_like(act="inplace"),
    "residual": models.residual,
}


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    return {name: build().double() for name, build in NETS.items()}


@pytest.mark.parametrize("name", NETS)
def test_contributions_add_up(nets, name):
    x, base = images(), images(seed=1)
    for reference in (base, base[:1], torch.zeros_like(x[:1])):
        got = explain(nets[name], x, reference, [[4, 0], [1, 2], [3, 3]])
        assert got.raw.shape == (3, 2, 13, 16)
        scale = max(float(got.raw.abs().sum((2, 3)).max()), float(got.scores.abs().max()))
        assert got.delta.abs().max() <= 1e-12 * scale
        single = explain(copy.deepcopy(nets[name]).float(), x.float(), reference.float(), [[4, 0], [1, 2], [3, 3]])
        assert single.delta.abs().max() <= 1e-5 * scale
    assert float((got.raw - explain(nets[name], x, reference, [[4, 0], [1, 2], [3, 3]], "rescale").raw).abs().max()) > 0


@pytest.mark.parametrize("name", NETS)
def test_swapping_image_and_reference_turns_every_sign(nets, name):
    x, base = images(), images(seed=1)
    there, back = explain(nets[name], x, base), explain(nets[name], base, x)
    close(there.raw, -back.raw, 1e-10)


@pytest.mark.parametrize("name", NETS)
def test_batch_and_targets_are_loops(nets, name):
    x, classes = images(), torch.tensor([[4, 0], [1, 2], [3, 3]])
    together = explain(nets[name], x, torch.zeros_like(x[:1]), classes)
    for b in range(3):
        for t in range(2):
            alone = explain(nets[name], x[b : b + 1], torch.zeros_like(x[:1]), int(classes[b, t]))
            close(together.raw[b, t], alone.raw[0], 1e-11)


def test_image_equal_to_its_reference(nets):
    got = explain(nets["residual"], images(), images())
    assert not got.raw.any()
    assert got.maps.isfinite().all()
    assert got.valid.all()


def test_affine_networks_know_one_rule():
    """Closed form, and step by step in front of a function that is linear where it runs."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1)]
    net = models.seeded(lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5))).double()
    x, base = images(), images(seed=1)
    want = explain(net, x, base, 1, "rescale").raw
    close(explain(net, x, base, 1).raw, want)
    walked = nn.Sequential(*layers[:3], nn.LeakyReLU(1.0), *layers[3:], nn.Flatten(), net[-1]).eval()
    close(explain(walked, x, base, 1).raw, want)


def test_folded_norms_change_nothing(nets):
    """precision= folds the batch norms, in float32: parts pass a norm as they pass a scaled convolution."""
    net, x = copy.deepcopy(nets["residual"]).float(), images().float()
    folded = explain(net, x, torch.zeros_like(x), precision="fp64").raw
    plain = explain(copy.deepcopy(net).double(), x.double(), torch.zeros_like(x).double()).raw
    close(folded, plain, 1e-6)


def test_at_a_layer_and_over_several_references(nets):
    net, x, base = nets["residual"], images(), images(seed=1)
    inner = explain(net, x, base, layer="features.norm2")  # with the skip connection around it
    assert inner.raw.abs().max() > 0
    assert inner.delta.abs().max() < 1e-12
    both = explain(net, x, [base, torch.zeros_like(x)])
    close(both.raw, (explain(net, x, base).raw + explain(net, x, torch.zeros_like(x)).raw) / 2)
    parts = explain(net, x, base, return_contributions=True)
    close(parts.extra["contributions"].sum(1), parts.raw)


def test_callable_targets(nets):
    x, base = images(), images(seed=1)
    got = explain(nets["vgg"], x, base, lambda y: y[:, 1] - y[:, 2])
    assert got.delta.abs().max() < 1e-12
    close(explain(nets["vgg"], x, base, lambda y: 2 * y[:, 1]).raw, 2 * explain(nets["vgg"], x, base, 1).raw)


DOMAINS = {
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "power": lambda v: v**0.5,
    "log": torch.log,
    "log1p": lambda v: torch.log1p(v - 1),
    "reciprocal": torch.reciprocal,
    "inverse square": lambda v: v**-2,
    "quotient": lambda v: 3 / v,
}


@pytest.mark.parametrize("name", DOMAINS)
def test_outside_the_domain_of_a_function_parts_have_its_secant(name):
    """f(1 + a - b) for (a, b) = (3, 2): without a, the function would be asked at -1."""
    f = DOMAINS[name]

    def of(a, b):
        return f(1 + a - b)

    total = float(f(torch.tensor(2.0, dtype=torch.float64)) - f(torch.tensor(1.0, dtype=torch.float64)))
    assert toy(of, 3.0, 2.0) == pytest.approx([3 * total, -2 * total], rel=1e-12)
    assert toy(of, 3.0, 2.0, rule="rescale") == pytest.approx([3 * total, -2 * total], rel=1e-12)
    # Inside the domain the two orders count, as at any other function: a first, and b first.
    end, up, down, start = (float(f(torch.tensor(v, dtype=torch.float64))) for v in (3.5, 4.0, 0.5, 1.0))
    want = [((up - start) + (end - down)) / 2, ((down - start) + (end - up)) / 2]
    assert toy(of, 3.0, 0.5) == pytest.approx(want, rel=1e-12)


def test_softsign_glu_and_numbers_written_into_slices():
    class Few(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(4, 5)

        def forward(self, x):
            y = functional.glu(functional.softsign(self.conv(x)), 1) + torch.ones_like(x[:, :1, 1:-1, 1:-1])
            y[:, 0] = 0.5
            y[..., 0].zero_()
            return self.fc(functional.relu(y - 1).mean((2, 3)))

    net, x, base = models.seeded(Few).double(), images(), images(seed=1)
    for reference in (base, base[:1]):
        got = explain(net, x, reference, [4, 1, 2])
        assert got.delta.abs().max() <= 1e-12 * float(got.raw.abs().sum((1, 2)).max())
    close(explain(net, base, x, 1).raw, -explain(net, x, base, 1).raw, 1e-10)


# --- errors ---


class With(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.conv, self.fc, self.step = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), step

    def forward(self, x):
        return self.fc(self.step(self.conv(x)).mean((2, 3)))


class Gate(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class Choice(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, x, 0.1 * x)


@pytest.mark.parametrize(
    ("step", "operator"),
    [(Gate(), "mul"), (nn.Softmax(1), "softmax"), (nn.GroupNorm(2, 6), "group_norm"), (Choice(), "where")],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_steps_without_a_rule(step, operator):
    net = With(step).double().eval()
    with pytest.raises(UnsupportedOpError, match=rf"no RevealCancel rule for {operator} at .*module 'step'"):
        explain(net, images(), torch.zeros_like(images()))


def test_other_errors(nets):
    with pytest.raises(ValueError, match="rule must be 'rescale' or 'reveal_cancel'; got 'reveal'"):
        explain(nets["vgg"], images(), torch.zeros_like(images()), rule="reveal")
    with pytest.raises(ValueError, match="linear in the model's output"):
        explain(nets["vgg"], images(), torch.zeros_like(images()), lambda y: y.softmax(1)[:, 0])
