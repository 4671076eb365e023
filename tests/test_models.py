"""Models by name."""

from __future__ import annotations

import pytest
import torch

from fastcam._testing import models
from fastcam.models import load_model


def test_a_factory_by_its_path():
    loaded = load_model("fastcam._testing.models:gap_linear")
    expected = models.gap_linear().state_dict()
    assert loaded.image_size is None
    assert not loaded.model.training
    assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())


def test_torchvision_models_have_the_same_random_weights_every_time():
    state = torch.random.get_rng_state()
    first, second = (load_model("torchvision:squeezenet1_1") for _ in range(2))
    assert first.image_size == 224
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("resnet50", ValueError, "must be torchvision:NAME"),
        ("torchvision:", ValueError, "must be torchvision:NAME"),
        ("torchvision:resnet_50", ValueError, "did you mean 'resnet50'"),
        ("testbed:tiny_resnt", ValueError, "tiny_resnet"),
        ("no.such.module:make", ValueError, "there is no module 'no'"),
        ("fastcam._testing.models:gap_linea", ValueError, "did you mean 'gap_linear'"),
        ("fastcam._testing.models:seeded", TypeError, "missing"),
        ("fastcam:methods", TypeError, "must return a torch.nn.Module; got dict"),
    ],
)
def test_what_does_not_exist_is_named(spec, error, message):
    with pytest.raises(error, match=message):
        load_model(spec)
