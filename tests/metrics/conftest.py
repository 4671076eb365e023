"""Small networks and maps whose metrics are computed by loops, one image and one perturbation at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

CLASSES = 5


class Net(nn.Module):
    """Convolution, batch norm, dropout, pooling, linear: everything that train mode would change."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
        self.features = nn.Sequential(conv(3, 6, 3, padding=1), norm(6), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(3 * self.features(images).flatten(2).mean(2))


def network(rank: int = 2) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(rank).double().eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def images() -> Tensor:
    return draw(3, 3, 6, 7)


@pytest.fixture
def maps() -> Tensor:
    """In [0, 1], each with its 0 and its 1, some values equal."""
    found = draw(3, 6, 7, seed=1).mul(3).round().flatten(1)
    low, high = found.amin(1, keepdim=True), found.amax(1, keepdim=True)
    return ((found - low) / (high - low)).reshape(3, 6, 7)


@pytest.fixture
def targets() -> Tensor:
    return torch.tensor([2, 0, 4])
