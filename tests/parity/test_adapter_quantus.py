"""fastcam.adapters.quantus inside Quantus 0.6.0: its own metrics take our explanations and give what they should."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
with contextlib.suppress(ImportError):  # the peer imports torchvision, which may need help beside a CPU-only torch
    models.torchvision_models()
peer = pytest.importorskip("quantus", reason="needs quantus, extra 'peers'")
zennit = pytest.importorskip("zennit", reason="needs zennit, extra 'peers'")

from fastcam.adapters import quantus as ours  # noqa: E402


def case(dtype=torch.float32):
    net = models.vgg_like().to(dtype)
    x = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype).numpy()
    return net, x, np.array([3, 0, 4])


EXPLAINS_IMAGES = [name for name, row in fastcam.methods().items() if row["explains"] == "images"]


@pytest.mark.parametrize("method", EXPLAINS_IMAGES)
def test_every_method(method, untouched):
    """Exactly numpy's array, (N, 1, H, W), equal to `fastcam.attribute`, and accepted by Quantus' own checks."""
    net, x, y = case()
    if method == "cam":
        net = models.gap_linear()
    if method == "lfi_cam":
        pytest.skip("explains networks made for it")
    options = {"low": -3.0, "high": 3.0, "composite": "epsilon_gamma_box"} if method == "lrp" else {}
    images = torch.from_numpy(x)
    with untouched(net, images):
        found = ours.explain(net, x, y, method=method, **options)
    assert type(found) is np.ndarray
    assert found.dtype == np.float32
    want = fastcam.attribute(net, images, method, targets=y.tolist(), **options).maps
    np.testing.assert_allclose(found[:, 0], want.numpy(), rtol=0, atol=1e-6)
    peer.helpers.asserts.assert_attributions(x_batch=x, a_batch=found)
    assert float(np.ptp(found)) > 0.5


def test_forms_of_its_arguments():
    net, x, y = case(torch.float64)
    want = ours.explain(net, x, y)
    assert want.dtype == np.float64
    for inputs, targets in ((torch.from_numpy(x), torch.from_numpy(y)), (x.astype(np.float32), y.tolist()), (x, y)):
        found = ours.explain(net, inputs, targets, device="cpu")
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    one = ours.explain(net, x, 2)
    np.testing.assert_array_equal(one, ours.explain(net, x, np.array([2])))
    np.testing.assert_array_equal(one, ours.explain(net, x, np.array([2, 2, 2])))
    with pytest.raises(IndexError, match="99"):
        ours.explain(net, x, 99)
    with pytest.raises(ValueError, match="there is no method 'Salience'"):
        ours.explain(net, x, y, method="Salience")


@pytest.mark.parametrize(
    "kwargs",
    [{"method": "Saliency"},
     {"method": "GradCam", "gc_layer": "model.features[1].conv", "interpolate": (12, 16)},
     {"method": "IntegratedGradients", "reduce_axes": (), "softmax": True},
     {"xai_lib": "zennit", "attributor": zennit.attribution.Gradient, "composite": "epsilon_plus"}],
    ids=["saliency", "grad-cam", "integrated", "zennit"],
)  # fmt: skip
def test_its_own_methods_are_its_own(kwargs):
    net, x, y = case()
    want = peer.explain(copy.deepcopy(net), x, y, **kwargs)
    np.testing.assert_array_equal(ours.explain(net, x, y, **kwargs), want)


METRICS = {
    "PixelFlipping": {"features_in_step": 96},
    "RegionPerturbation": {"patch_size": 4, "regions_evaluation": 3},
    "FaithfulnessCorrelation": {"nr_runs": 4, "subset_size": 40},
    "MaxSensitivity": {"nr_samples": 2},
    "Sparseness": {},
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_take_it(name):
    """The metric calls the explain function by itself and gets the score of the same maps handed over."""
    net, x, y = case()
    kwargs = {"method": "grad_cam", "layer": "features", "relu": False}
    found = []
    for a_batch in (None, ours.explain(net, x, y, **kwargs)) if name != "MaxSensitivity" else (None, None):
        np.random.seed(3)
        metric = getattr(peer, name)(disable_warnings=True, **METRICS[name])
        found.append(metric(net, x, y, a_batch, explain_func=ours.explain, explain_func_kwargs=kwargs, device="cpu"))
    np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-7)
    assert np.isfinite(found[0]).all()


def test_no_stale_maps_while_weights_are_randomised():
    """MPRT re-initialises layers of one model object between calls; each call must see the weights of its moment."""
    net, x, y = case()
    seen = []

    def watched(model, inputs, targets, **kwargs):
        found = ours.explain(model, inputs, targets, **kwargs)
        seen.append((found, ours.explain(copy.deepcopy(model), inputs, targets, **kwargs)))
        return found

    np.random.seed(0)
    metric = peer.MPRT(similarity_func=peer.correlation_spearman, layer_order="top_down", disable_warnings=True)
    metric(net, x, y, explain_func=watched, explain_func_kwargs={"method": "lrp"}, device="cpu")
    assert len(seen) > 3
    for found, fresh in seen:
        np.testing.assert_array_equal(found, fresh)
    assert max(float(np.abs(found - seen[0][0]).max()) for found, _ in seen[1:]) > 0.1


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("features_in_step", [48, 192, 12])
@pytest.mark.parametrize("baseline", ["black", "white", 0.25, "mean"])
def test_pixel_flipping(features_in_step, baseline, softmax, untouched, monkeypatch):
    net, x, y = case()
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)  # Q1: it needs a function that NumPy has dropped
    a_batch = np.random.default_rng(1).random((3, 1, 12, 16)).astype(np.float32)
    options = {"features_in_step": features_in_step, "perturb_baseline": baseline, "disable_warnings": True}
    found = []
    for module in (ours, peer):
        with untouched(net):
            for auc in (False, True):
                metric = module.PixelFlipping(return_auc_per_sample=auc, **options)
                found.append(np.array(metric(net, x, y, a_batch, softmax=softmax, device="cpu")))
    for got, want in zip(found[:2], found[2:], strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert float(np.ptp(found[2])) > 1e-3 or features_in_step == 192


@pytest.mark.skipif(hasattr(np, "trapz"), reason="needs NumPy 2.4, which has no trapz")
def test_q1_areas_under_curves():
    net, x, y = case()
    a_batch = np.random.default_rng(1).random((3, 1, 12, 16)).astype(np.float32)
    options = {"features_in_step": 48, "disable_warnings": True}
    curves = np.array(ours.PixelFlipping(**options)(net, x, y, a_batch, device="cpu"))
    areas = ours.PixelFlipping(return_auc_per_sample=True, **options)(net, x, y, a_batch, device="cpu")
    np.testing.assert_allclose(areas, ((curves[:, 1:] + curves[:, :-1]) / 2).sum(1))
    with pytest.raises(AttributeError, match="trapz"):
        peer.PixelFlipping(return_auc_per_sample=True, **options)(net, x, y, a_batch, device="cpu")


def test_accelerate():
    """Also what calls `quantus.explain` by itself, as SmoothMPRT does whatever explain function it is given."""
    net, x, y = case()
    own, saliency = peer.explain, peer.explain(net, x, y, method="Saliency")
    with fastcam.adapters.accelerate("quantus"):
        assert type(peer.PixelFlipping(disable_warnings=True)) is ours.PixelFlipping
        np.testing.assert_array_equal(peer.explain(net, x, y, method="Saliency"), saliency)
        maps = ours.explain(net, x, y, method="grad_cam")
        np.testing.assert_array_equal(peer.explain(net, x, y, method="grad_cam"), maps)
        np.testing.assert_array_equal(peer.explain(net, x, y), peer.explain(net, x, y, method="Gradient"))
        kwargs = {"method": "grad_cam", "layer": "features"}
        np.random.seed(0)
        smooth = peer.SmoothMPRT(
            nr_samples=1, layer_order="top_down", similarity_func=peer.correlation_spearman, disable_warnings=True
        )
        smooth = smooth(net, x, y, explain_func=peer.explain, explain_func_kwargs=kwargs, device="cpu")
        np.random.seed(0)
        plain = peer.MPRT(layer_order="top_down", similarity_func=peer.correlation_spearman, disable_warnings=True)
        plain = plain(net, x, y, explain_func=peer.explain, explain_func_kwargs=kwargs, device="cpu")
        for layer, scores in plain.items():  # one sample is without noise; ranks of equals turn with rounding
            np.testing.assert_allclose(smooth[layer], scores, atol=1e-3)
        sparse = {"sparse": peer.Sparseness(disable_warnings=True)}
        methods = {"grad_cam": peer.explain, "Saliency": peer.explain}
        found = peer.evaluate(sparse, methods, net, x, y, agg_func=np.mean, explain_func_kwargs={})
        assert found["grad_cam"]["sparse"] != found["Saliency"]["sparse"]
    assert type(peer.PixelFlipping(disable_warnings=True)) is peer.PixelFlipping
    assert peer.explain is own


def test_accelerated_libraries_serve_quantus_own_explain():
    """Its `explain` makes objects of Captum's classes, wherever it imported them from."""
    net, x, y = case()
    net = nn.Sequential(net)
    kwargs = {"method": "GuidedGradCam", "gc_layer": "model[0].features[1].conv"}
    want = peer.explain(net, x, y, **kwargs)
    with fastcam.adapters.accelerate("captum"):
        found = peer.explain(net, x, y, **kwargs)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))
