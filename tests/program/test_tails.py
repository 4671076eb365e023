"""What is fused behind a convolution, and that a run with it computes what the module does."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastcam._testing.models import seeded
from fastcam.program import execute
from fastcam.program.capture import capture
from fastcam.program.cut import cut
from fastcam.program.layers import find_layer
from fastcam.program.nodes import op_name
from fastcam.program.session import Bound
from fastcam.program.tails import find_tails

CHANNELS = 8


class Block(nn.Module):
    """Two branches and a head; a subclass says how the branches meet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.down = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.last = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, images):
        x = functional.relu(self.stem(images))
        return self.head(self.last(self.meet(x)).mean((2, 3)))

    def branch(self, x):
        return self.norm(self.conv(functional.relu(self.first(x))))


class Identity(Block):
    def meet(self, x):
        return functional.relu(self.branch(x) + x)


class InPlace(Block):
    def meet(self, x):
        out = self.branch(x)
        out += x
        return out.relu_()


class Swapped(Block):
    def meet(self, x):
        return functional.relu(x + self.branch(x))


class Downsampled(Block):
    """Both summands are convolutions; the one that runs last takes the other's memory."""

    def meet(self, x):
        out = self.branch(x)
        return functional.relu(out + self.down(x))


class NoActivation(Block):
    def meet(self, x):
        return x + self.branch(x)


class OtherActivation(Block):
    def meet(self, x):
        return functional.silu(x + self.branch(x))


class SumReadTwice(Block):
    """The sum itself is needed, so the ReLU stays apart."""

    def meet(self, x):
        total = x + self.branch(x)
        return functional.relu(total) + total.mean((2, 3), keepdim=True)


FUSED = {
    Identity: ["add", "relu"],
    InPlace: ["add", "relu"],
    Swapped: ["add", "relu"],
    Downsampled: ["add", "relu"],
    NoActivation: ["add"],
    OtherActivation: ["add"],
    SumReadTwice: ["add"],
}


class OtherReadLater(Block):
    def meet(self, x):
        return functional.relu(self.branch(x) + x) * x


class OtherReadBetween(Block):
    def meet(self, x):
        out = self.branch(x)
        side = functional.avg_pool2d(x, 3, 1, 1)
        return functional.relu(out + x) * side


class OtherViewReadLater(Block):
    def meet(self, x):
        flat = x.flatten(2)
        return functional.relu(self.branch(x) + x) * flat.mean(2)[..., None, None]


class OtherIsMadeLater(Block):
    def meet(self, x):
        out = self.branch(x)
        return functional.relu(out + functional.avg_pool2d(x, 3, 1, 1).sigmoid())


class OtherIsRead(Block):
    """By the convolution itself, which would overwrite its own input."""

    def meet(self, x):
        return functional.relu(self.norm(self.conv(x)) + x)


class OtherIsAView(Block):
    def meet(self, x):
        turned = functional.relu(self.down(x)).mT
        return functional.relu(self.branch(x) + turned)


class OtherIsTheImage(Block):
    def forward(self, images):
        wide = functional.conv2d(images, self.stem.weight[:3], padding=1) + images
        return self.head(self.last(functional.relu(self.stem(wide))).mean((2, 3)))


class ConvReadTwice(Block):
    def meet(self, x):
        out = self.branch(x)
        return functional.relu(out + x) * out


class Doubled(Block):
    def meet(self, x):
        out = self.branch(x)
        return functional.relu(out + out)


class Weighted(Block):
    def meet(self, x):
        return functional.relu(torch.add(x, self.branch(x), alpha=2))


class Broadcast(Block):
    def meet(self, x):
        pooled = x.mean((2, 3), keepdim=True).relu()
        return functional.relu(self.branch(x) + pooled)


class Number(Block):
    def meet(self, x):
        return functional.relu(self.branch(x) + 1.5)


class Widened(Block):
    def meet(self, x):
        """By type promotion."""
        return functional.relu(self.branch(x) + x.double().relu()).float()


UNFUSED = [
    OtherReadLater, OtherReadBetween, OtherViewReadLater, OtherIsMadeLater, OtherIsRead, OtherIsAView, OtherIsTheImage,
    ConvReadTwice, Doubled, Weighted, Broadcast, Number,
]  # fmt: skip


@functools.cache
def prepared(kind, layer="last"):
    model = seeded(kind)
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    program = capture(model, images)
    index, name = find_layer(program, model, layer, 2)
    return model, images, cut(program, index, name, folded=True)


def summed(made) -> list[list[str]]:
    """Names of the operators fused behind convolutions whose results are added to something."""
    program = made.program
    needed = program.ancestors(program.output_indices)
    nodes = [program.nodes[i] for i in sorted(needed) if program.nodes[i].args]
    tails = find_tails(program, nodes, {made.feature}).values()
    return [[op_name(program.nodes[i].target) for i in tail.nodes] for tail in tails if tail.other is not None]


def features(made, model, images, dtype, channels_last):
    bound = Bound(made, model, torch.float32, dtype, channels_last)
    layout = torch.channels_last if channels_last else torch.preserve_format
    given = images.to(dtype=dtype, memory_format=layout, copy=True)
    kept = given.clone()
    found = bound.session().forward(given)
    assert torch.equal(given, kept)
    return found.features, found.output


@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.float32, False), (torch.float32, True), (torch.float64, False), (torch.bfloat16, True)],
    ids=str,
)
@pytest.mark.parametrize("kind", [*FUSED, *UNFUSED], ids=lambda kind: kind.__name__)
def test_runs_equal_the_module(kind, dtype, channels_last):
    """RMS ratio to the module in float64: 1e-5 for other roundings in float32, 1e-6 in float64, since batch norms are
    folded in the model's own float32; bfloat16 at most twice the module's own error in bfloat16."""
    model, images, made = prepared(kind)
    seen = []
    with torch.no_grad():
        exact = seeded(kind).double()
        exact.last.register_forward_hook(lambda module, args, result: seen.append(result))
        scores = exact(images.double())
        found = features(made, model, images, dtype, channels_last)
        if dtype == torch.bfloat16:
            own = seeded(kind).bfloat16()(images.bfloat16())
            limit = 2 * float((own - scores).norm() / scores.norm()) + 1e-3
        else:
            limit = {torch.float64: 1e-6, torch.float32: 1e-5}[dtype]
    for value, expected in zip(found, (seen[0], scores), strict=True):
        assert value.dtype == dtype
        assert float((value - expected).norm() / expected.norm()) <= limit


@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_residuals_are_fused(kind):
    assert summed(prepared(kind)[2]) == [FUSED[kind]]


@pytest.mark.parametrize("kind", [*UNFUSED, Widened], ids=lambda kind: kind.__name__)
def test_what_would_be_seen_is_not_fused(kind):
    assert summed(prepared(kind)[2]) == []


@pytest.mark.parametrize("kind", [Identity, Downsampled], ids=lambda kind: kind.__name__)
def test_fusing_changes_no_bit_in_float32(kind, monkeypatch):
    """oneDNN adds to the finished sum of products, as a separate addition does."""
    model, images, made = prepared(kind)
    found = features(made, model, images, torch.float32, True)
    monkeypatch.setattr(execute, "find_tails", lambda program, nodes, keep: {})
    plain = features(prepared.__wrapped__(kind)[2], model, images, torch.float32, True)
    for value, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("layer", "fused"), [("stem", 1), ("norm", 0)])
def test_a_layer_that_is_the_residual_keeps_its_values(layer, fused):
    """The features asked for enter the block, or are the summand that fusing would overwrite."""
    model, images, made = prepared(Downsampled, layer)
    assert len(summed(made)) == fused
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        scores = model(images)
    handle.remove()
    found, output = features(made, model, images, torch.float32, True)
    torch.testing.assert_close(found, seen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, scores, rtol=1e-5, atol=1e-5)
