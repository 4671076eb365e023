"""Maps that keep their graph: gradcheck in float64, the explainer's own numbers, and the documented example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing.models import residual, seeded, vgg_like


def images(count: int, seed: int = 0, side: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)


def smooth() -> nn.Module:
    """No corners but a max pool's, so that finite differences see the derivative; the head is not affine."""

    def build() -> nn.Module:
        features = nn.Sequential(
            nn.Conv2d(3, 3, 3, 1, 1), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 1), nn.Softplus()
        )
        return nn.Sequential(features, nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 5))

    return seeded(build).double()


METHODS = [
    ("grad_cam", {"relu": False}),
    pytest.param("hires_cam", {"relu": False, "size": "layer"}, marks=pytest.mark.slow),
    ("lift_cam", {"relu": False}),
    ("lrp", {"composite": "epsilon_plus", "epsilon": 1e-2}),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_gradcheck(method, options):
    """With respect to every parameter and to the images, without and with scaling."""
    model = smooth()
    x = images(1).requires_grad_()
    names = [name for name, _ in model.named_parameters()]
    layer = {} if method == "lrp" else {"layer": "0"}
    explainer = fastcam.Explainer(model, method, differentiable=True, normalize=False, **layer, **options)

    def maps(batch: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        own = dict(model.named_parameters())
        for name, value in zip(names, parameters, strict=True):
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = value
        try:
            return explainer(batch, [2]).maps
        finally:
            for name, value in own.items():
                owner, _, last = name.rpartition(".")
                model.get_submodule(owner)._parameters[last] = value

    explainer(x.detach(), [2])  # traces it; what follows are not nn.Parameters, which tracing asks for
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(maps, (x, *parameters), atol=1e-5, rtol=1e-4, fast_mode=True)


CASES = [
    pytest.param("grad_cam", vgg_like, marks=pytest.mark.slow),
    ("attribution_equilibrium", residual),
    pytest.param("a_fmi", vgg_like, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "build"), CASES)
def test_numbers_are_the_explainers(method, build):
    """And the gradient along a line is what moving the parameters along it does to `fastcam.attribute`."""
    model, x = build().double(), images(3, side=16)
    explainer = fastcam.Explainer(model, method, differentiable=True, normalize=False)
    result = explainer(x, [1, 0, 4])
    expected = fastcam.attribute(model, x, method, targets=[1, 0, 4], normalize=False)
    torch.testing.assert_close(result.maps.detach(), expected.maps, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.scores.detach(), expected.scores, rtol=1e-9, atol=1e-12)
    assert (result.layer, result.method, result.options) == (expected.layer, expected.method, expected.options)
    assert result.maps.requires_grad
    seed = torch.randn(result.maps.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((result.maps * seed).sum(), parameters, allow_unused=True)
    assert all(p.grad is None for p in parameters)
    lines = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double() for i, p in enumerate(parameters)
    ]
    slope = sum((g * line).sum() for g, line in zip(gradients, lines, strict=True) if g is not None)
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for p, line in zip(parameters, lines, strict=True):
                p.add_(line, alpha=step)
            ends.append((fastcam.attribute(model, x, method, targets=[1, 0, 4], normalize=False).maps * seed).sum())
            for p, line in zip(parameters, lines, strict=True):
                p.sub_(line, alpha=step)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-6)


BLACK = [
    ("clrp", lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.ReLU(), Pool(), nn.Linear(4, 5))),
    pytest.param("attribution_equilibrium", residual, marks=pytest.mark.slow),
    pytest.param("rap", vgg_like, marks=pytest.mark.slow),
]


class Pool(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize(("method", "build"), BLACK)
def test_black_images_leave_gradients_finite(method, build):
    """What is divided by 0 is 0, and so is its gradient: that of an image is the same beside a black one."""
    model = seeded(build).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    x = images(2, side=8)
    x[0], x[1, :, :5] = 0, 0
    explainer = fastcam.Explainer(model, method, differentiable=True)
    weights = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(8, 8)
    both, alone = (
        torch.autograd.grad((explainer(batch, 1).maps * weights).sum(), list(model.parameters()), allow_unused=True)
        for batch in (x, x[1:])
    )
    assert sum(float(gradient.abs().sum()) for gradient in alone if gradient is not None) > 0.01
    torch.testing.assert_close(both, alone, rtol=1e-9, atol=1e-12)


def test_errors():
    model = vgg_like()
    with pytest.raises(fastcam.ExportError, match=r"score_cam.*no straight line"):
        fastcam.Explainer(model, "score_cam", differentiable=True)(images(2, side=16).float())
    explainer = fastcam.Explainer(model, "grad_cam", differentiable=True)
    bad = images(2, side=16).float()
    with torch.autocast("cpu", torch.bfloat16):  # has no say
        found = explainer(bad, 1)
    assert found.maps.requires_grad
    assert torch.equal(found.scores, model(bad))
    with pytest.raises(ValueError, match=r"targets of shape \(1,\) do not fit a batch of 2"):
        explainer(bad, [1])
    bad[1] = torch.nan
    with pytest.raises(ValueError, match="image 1 are not finite"):
        explainer(bad, 1)


def test_the_documented_example_learns_where_to_look():
    text = (Path(__file__).parents[1] / "docs" / "training-with-maps.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict = {}
    exec(code, found)
    assert found["outside"][-1] < found["outside"][0] - 0.1
    assert found["model"].training is False
