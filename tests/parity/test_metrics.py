"""Metrics against those of TorchCAM, pytorch-grad-cam, Quantus and Captum, where the definitions agree."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastcam import metrics
from fastcam._testing.models import seeded, torchvision_models

pytestmark = pytest.mark.peers

with contextlib.suppress(ImportError):  # peers import torchvision, which may need help beside a CPU-only torch
    torchvision_models()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6),
        )
    )  # fmt: skip
    with torch.no_grad():
        net[-1].weight.mul_(40)  # probabilities that differ
    return net.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def maps() -> Tensor:
    """Smooth, different at every pixel, in [0, 1] with both ends."""
    coarse = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fine = nn.functional.interpolate(coarse, (32, 32), mode="bilinear")[:, 0]
    fine = fine + 1e-4 * torch.rand(fine.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = fine.amin((1, 2), keepdim=True), fine.amax((1, 2), keepdim=True)
    return ((fine - low) / (high - low)).float()


TARGETS = [3, 0, 5, 2]


class Extractor:
    """TorchCAM's protocol around maps that are there already."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, class_idx: object = None, scores: object = None, **_: object) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def test_torchcam_drop_and_increase(model, images, maps):
    peer = pytest.importorskip("torchcam.metrics")
    metric = peer.ClassificationMetric(Extractor(model, maps), lambda logits: logits.softmax(-1))
    metric.update(images, TARGETS)
    found = metrics.confidence(model, images, maps, TARGETS)
    want = metric.summary()
    assert 0 < want["avg_drop"] < 1
    assert found.drop.mean().item() == pytest.approx(want["avg_drop"], rel=1e-4)
    assert found.increase.mean().item() == want["conf_increase"]


@pytest.mark.parametrize("steps", [8, 20, 50])
@pytest.mark.parametrize("blank", [0.0, 0.7])
def test_torchcam_insertion_and_deletion(model, images, maps, steps, blank):
    peer = pytest.importorskip("torchcam.metrics")
    baseline = torch.full((1, 3, 32, 32), blank)
    metric = peer.DeletionInsertionMetric(
        Extractor(model, maps), lambda logits: logits.softmax(-1), steps=steps, baseline=baseline
    )
    metric.update(images, TARGETS)
    insertion, deletion = metrics.insertion_deletion(model, images, maps, TARGETS, steps=steps, baseline=baseline)
    want = metric.summary()
    assert insertion.auc.mean().item() == pytest.approx(want["insertion_auc"], rel=1e-5)
    assert deletion.auc.mean().item() == pytest.approx(want["deletion_auc"], rel=1e-5)


def test_pytorch_grad_cam_road(model, images, maps, monkeypatch):
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # the peer's noise cannot be switched off
    targets = [ClassifierOutputSoftmaxTarget(target) for target in TARGETS]
    want = road.ROADCombined()(images, maps.numpy(), targets, model)
    found = metrics.road(model, images, maps, TARGETS, noise=0)
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(found.numpy(), want, atol=2e-5)
    most = road.ROADMostRelevantFirstAverage()(images, maps.numpy(), targets, model)
    score = metrics.confidence(model, images, maps, TARGETS).score
    curve = metrics.road_curve(model, images, maps, TARGETS, noise=0)
    np.testing.assert_allclose((curve.scores.mean(1) - score).numpy(), most, atol=2e-5)


def quantus(name: str, **options: object):
    module = pytest.importorskip("quantus")
    return getattr(module, name)(normalise=False, disable_warnings=True, **options)


def called(metric: object, model: nn.Module, images: Tensor, maps: Tensor, masks: Tensor | None = None):
    return metric(
        model=model, x_batch=images.numpy(), y_batch=np.array(TARGETS), a_batch=maps.unsqueeze(1).numpy(),
        s_batch=None if masks is None else masks.unsqueeze(1).numpy(), channel_first=True, device="cpu",
    )  # fmt: skip


def test_quantus_pixel_flipping(model, images, maps):
    # Its features are single values: the three of a pixel have one attribution and fall together.
    metric = quantus("PixelFlipping", features_in_step=32, perturb_baseline=0.0)
    want = np.array(called(metric, model, images, maps))[:, 2::3]
    _, deletion = metrics.insertion_deletion(model, images, maps, TARGETS, steps=32)
    np.testing.assert_allclose(deletion.scores[:, 1:].numpy(), want, rtol=1e-3, atol=1e-5)


def test_quantus_localisation(model, images, maps):
    masks = torch.zeros(4, 32, 32, dtype=torch.bool)
    masks[0, 3:9, 4:30], masks[1, 20:, :16], masks[2, :, 25:] = True, True, True
    masks[3].view(-1)[maps[3].argmax()] = True
    want = called(quantus("PointingGame"), model, images, maps, masks)
    assert metrics.pointing_game(maps, masks).bool().tolist() == [bool(hit) for hit in want]
    want = called(quantus("RelevanceMassAccuracy"), model, images, maps, masks)
    np.testing.assert_allclose(metrics.energy_pointing(maps, masks).numpy(), want, rtol=1e-4)


def test_quantus_sparseness(model, images, maps):
    signed = maps - 0.4
    want = called(quantus("Sparseness", abs=True), model, images, signed)
    np.testing.assert_allclose(metrics.sparsity(signed).numpy(), want, rtol=1e-4)


def test_captum_max_sensitivity(model, images):
    peer = pytest.importorskip("captum.metrics")

    def explain(x: Tensor) -> Tensor:
        return x.abs().sum(1).square()

    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.4 - 0.2
    want = peer.sensitivity_max(
        lambda x: (explain(x[0] if isinstance(x, tuple) else x),),
        images,
        perturb_func=lambda x, *_: (
            tuple(each + noise.float() for each in x) if isinstance(x, tuple) else x + noise.float()
        ),
        perturb_radius=0.2,
        n_perturb_samples=1,
    )
    found = metrics.max_sensitivity(lambda x, _: explain(x), images, 0, radius=0.2, samples=1)
    np.testing.assert_allclose(found.numpy(), want.numpy(), rtol=1e-4)
