"""What counts as a change of the model: fingerprints, by C++ and by Python."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from fastcam import _extension
from fastcam.program.state import fingerprint, training


class Mode(str):
    """A setting of the user's own class."""


class Setting(nn.Module):
    def __init__(self):
        super().__init__()
        self.flag, self.number, self.ratio, self.word, self.mode = True, 3, 0.5, "same", Mode("one")
        self.sizes, self.parts, self.dtype, self.rule = (1, 2), [1.0, None], torch.float32, torch.relu
        self.scale = torch.ones(1).as_subclass(torch.Tensor)
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
        self.ignored = {"not": "seen"}


CHANGES = {
    "flag": lambda m: setattr(m, "flag", 1),
    "number": lambda m: setattr(m, "number", 3.0),
    "ratio": lambda m: setattr(m, "ratio", 0.25),
    "word": lambda m: setattr(m, "word", "other"),
    "own class": lambda m: setattr(m, "mode", Mode("two")),
    "tuple": lambda m: setattr(m, "sizes", (1, 2, 3)),
    "list in place": lambda m: m.parts.append(1.0),
    "dtype": lambda m: setattr(m, "dtype", torch.float64),
    "callable": lambda m: setattr(m, "rule", torch.sigmoid),
    "tensor": lambda m: setattr(m, "scale", torch.ones(1)),
    "method": lambda m: setattr(m, "forward", lambda x: x),
    "new setting": lambda m: setattr(m, "new", None),
    "setting within": lambda m: setattr(m.inner[0], "stride", (2, 2)),
    "module replaced": lambda m: m.inner.__setitem__(1, nn.ReLU()),
    "module added": lambda m: m.inner.append(nn.ReLU()),
    "module twice": lambda m: m.inner.append(m.inner[1]),
    "module gone": lambda m: m.inner.__delitem__(1),
    "module None": lambda m: setattr(m, "inner", None),
    "module renamed": lambda m: (m.add_module("outer", m.inner), delattr(m, "inner")),
    "class": lambda m: setattr(m.inner[1], "__class__", nn.Sigmoid),
    "bias": lambda m: setattr(m.inner[0], "bias", nn.Parameter(torch.zeros(4))),
    "hook": lambda m: m.inner[1].register_forward_hook(lambda *args: None),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda *args: None),
}
SAME = {
    "nothing": lambda m: None,
    "weights": lambda m: m.inner[0].weight.data.zero_(),
    "weight replaced": lambda m: setattr(m.inner[0], "weight", nn.Parameter(torch.zeros(4, 3, 3, 3))),
    "mode": lambda m: m.train(),
    "what is in a dictionary": lambda m: m.ignored.clear(),
}


@pytest.fixture(params=["C++", "Python"])
def way(request, monkeypatch):
    if request.param == "C++":
        if _extension.why_not() is not None:
            pytest.skip(_extension.why_not())
    else:
        monkeypatch.setattr(_extension, "why_not", lambda: "as if it were missing")


@pytest.mark.parametrize("change", CHANGES)
def test_changes_change_the_fingerprint(way, change):
    model = Setting()
    before = fingerprint(model)
    CHANGES[change](model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("change", SAME)
def test_what_is_no_change(way, change):
    model = Setting()
    before = fingerprint(model)
    SAME[change](model)
    assert fingerprint(model) == before


def test_no_two_models_share_one_even_at_an_address_used_before(way):
    found = set()
    for _ in range(20):
        model = Setting()
        found.add(fingerprint(model))
        found.add(fingerprint(copy.deepcopy(model)))
        del model
        gc.collect()
    assert len(found) == 40


def test_training_is_that_of_any_module(way):
    model = Setting().eval()
    assert not training(model)
    model.inner[1].training = True
    assert training(model)


def test_models_that_contain_themselves_and_scripted_ones(way):
    model = Setting()
    model.inner.add_module("around", model)
    assert fingerprint(model) == fingerprint(model)
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    assert fingerprint(scripted) == fingerprint(scripted)
    assert not training(scripted)
