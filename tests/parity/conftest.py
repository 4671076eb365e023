"""What the parity tests share: the written formulas, fixed-seed networks and targets. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from fastcam._testing import models

CLASSES = [3, 0, 4]


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cam_oracle", Path(__file__).parents[1] / "methods" / "oracle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vgg11() -> nn.Module:
    """torchvision's, with a classifier small enough for tests."""
    net = models.torchvision_models().vgg11(weights=None)
    net.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    return net


#: name -> (builder, layer, image size); none of the layers is followed by an in-place operator.
NETS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int]]] = {
    "gap": (models.gap_linear, "features", (17, 22)),
    "vgg": (models.vgg_like, "features", (17, 22)),
    "resnet18-layer4": (
        lambda: models.seeded(lambda: models.torchvision_models().resnet18(weights=None, num_classes=10)),
        "layer4",
        (96, 80),
    ),
    "resnet18-layer3": (
        lambda: models.seeded(lambda: models.torchvision_models().resnet18(weights=None, num_classes=10)),
        "layer3",
        (64, 48),
    ),
    "vgg11": (lambda: models.seeded(vgg11), "features.19", (64, 64)),
}


@pytest.fixture(scope="session", params=[(n, d) for n in NETS for d in (torch.float32, torch.float64)], ids=str)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """net for fastcam, peer: its copy for the peer (which may change it), layer, images of a batch, classes."""
    name, dtype = request.param
    build, layer, size = NETS[name]
    net = build().to(dtype)
    draw = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    peer = copy.deepcopy(net)
    return SimpleNamespace(
        net=net,
        peer=peer,
        layer=layer,
        peer_layer=peer.get_submodule(layer),
        dtype=dtype,
        closed=name in ("gap", "resnet18-layer4"),
        images=lambda batch: draw[:batch].to(dtype),
        classes=lambda batch: CLASSES[:batch],
    )


@pytest.fixture
def close() -> Callable[..., None]:
    """Maximum difference relative to the largest value; float32 networks of eighteen layers agree to a few 1e-5."""

    def check(got: torch.Tensor, want: torch.Tensor, exact: float = 1e-10) -> None:
        assert got.shape == want.shape
        tolerance = max(exact, 1e-4 if want.dtype == torch.float32 else 0)
        scale = float(want.abs().max())
        assert scale > 0
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance * scale)

    return check


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _outside(net: nn.Module) -> dict[str, object]:
    """What a user can see of a model, by name."""
    seen: dict[str, object] = {}
    for name, module in net.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        seen[name] = id(module), module.training, sorted(vars(module)), hooks, list(module._modules)
    for name, p in net.named_parameters():
        seen[f"{name} (parameter)"] = id(p), p.requires_grad, id(p.grad), p.detach().clone().numpy().tobytes()
    for name, b in net.named_buffers():
        seen[f"{name} (buffer)"] = id(b), b.clone().numpy().tobytes()
    return seen


@pytest.fixture
def untouched() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`with untouched(model, *tensors)`: model, tensors, grad mode and random state are the same after the block, and
    after an error in it too."""

    @contextlib.contextmanager
    def watch(net: nn.Module, *tensors: torch.Tensor) -> Iterator[None]:
        before, state = _outside(net), torch.get_rng_state()
        copies = [(t.clone(), t.requires_grad, t.grad) for t in tensors]
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        try:
            yield
        finally:
            after = _outside(net)
            assert after.keys() == before.keys()
            assert [name for name in before if before[name] != after[name]] == []
            assert torch.equal(torch.get_rng_state(), state)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == mode
            for tensor, (copied, required, gradient) in zip(tensors, copies, strict=True):
                assert torch.equal(tensor, copied)
                assert tensor.requires_grad == required
                assert tensor.grad is gradient

    return watch
