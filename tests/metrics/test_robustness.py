"""Max-sensitivity where it is known in closed form; randomisation against a loop over a copy's layers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import fastcam
from fastcam import metrics

from .conftest import network


def noises(count: int, shape: tuple[int, ...], radius: float, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator, dtype=torch.float64) * 2 * radius - radius for _ in range(count)]


def test_max_sensitivity_of_a_linear_map(images):
    def explain(x, targets):
        return x.mean(1) * targets.reshape(-1, 1, 1)  # moves by the noise's mean, whatever the image

    targets = torch.tensor([1.0, 2, 0])
    shifts = torch.stack([noise.mean(0).norm() for noise in noises(4, (3, 6, 7), 0.3)])
    settings = {"radius": 0.3, "samples": 4}
    nothing = metrics.max_sensitivity(explain, images, targets, relative_to="nothing", **settings)
    torch.testing.assert_close(nothing, targets.double() * shifts.max())
    relative = metrics.max_sensitivity(explain, images, targets, **settings)
    torch.testing.assert_close(relative[:2], shifts.max() / images.mean(1).flatten(1).norm(dim=1)[:2])
    assert relative[2].isnan()
    image = metrics.max_sensitivity(explain, images, targets, relative_to="image", **settings)
    torch.testing.assert_close(image, nothing / images.flatten(1).norm(dim=1))
    alone = metrics.max_sensitivity(explain, images[1:2], targets[1:2], **settings)
    torch.testing.assert_close(alone, relative[1:2])


def test_max_sensitivity_keeps_the_class_it_found(model, images):
    explainer = fastcam.Explainer(model, "grad_cam", layer="features")
    found = metrics.max_sensitivity(explainer, images, radius=3.0, samples=3)
    first = explainer(images)
    moved = [explainer(images + noise, first.targets).maps for noise in noises(3, (3, 6, 7), 3.0)]
    want = torch.stack([(each - first.maps).flatten(1).norm(dim=1) for each in moved]).amax(0)
    torch.testing.assert_close(found, (want / first.maps.flatten(1).norm(dim=1)).double())
    changed = [explainer(images + noise).targets for noise in noises(3, (3, 6, 7), 3.0)]
    assert any(not torch.equal(each, first.targets) for each in changed)  # else the test shows nothing
    with pytest.raises(ValueError, match="radius must be positive; got 0"):
        metrics.max_sensitivity(explainer, images, radius=0)
    with pytest.raises(ValueError, match="relative_to must be"):
        metrics.max_sensitivity(explainer, images, relative_to="norm")
    with pytest.raises(TypeError, match="explain must return maps"):
        metrics.max_sensitivity(lambda x, t: x[:1], images)


@pytest.mark.parametrize("order", ["top_down", "bottom_up"])
@pytest.mark.parametrize("init", ["reset", "xavier"])
def test_randomisation_equals_a_loop(images, order, init):
    from scipy.stats import spearmanr

    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seed = torch.random.get_rng_state()
    found = metrics.cascading_randomisation(
        model, images, method="grad_cam", layer="features.2", order=order, init=init
    )
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    names = ["features.0", "features.1", "fc"]
    assert list(found.layers) == (names[::-1] if order == "top_down" else names)
    first = fastcam.attribute(model, images, "grad_cam", layer="features.2", normalize=False)
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    for step, name in enumerate(found.layers):
        part = twin.get_submodule(name)
        if init == "reset":
            buffers = {key: value.clone() for key, value in part.named_buffers()}
            part.reset_parameters()
            part.load_state_dict(buffers, strict=False)
        else:
            with torch.no_grad():
                for value in part.parameters():
                    drawn = torch.rand(value.shape)
                    if value.ndim > 1:
                        fan = (value.shape[0] + value.shape[1]) * math.prod(value.shape[2:])
                        drawn = (2 * drawn - 1) * math.sqrt(6 / fan)
                    value.copy_(drawn)
        again = fastcam.attribute(twin, images, "grad_cam", layer="features.2", normalize=False, targets=first.targets)
        for i in range(3):
            a, b = first.maps[i].numpy().ravel(), again.maps[i].numpy().ravel()
            want = spearmanr(a, b).statistic if a.std() > 0 and b.std() > 0 else math.nan
            assert found.similarity[step, i].item() == pytest.approx(want, abs=1e-6, nan_ok=True)
    torch.random.set_rng_state(seed)


def test_a_method_that_ignores_the_network_is_found_out(images):
    ignorant = metrics.cascading_randomisation(network(), images, method=lambda model: lambda x, t: -x.abs().sum(1))
    np.testing.assert_allclose(ignorant.similarity.numpy(), 1)
    signed = metrics.cascading_randomisation(
        network(), images, 1, method=lambda model: lambda x, t: x[:, 0] * (1 if model.fc.bias[0] > 0 else -1), seed=1
    )
    magnitude = metrics.cascading_randomisation(
        network(), images, 1, method=lambda model: lambda x, t: x[:, 0] * model.fc.bias[0].sign(), magnitude=True
    )
    np.testing.assert_allclose(signed.similarity.abs().numpy(), 1)
    np.testing.assert_allclose(magnitude.similarity.numpy(), 1)


def test_randomisation_of_a_module_without_its_own_initialisation(images):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64))

        def forward(self, x):
            return (x * self.scale.reshape(1, 3, 1, 1)).mean((2, 3))

    seen = []

    def bind(model):
        def explain(x, targets):
            assert not model.scale.is_inference()
            seen.append(model.scale.detach().clone())
            return x[:, 0]

        return explain

    model = Scaled().eval()
    with torch.inference_mode():
        metrics.cascading_randomisation(model, images, 0, method=bind)
    assert len(seen) == 2
    assert not torch.equal(*seen)
    assert abs(seen[1].mean() - 3) < 3
    with pytest.raises(ValueError, match="no parameters"):
        metrics.cascading_randomisation(nn.ReLU(), images)
    with pytest.raises(TypeError, match="layer go with a method's name"):
        metrics.cascading_randomisation(network(), images, method=bind, layer="fc")
    with pytest.raises(ValueError, match="order must be"):
        metrics.cascading_randomisation(network(), images, order="sideways")
    with pytest.raises(ValueError, match="init must be"):
        metrics.cascading_randomisation(network(), images, init="zeros")
