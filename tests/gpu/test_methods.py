"""Methods, pairs, metrics and the profiler on a GPU, by the backend in force (FASTCAM_BACKEND): what the CPU gives.

Images and random draws are made on the CPU, so both see the same; results stay on the images' device.
"""

import pytest
import torch

import fastcam
from fastcam._testing import models
from fastcam.profiling import profile

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DEVICE = "cuda"
LIMIT = 2e-3  # of maps in [0, 1] or [-1, 1]: that of fastcam.profiling for float32
METHODS = [name for name in fastcam.methods() if name not in ("sfam", "lfi_cam")]
POOLED = ("cam",)  # need a head that averages; the other methods get layers before theirs too


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Convolutions of float32 are computed as such, not in TF32, which PyTorch allows them (and no other products)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def images(batch=3, side=24, seed=0):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def on_cpu(call):
    with fastcam.backend("reference"):
        return call()


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_those_of_the_cpu(method):
    build = models.gap_linear if method in POOLED else models.vgg_like
    x, targets = images(), torch.tensor([[0, 3], [1, 1], [4, 2]])
    options = {"composite": "epsilon_plus"} if method == "lrp" else {}
    expected = on_cpu(lambda: fastcam.attribute(build(), x, method, targets=targets, **options))
    found = fastcam.attribute(build().to(DEVICE), x.to(DEVICE), method, targets=targets.to(DEVICE), **options)
    assert found.maps.device.type == DEVICE
    assert found.maps.shape == expected.maps.shape
    assert (found.maps.cpu() - expected.maps).abs().max() < LIMIT
    assert torch.allclose(found.scores.cpu(), expected.scores, atol=1e-4)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}], ids=str)
@pytest.mark.parametrize("method", ["lift_cam", "grad_cam", "lrp"])
def test_other_precisions_and_layouts(method, options):
    x = images()
    expected = on_cpu(lambda: fastcam.attribute(models.residual(), x, method))
    explainer = fastcam.Explainer(models.residual().to(DEVICE), method, **options)
    for _ in range(2):  # the second call takes what the first has kept
        maps = explainer(x.to(DEVICE)).maps.cpu()
        likeness = torch.nn.functional.cosine_similarity(maps.flatten(1), expected.maps.flatten(1))
        assert likeness.min() > (0.99 if "precision" in options else 0.9999)


def test_pairs():
    a, b = images(), images(seed=1)
    network = torch.nn.Sequential(models.residual().features, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    expected = on_cpu(lambda: fastcam.attribute_pair(network, a, b))
    found = fastcam.attribute_pair(network.to(DEVICE), a.to(DEVICE), b.to(DEVICE))
    assert (found.maps_a.cpu() - expected.maps_a).abs().max() < LIMIT
    assert torch.allclose(found.score.cpu(), expected.score, atol=1e-4)


def test_gradients_of_a_network_that_learns_to_explain():
    from fastcam.nn import LFICAM, resnet

    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model, x = LFICAM(resnet(8), 4, channels=64).to(device).eval(), images(2, 32).to(device)
        result = model(x)
        result.logits.square().sum().backward()
        found.append([result.attention.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for cpu, gpu in zip(*found, strict=True):
        assert (gpu - cpu).abs().max() <= 1e-3 * cpu.abs().max().clamp(min=1e-3)


def test_metrics():
    model, x = models.gap_linear(), images()
    maps = fastcam.attribute(model, x, "grad_cam", targets=0).maps

    def scores(device):
        made = fastcam.metrics.insertion_auc, fastcam.metrics.deletion_auc, fastcam.metrics.road
        return [metric(model.to(device), x.to(device), maps.to(device), targets=0).cpu() for metric in made]

    expected = on_cpu(lambda: scores("cpu"))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, scores(DEVICE), strict=True))


def test_profile(tmp_path):
    pytest.importorskip("matplotlib")
    report = profile(
        models.vgg_like(), ["grad_cam", "lrp"], batch=[1, 2], image_size=24, rounds=2, device=DEVICE, out=tmp_path,
        trace=True,
    )  # fmt: skip
    assert all(row["match"] for row in report.rows), report
    for row in report.rows:
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["median_us"] * 1e6, rel=1e-4)
        assert row["peak_mib"] > 0
        assert DEVICE == "cpu" or row["launches"] > 0
        if "stages_us" in row:
            assert sum(row["stages_us"].values()) == pytest.approx(row["median_us"], rel=1e-4)
    assert (tmp_path / "profile.html").stat().st_size > 10000
    assert len(list((tmp_path / "traces").iterdir())) == len(report.rows)
