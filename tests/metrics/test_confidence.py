"""Average drop, increase and drop in deletion against loops over images, and by hand."""

from __future__ import annotations

import contextlib
import math
import warnings

import pytest
import torch
from torch import nn

from fastcam import metrics

READ = {
    "probability": lambda logits, c: logits.softmax(-1)[c],
    "sigmoid": lambda logits, c: logits.sigmoid()[c],
    "logit": lambda logits, c: logits[c],
}


class Sums(nn.Module):
    """Logits: the sums of the images' two channels."""

    def forward(self, images):
        return images.flatten(2).sum(2)


@pytest.mark.parametrize("output", READ)
def test_equals_a_loop_over_images(model, images, maps, targets, output):
    found = metrics.confidence(model, images, maps, targets, output=output, chunk=2)
    with torch.no_grad():
        for i, (x, s, c) in enumerate(zip(images, maps, targets, strict=True)):
            y, o, d = (READ[output](model(each[None])[0], c).item() for each in (x, x * s, x * (1 - s)))
            positive = output != "logit" or y > 0
            want = {
                "drop": max(0, y - o) / y if positive else math.nan,
                "increase": float(o > y),
                "deletion_drop": (y - d) / y if positive else math.nan,
                "score": y,
                "kept": o,
                "deleted": d,
            }
            got = {name: getattr(found, name)[i].item() for name in want}
            assert got == pytest.approx(want, rel=1e-12, abs=1e-12, nan_ok=True)
    single = (metrics.average_drop, metrics.increase_in_confidence, metrics.average_drop_in_deletion)
    for function, values in zip(single, (found.drop, found.increase, found.deletion_drop), strict=True):
        torch.testing.assert_close(function(model, images, maps, targets, output=output), values, equal_nan=True)


def test_all_and_nothing(model, images, targets):
    everything = metrics.confidence(model, images, torch.ones(3, 6, 7), targets)
    nothing = metrics.confidence(model, images, torch.zeros(3, 6, 7), targets)
    blank = model(torch.zeros(1, 3, 6, 7, dtype=torch.float64)).detach().softmax(1)[0, targets]
    assert everything.drop.tolist() == [0, 0, 0]
    assert everything.increase.tolist() == [0, 0, 0]
    torch.testing.assert_close(everything.deleted, blank)
    torch.testing.assert_close(nothing.kept, everything.deleted)
    torch.testing.assert_close(nothing.deleted, everything.kept)


def test_by_hand():
    images = torch.tensor([[[[4.0, 2.0]], [[0.0, 2.0]]]])
    maps = torch.tensor([[[1.0, 0.5]]])
    # Class 0: Y = 6, O = 4 + 1, D = 0 + 1.
    found = metrics.confidence(Sums().eval(), images, maps, 0, output="logit")
    assert found.drop.item() == pytest.approx(1 / 6)
    assert found.deletion_drop.item() == pytest.approx(5 / 6)
    assert metrics.increase_in_confidence(Sums().eval(), images, maps, 0, output="logit").item() == 0
    # Softmax: log-odds 6 - 2 = 4, 5 - 1 = 4, 1 - 1 = 0.
    p = 1 / (1 + math.exp(-4))
    found = metrics.confidence(Sums().eval(), images, maps, 0)
    assert found.drop.item() == pytest.approx(0, abs=1e-12)
    assert found.deletion_drop.item() == pytest.approx((p - 0.5) / p)


def test_a_probability_that_underflows_still_has_a_drop():
    images = torch.tensor([[[[0.0, 1.0]], [[900.0, 0.0]]]], dtype=torch.float64)
    # Class 0 has log-probability 1 - 900; with the second pixel gone, 0 - 900.
    drop = metrics.average_drop(Sums().eval(), images, torch.tensor([[[1.0, 0.0]]]), 0)
    assert drop.item() == pytest.approx(1 - math.exp(-1))


def test_negative_evidence_hides_and_sizes_are_adapted(model, images, maps, targets):
    signed = maps - (maps < 0.3).double() * 0.9
    found = metrics.average_drop(model, images, signed, targets)
    torch.testing.assert_close(found, metrics.average_drop(model, images, signed.clamp(min=0), targets))
    small = maps[:, :3, :4].contiguous()
    resized = nn.functional.interpolate(small[:, None], (6, 7), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(
        metrics.average_drop(model, images, small, targets), metrics.average_drop(model, images, resized, targets)
    )


def test_several_targets_are_as_many_calls(model, images, maps, targets):
    both = torch.stack([targets, (targets + 1) % 5], 1)
    stacked = torch.stack([maps, maps.flip(1)], 1)
    for function in (metrics.average_drop, metrics.insertion_auc, metrics.road):
        found = function(model, images, stacked, both)
        assert found.shape == (3, 2)
        for t in range(2):
            torch.testing.assert_close(found[:, t], function(model, images, stacked[:, t], both[:, t]))


def test_an_unusable_map_is_left_out_alone(model, images, maps, targets):
    broken = maps.clone()
    broken[1, 0, 0] = math.nan
    for function in (metrics.average_drop, metrics.insertion_auc, metrics.road):
        found, clean = function(model, images, broken, targets), function(model, images, maps, targets)
        assert found.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(found[[0, 2]], clean[[0, 2]])
    large = maps.repeat_interleave(3, 1).repeat_interleave(3, 2)
    large[1, 0, 0] = math.nan  # which resizing passes by: it reads every third place
    found = metrics.average_drop(model, images, large, targets)
    assert found.isnan().tolist() == [False, True, False]


def test_errors(model, images, maps, targets):
    with pytest.raises(ValueError, match=r"at most 1; got 3\b"):
        metrics.average_drop(model, images, 3 * maps, targets)
    with pytest.raises(IndexError, match="target 5 is out of range"):
        metrics.average_drop(model, images, maps, 5)
    with pytest.raises(ValueError, match=r"targets of shape \(2,\) do not fit a batch of 3"):
        metrics.average_drop(model, images, maps, [0, 1])
    with pytest.raises(ValueError, match="give each map its target"):
        metrics.average_drop(model, images, maps, "top2")
    with pytest.raises(ValueError, match="output must be one of probability, sigmoid, logit; got 'softmax'"):
        metrics.average_drop(model, images, maps, targets, output="softmax")
    with pytest.raises(ValueError, match="pass output='logit'"):
        metrics.average_drop(model, images, maps, lambda output: output[:, 0])
    with pytest.raises(ValueError, match=r"maps of shape \(2, 6, 7\) do not fit images"):
        metrics.average_drop(model, images, maps[:2], targets)
    with pytest.raises(TypeError, match="maps must be a floating point tensor"):
        metrics.average_drop(model, images, maps > 0.5, targets)
    single = nn.Sequential(model, nn.Linear(5, 1)).double().eval()
    with pytest.raises(ValueError, match="softmax is 1 whatever the image shows: pass output='sigmoid', or 'logit'"):
        metrics.average_drop(single, images, maps)
    assert metrics.average_drop(single, images, maps, output="sigmoid").isfinite().all()
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        metrics.average_drop(model, images, maps, targets, chunk=0)
    with pytest.raises(ValueError, match="at least one"):
        metrics.average_drop(model, images[:0], maps[:0], targets[:0])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        metrics.average_drop(lambda x: x, images, maps, targets)


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Interrupted(nn.Module):
    """Counts its calls in a buffer and fails at one of them."""

    def __init__(self, model: nn.Module, fail_at: int) -> None:
        super().__init__()
        self.inner, self.fail_at = model, fail_at
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        assert not self.inner.training
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the cat pulled the plug")
        return self.inner(images)


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_the_model_is_left_as_it_was(model, images, maps, targets, fail_at):
    outer = Interrupted(model, fail_at).train()
    outer.inner.fc.eval()
    before = {name: value.clone() for name, value in outer.state_dict().items()}
    flags = [module.training for module in outer.modules()]
    seed = torch.random.get_rng_state()
    for function in (metrics.confidence, metrics.insertion_deletion, metrics.most_relevant_first, metrics.road):
        if fail_at:
            with _quiet(), pytest.raises(RuntimeError, match="plug"):
                function(outer, images, maps, targets, chunk=2)
        else:
            with _quiet():
                got = function(outer, images, maps, targets, chunk=2)
            model.eval()
            for a, b in zip(_tensors(got), _tensors(function(model, images, maps, targets)), strict=True):
                torch.testing.assert_close(a, b)
            model.train()
            outer.inner.fc.eval()
        assert [module.training for module in outer.modules()] == flags
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in outer.modules())
        assert all(torch.equal(value, before[name]) for name, value in outer.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in outer.parameters())
    assert torch.equal(torch.random.get_rng_state(), seed)


def _tensors(found):
    if isinstance(found, tuple):
        return [tensor for each in found for tensor in _tensors(each)]
    return [found] if isinstance(found, torch.Tensor) else list(vars(found).values())
