"""What the DeepLIFT walk refuses, what its errors say, and the rules users register. Float64."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastcam
from fastcam._testing.rescale import ReadOut, complete, draw, multipliers
from fastcam.program import rescale

MAP = (4, 6, 7)


@pytest.fixture(autouse=True)
def _rules(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(rescale, "_registered", {})


CHOICES = {
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "mask": lambda x: x * (x > 0).to(x.dtype),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "gather": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
}


@pytest.mark.parametrize("name", list(CHOICES))
def test_choices_that_features_make_are_refused(name):
    """What is picked would change between image and reference, and the sum with it."""
    net = ReadOut(CHOICES[name], MAP)
    with pytest.raises(fastcam.UnsupportedOpError, match=r"depends on \w+, a choice that the features make"):
        multipliers(net, draw(2, *MAP), draw(2, *MAP, seed=1))


@pytest.mark.parametrize("mask", [torch.ones(5, 5, dtype=torch.float64).tril(), "causal"])
def test_masked_attention_is_refused(mask):
    options = {"is_causal": True} if mask == "causal" else {"attn_mask": mask}
    net = ReadOut(lambda x: F.scaled_dot_product_attention(x, x, x, **options), (1, 5, 6))
    with pytest.raises(fastcam.UnsupportedOpError, match=r"scaled_dot_product_attention \(attention with a mask"):
        multipliers(net, draw(2, 1, 5, 6), draw(2, 1, 5, 6, seed=1))


def test_a_function_that_broadcasts_is_refused():
    net = ReadOut(lambda x: x[:, :1].abs().pow(torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)[:, None, None]), MAP)
    with pytest.raises(
        fastcam.UnsupportedOpError, match=r"aten::pow \(a function of one tensor that changes its shape"
    ):
        multipliers(net, draw(2, *MAP), draw(2, *MAP, seed=1))


def test_a_batch_norm_on_the_batch_is_refused():
    net = ReadOut(nn.BatchNorm2d(4, track_running_stats=False), MAP)
    with pytest.raises(fastcam.UnsupportedOpError, match="batch_norm"):
        multipliers(net, draw(2, *MAP), draw(2, *MAP, seed=1))


# --- steps without a rule, and how to cure them ---


@torch.library.custom_op("fastcam_test::swoosh", mutates_args=())
def swoosh(x: torch.Tensor) -> torch.Tensor:
    return x * x.tanh()


swoosh.register_fake(torch.empty_like)
swoosh.register_autograd(
    lambda ctx, g: g * (ctx.saved_tensors[0].tanh() + ctx.saved_tensors[0] * (1 - ctx.saved_tensors[0].tanh() ** 2)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Strange(nn.Module):
    """A step of an unknown library between known ones."""

    def __init__(self, step):
        super().__init__()
        self.inner = step
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return F.relu(self.inner(self.conv(x)))


def strange(step) -> nn.Module:
    torch.manual_seed(0)
    return ReadOut(Strange(step), MAP)


class Swoosh(nn.Module):
    def forward(self, x):
        return swoosh(x)


class Product(nn.Module):
    def forward(self, x):
        return x.cumprod(1)


@pytest.mark.parametrize(
    ("step", "operator", "line"),
    [(Swoosh(), "fastcam_test::swoosh", "return swoosh(x)"), (Product(), "aten::cumprod", "return x.cumprod(1)")],
)
def test_an_unknown_step_names_node_module_line_and_cure(step, operator, line):
    with pytest.raises(fastcam.UnsupportedOpError) as caught:
        multipliers(strange(step), draw(2, *MAP), draw(2, *MAP, seed=1))
    text, name = str(caught.value), operator.split("::")[1]
    assert f"no DeepLIFT rule for {operator} at {name} ({name}) in module 'step.inner'" in text
    assert f'fastcam.register_rescale_rule("{operator}", "elementwise")' in text
    file, number = re.search(r", (\S+test_rescale_registry\.py):(\d+)", text).groups()
    with open(file) as source:
        assert line in source.readlines()[int(number) - 1]


def test_the_error_comes_before_the_method_runs_and_is_the_same_for_all_methods():
    net, x = strange(Swoosh()).float(), draw(2, *MAP, dtype=torch.float32)
    for method, layer in (("lift_cam", "step.conv"), ("a_fmi", "step.conv"), ("deep_lift", None)):
        with pytest.raises(fastcam.UnsupportedOpError, match="fastcam_test::swoosh"):
            fastcam.attribute(net, x, method, layer=layer, mean=[0.0] * 4, std=[1.0] * 4)


def by_secants(step, given):
    (u, u_reference), (v, v_reference) = step.operand(), step.result()
    return {step.source(): given * (v - v_reference) / (u - u_reference)}


@pytest.mark.parametrize("rule", ["elementwise", by_secants, rescale.Rule(by_secants, output=True)])
def test_a_registered_rule_cures_it(rule):
    net = strange(Swoosh())
    with pytest.raises(fastcam.UnsupportedOpError):
        complete(net, MAP)
    fastcam.register_rescale_rule("fastcam_test::swoosh", rule)
    complete(net, MAP)
    fastcam.register_rescale_rule("fastcam_test::swoosh", "affine")  # wrong on purpose: the newest rule counts
    x, reference = draw(2, *MAP, seed=1), draw(2, *MAP, seed=2)
    _, contributions, difference = multipliers(net, x, reference)
    assert (contributions.flatten(1).sum(1) - difference).abs().max() > 1e-3


def test_a_registered_affine_rule():
    grid = torch.linspace(-1, 1, 24).double().reshape(1, 3, 4, 2)
    net = strange(lambda x: F.grid_sample(x, grid.expand(x.shape[0], -1, -1, -1), align_corners=False))
    with pytest.raises(fastcam.UnsupportedOpError, match="aten::grid_sampler"):
        complete(net, MAP)
    fastcam.register_rescale_rule("aten::grid_sampler", "affine")
    complete(net, MAP)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ("smooth", ValueError, r"rule must be one of 'affine', 'elementwise', 'product' or a callable; got 'smooth'"),
        (3, TypeError, "rule must be a text, a callable or a Rule; got int"),
        (None, TypeError, "NoneType"),
    ],
)
def test_bad_rules_are_refused(rule, error, message):
    with pytest.raises(error, match=message):
        fastcam.register_rescale_rule("aten::cumprod", rule)


@pytest.mark.parametrize("operator", ["", "cumprod", 3])
def test_bad_operator_names_are_refused(operator):
    with pytest.raises((TypeError, ValueError), match=r'named as the error names it, like "aten::cumprod"'):
        fastcam.register_rescale_rule(operator, "elementwise")


def test_an_error_inside_a_rule_names_the_step():
    def broken(step, given):
        raise KeyError("oops")

    fastcam.register_rescale_rule("fastcam_test::swoosh", broken)
    with pytest.raises(RuntimeError, match=r"KeyError: 'oops'\nin the DeepLIFT rule of swoosh .* 'step.inner'"):
        complete(strange(Swoosh()), MAP)


def test_a_score_that_does_not_depend_on_the_layer():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            y, z = self.a(x).relu().mean((2, 3)), self.b(x).relu().mean((2, 3))
            return self.fc(y), z

    x = draw(2, *MAP, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="does not depend on"):
        fastcam.attribute(Aside().eval(), x, "lift_cam", layer="b", targets=lambda output: output[0][:, 0])
