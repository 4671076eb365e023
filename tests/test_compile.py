"""`torch.compile(explainer)`: one graph without breaks, the explainer's own numbers, weights of the moment."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastcam
from fastcam._testing.models import gap_linear, residual, vgg_like
from fastcam.program.relevance import COMPOSITES


def images(count: int, seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def equal(found: fastcam.Attribution, expected: fastcam.Attribution) -> None:
    """To what other orders of summation make of float32."""
    assert type(found) is type(expected)
    for name in ("maps", "scores", "weights", "delta"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            assert not one.requires_grad
    assert torch.equal(found.targets, expected.targets)
    assert torch.equal(found.valid, expected.valid)
    assert (found.layer, found.method, found.options) == (expected.layer, expected.method, expected.options)


#: Closed-form CAM methods, LIFT-CAM, A-FMI, relevance by every composite, Attribution Equilibrium, and their relatives.
CASES = [
    ("grad_cam", vgg_like, {}),
    ("lift_cam", gap_linear, {}),
    ("attribution_equilibrium", residual, {}),
    ("lrp", residual, {}),
]
SLOW = [
    *((name, vgg_like, {}) for name in ("lift_cam", "a_fmi", "hires_cam")),
    *((name, gap_linear, {}) for name in ("cam", "grad_cam", "a_fmi")),
    *((name, residual, {}) for name in ("grad_cam_pp", "xgrad_cam", "layer_cam", "eigen_cam", "eigen_grad_cam")),
    *((name, residual, {}) for name in ("smooth_grad_cam_pp", "deep_lift", "relevance_cam", "clrp", "sglrp", "rap")),
    *((name, vgg_like, {}) for name in ("guided_backprop", "deconvnet", "full_grad", "attribution_equilibrium")),
    *(("lrp", vgg_like, {"composite": name}) for name in COMPOSITES if "box" not in name),
    ("lrp", residual, {"composite": "epsilon_gamma_box", "low": -3.0, "high": 3.0}),
]


@pytest.mark.parametrize(
    ("method", "build", "options"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_one_graph_with_the_explainers_numbers(method, build, options):
    explainer = fastcam.Explainer(build(), method, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(explainer, fullgraph=True, backend=counter)
    for count in (2, 3, 5):
        equal(compiled(images(count, seed=count)), explainer(images(count, seed=count)))
    assert counter.frame_count == 2  # once for two images, once for any number
    targets = torch.tensor([3, 1, 0])
    equal(compiled(images(3), targets), explainer(images(3), targets))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grad_cam", "lift_cam", "a_fmi", "lrp", "attribution_equilibrium"])
def test_inductor(method):
    explainer = fastcam.Explainer(residual(), method)
    compiled = torch.compile(explainer, fullgraph=True, dynamic=True)
    for count in (2, 5):
        equal(compiled(images(count, seed=count)), explainer(images(count, seed=count)))


@pytest.mark.parametrize("targets", [2, [1, 2], torch.tensor([[1, 2], [0, 4]]), "top2", None], ids=str)
def test_targets(targets):
    explainer = fastcam.Explainer(vgg_like(), "lift_cam")
    compiled = torch.compile(explainer, fullgraph=True, backend="eager")
    equal(compiled(images(2), targets), explainer(images(2), targets))


def test_a_callable_target_and_any_number_of_images():
    explainer = fastcam.Explainer(vgg_like(), "grad_cam")
    compiled = torch.compile(explainer, fullgraph=True, backend="eager")

    def score(output: torch.Tensor) -> torch.Tensor:
        return output[:, 1] - output[:, 0]

    found = compiled(images(2), score)
    torch.testing.assert_close(found.maps, explainer(images(2), score).maps, rtol=0, atol=1e-5)
    assert found.targets is score
    for count in (1, 0):
        equal(compiled(images(count)), explainer(images(count)))


def test_it_is_traced_into_what_calls_it():
    """Another size of images and what surrounds the call are one graph too; `nn.Module`s may hold an explainer."""

    class Served(nn.Module):
        def __init__(self):
            super().__init__()
            self.explainer = fastcam.Explainer(gap_linear(), "grad_cam", size=(7, 9))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.explainer((pixels - 0.5) / 0.25).maps.mean(0)

    served = Served()
    compiled = torch.compile(served, fullgraph=True, backend="aot_eager")
    for side in (16, 12):
        pixels = images(2, side=side).sigmoid()
        torch.testing.assert_close(compiled(pixels), served(pixels), rtol=0, atol=1e-5)


def test_weights_are_read_at_every_call():
    model = residual()
    explainer = fastcam.Explainer(model, "grad_cam")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(explainer, fullgraph=True, backend=counter)
    before = compiled(images(2)).maps
    with torch.no_grad():
        model.head[0].weight.mul_(-2)
    model.features.stem.weight = nn.Parameter(-model.features.stem.weight.detach())
    found = compiled(images(2))
    assert (found.maps - before).abs().max() > 0.1
    equal(found, explainer(images(2)))
    assert counter.frame_count == 1


def test_differentiable():
    model = vgg_like()
    explainer = fastcam.Explainer(model, "grad_cam", differentiable=True, normalize=False)
    compiled = torch.compile(explainer, fullgraph=True, backend="aot_eager")
    weight = model.head[2].weight
    found, expected = (
        torch.autograd.grad(run(images(3), [1, 0, 4]).maps.square().sum(), weight)[0] for run in (compiled, explainer)
    )
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_what_it_cannot_explain():
    """Numbers raise nothing in compiled code; what is no straight line is an error that says so."""
    explainer = fastcam.Explainer(gap_linear(), "grad_cam")
    compiled = torch.compile(explainer, fullgraph=True, backend="eager")
    compiled(images(3), torch.tensor([0, 1, 2]))
    batch = images(3)
    batch[1, 0, 0, 0] = torch.nan
    found = compiled(batch, torch.tensor([0, 1, 7]))
    assert found.valid.tolist() == [True, False, False]
    assert (found.maps[1:] == 0).all()
    with pytest.raises(Exception, match=r"score_cam.*is no straight line of operators"):
        torch.compile(fastcam.Explainer(gap_linear(), "score_cam"), fullgraph=True, backend="eager")(images(2))
    with pytest.raises(Exception, match="do not fit a batch of 3"):
        compiled(images(3), torch.tensor([0, 1]))
    with pytest.raises(Exception, match=r"targets must hold integers, got torch\.float32"):
        compiled(images(2), torch.tensor([0.5, 1]))
    with pytest.raises(Exception, match="cannot raise on numbers"):
        torch.compile(fastcam.Explainer(gap_linear(), "grad_cam", on_nonfinite="raise"), backend="eager")(images(2))
