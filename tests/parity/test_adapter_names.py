"""Public names of the libraries under `accelerate`: fastcam's, or the library's own as docs/adapters.md lists them."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
from pathlib import Path

import pytest
import torch

import fastcam
from fastcam._testing import models

pytestmark = pytest.mark.peers
with contextlib.suppress(ImportError):  # the peers import torchvision, which may need help beside a CPU-only torch
    models.torchvision_models()

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
#: library -> heading of its section, adapter, namespace, the class of what it names (None: every class and function)
LIBRARIES = {
    "pytorch_grad_cam": ("pytorch-grad-cam", "grad_cam", "pytorch_grad_cam", None),
    "captum": ("Captum", "captum", "captum.attr", "Attribution"),
    "zennit": ("Zennit", "zennit", "zennit.attribution", "Attributor"),
    "torchcam": ("TorchCAM", "torchcam", "torchcam.methods", None),
    "quantus": ("Quantus", "quantus", "quantus", "Metric"),
}


def listed(heading: str, line: str) -> set[str]:
    """The names in backticks of the item that starts with `line` in the section."""
    section = re.search(rf"^## {heading}\n(.*?)^## ", PAGE.read_text(), re.M | re.S)[1]
    item = re.search(rf"^- {line}(.*?)(?=^- |^\n|\Z)", section, re.M | re.S)[1]
    return {name for span in re.findall(r"`([^`]+)`", item) for name in span.split()}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_name_is_ours_or_listed(library):
    heading, adapter, namespace, kind = LIBRARIES[library]
    pytest.importorskip(library, reason="needs extra 'peers'")
    theirs = importlib.import_module(namespace)
    ours = importlib.import_module(f"fastcam.adapters.{adapter}")
    public = {name: value for name, value in vars(theirs).items() if not name.startswith("_") and callable(value)}
    if kind is None:
        public = {n: v for n, v in public.items() if inspect.getmodule(v).__name__.startswith(library)}
    else:
        public = {n: v for n, v in public.items() if isinstance(v, type) and issubclass(v, getattr(theirs, kind))}
    public = {n: v for n, v in public.items() if inspect.isclass(v) or inspect.isfunction(v)}
    replaced = {theirs.__name__ for theirs in ours.REPLACES if isinstance(theirs, type)}
    assert replaced <= public.keys()
    assert replaced <= listed(heading, "Covered:")
    assert listed(heading, "The library's own code:") == public.keys() - replaced
    before = {name: dict(vars(public[name])) for name in public.keys() - replaced}
    with fastcam.adapters.accelerate(library):
        for name, kept in before.items():
            assert getattr(theirs, name) is getattr(ours, name) is public[name]
            assert dict(vars(public[name])) == kept
        for name in replaced:
            assert issubclass(getattr(ours, name), public[name])


def test_every_rule_of_zennit_is_translated_or_listed():
    rules = pytest.importorskip("zennit.rules", reason="needs extra 'peers'")
    from fastcam.adapters import zennit as ours

    hooks = {value for value in vars(rules).values() if isinstance(value, type) and issubclass(value, rules.Hook)}
    assert hooks - {rules.Hook, rules.BasicHook} - set(ours._RULES) == {rules.ReLUBetaSmooth}
    assert "ReLUBetaSmooth" in listed("Zennit", "Covered:")  # as the one exception


@pytest.mark.parametrize("name", ["FinerCAM", "RefineCAM", "SESS", "GradCAMElementWise", "FEM", "ShapleyCAM"])
def test_methods_left_to_grad_cam_give_its_numbers(name):
    """Also those that are built on replaced methods."""
    peer = pytest.importorskip("pytorch_grad_cam", reason="needs extra 'peers'")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    images = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def maps():
        net = models.vgg_like().double()
        with contextlib.redirect_stderr(io.StringIO()):
            return torch.from_numpy(getattr(peer, name)(net, [net.features])(images, [ClassifierOutputTarget(1)] * 2))

    want = maps()
    assert want.max() > 0.5
    with fastcam.adapters.accelerate("pytorch_grad_cam"):
        torch.testing.assert_close(maps(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["FinerCAM", "RefineCAM"])
def test_methods_left_to_torchcam_give_its_numbers(name):
    """Over Grad-CAM, which both compute alike; RefineCAM's default, Grad-CAM++, is another there (T1)."""
    peer = pytest.importorskip("torchcam.methods", reason="needs extra 'peers'")
    images = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def maps():
        net = models.vgg_like().double()
        layers = "features" if name == "FinerCAM" else ["features.1", "features"]
        extractor = getattr(peer, name)(net, layers, input_shape=(3, 12, 16), base_method=peer.GradCAM)
        return extractor([1, 2], net(images))

    want = maps()
    with fastcam.adapters.accelerate("torchcam"):
        for found, expected in zip(maps(), want, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
