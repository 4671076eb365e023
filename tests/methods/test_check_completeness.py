"""`check_completeness`: a rule that loses part of the score is told, rounding is not. And A-FMI's `mask`.

Oracles: the model's own scores, and gradients by autograd; float64 where nothing else is said.
"""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing.heads import HEADS, head_net, saturated
from fastcam._testing.rescale import draw
from fastcam.program import rescale

shared = functools.cache(head_net)
METHODS = ["lift_cam", "a_fmi", "deep_lift"]


@torch.library.custom_op("fastcam_test::bent", mutates_args=())
def bent(x: torch.Tensor) -> torch.Tensor:
    return x * x


bent.register_fake(torch.empty_like)
bent.register_autograd(
    lambda ctx, g: 2 * g * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Bent(nn.Module):
    """y = sum of bent(a) over the positions of each of two maps, a = 3 x."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(2, 2, 1, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(3 * torch.eye(2)[..., None, None])

    def forward(self, x):
        return bent(self.features(x)).sum((2, 3))


@pytest.fixture
def lossy(monkeypatch):
    """Half of what a bent step gives is lost on the way back."""
    monkeypatch.setattr(rescale, "_registered", {})

    def half(step, given):
        u, u_ref = step.operand()
        return {step.source(): given * (u + u_ref) / 2}

    fastcam.register_rescale_rule("fastcam_test::bent", half)
    return Bent().double().eval()


X = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).reshape(1, 1, 2, 2).repeat(2, 2, 1, 1)
X[0] = 0


def run(net, method, images=X, **options):
    layer = None if method == "deep_lift" else "features"
    reference = {} if method == "lift_cam" else {"reference": torch.zeros_like(images[:1])}
    return fastcam.attribute(net, images, method, targets=1, layer=layer, **reference, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_that_loses_half_is_told(lossy, method):
    """By hand: y = 9 (1 + 4 + 9 + 16) = 270 at image 1 and 0 at the reference, image 0; 135 is left."""
    with pytest.warns(RuntimeWarning) as warned:
        found = run(lossy, method)
    text = str(warned[0].message)
    assert re.search(r"add up to 135 where the scores of image 1 and its reference differ by 270 \(1 of 2 sums", text)
    assert "fastcam.register_rescale_rule" in text
    assert found.delta.tolist() == [0, -135]
    with pytest.raises(RuntimeError, match="135 where the scores of image 1"):
        run(lossy, method, check_completeness="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = run(lossy, method, check_completeness="off")
    assert torch.equal(silent.maps, found.maps)
    assert torch.equal(silent.delta, found.delta)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", list(HEADS))
def test_rounding_is_not_told(name, precision):
    net, x = shared(name), draw(3, 3, 12, 12, seed=1)
    for method in METHODS:
        explainer = fastcam.Explainer(
            net, method, layer="features", precision=precision, check_completeness="raise", normalize=False
        )
        assert explainer(x, [[0, 1], [2, 3], [4, 0]]).delta.shape == (3, 2)


@pytest.mark.parametrize("method", METHODS)
def test_other_choices_are_refused(method):
    with pytest.raises(ValueError, match="check_completeness must be 'warn', 'raise', 'off' or None; got 'always'"):
        fastcam.Explainer(shared("gap"), method, check_completeness="always")


# --- A-FMI's mask ---


@pytest.mark.parametrize("variant", ["mean_multiplier", "contribution"])
@pytest.mark.parametrize("name", list(HEADS))
def test_masks_of_the_target_are_gradients(name, variant):
    net, x, other = shared(name), draw(3, 3, 12, 12, seed=1), [draw(3, 3, 12, 12, seed=2), draw(3, 3, 12, 12, seed=3)]
    with torch.no_grad():
        a = net.features(x)
        bases = [net.features(one) for one in other]
        gaps = [net(x)[:, 1] - net(one)[:, 1] for one in other]
    leaf = a.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net.head(leaf)[:, 1].sum(), leaf)
    lost = [(slope * (a - base)).sum((2, 3)) for base in bases]
    expected = slope.mean((2, 3)) if variant == "mean_multiplier" else (lost[0] + lost[1]) / 2
    found = fastcam.attribute(
        net, x, "a_fmi", targets=1, layer="features", reference=other, variant=variant, mask="target"
    )
    assert found.options["mask"] == "target"
    torch.testing.assert_close(found.weights, expected, rtol=1e-10, atol=1e-12)
    delta = torch.stack([one.sum(1) - gap for one, gap in zip(lost, gaps, strict=True)]).mean(0)
    torch.testing.assert_close(found.delta, delta, rtol=1e-10, atol=1e-11)


def test_masks_of_the_target_see_nothing_in_saturation():
    """y = 1 - relu(1 - a1 - a2) between (0, 0) and (1, 1): all of the difference, 1, is lost."""
    net, x = saturated(), torch.ones(1, 2, 1, 1, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fastcam.attribute(
            net, x, "a_fmi", targets=1, layer="features", reference=torch.zeros_like(x), mask="target", normalize=False
        )
    assert found.weights.tolist() == [[0, 0]]
    assert found.delta.tolist() == [-1]


def test_another_mask_is_refused():
    with pytest.raises(ValueError, match="mask must be 'target' or None; got 'both'"):
        fastcam.Explainer(shared("gap"), "a_fmi", mask="both")
