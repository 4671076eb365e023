"""Networks with one trunk and the heads that tell methods apart, and the game of feature maps played by brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .models import CLASSES, Net, seeded

__all__ = ["HEADS", "MAPS", "exact_shap", "head_net", "sampled_shap", "saturated"]

#: Feature maps (6 x 6 for images of 12 x 12).
MAPS = 5


class _Residual(nn.Module):
    """relu(norm(conv(relu(x))) + x) with one in-place ReLU module for both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(MAPS, MAPS, 3, padding=1, bias=False), nn.BatchNorm2d(MAPS)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(self.relu(x - 0.1))) + x)


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.act = nn.Linear(MAPS, MAPS), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]


class _Quadratic(nn.Module):
    """Scores with products of two maps and no more."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        return torch.cat([pooled, pooled * pooled.flip(1)], 1)


def _pooled(bias: bool = True) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(MAPS, CLASSES, bias=bias)]


def _hidden(inputs: int, bias: bool = True) -> list[nn.Module]:
    first, second = nn.Linear(inputs, 12, bias=bias), nn.Linear(12, 9, bias=bias)
    return [nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(9, CLASSES, bias=bias)]


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "gap": _pooled,
    "vgg": lambda: [nn.MaxPool2d(2), *_hidden(9 * MAPS)],
    "overlapping pool": lambda: [nn.MaxPool2d(3, 2), *_hidden(4 * MAPS)],
    "residual": lambda: [_Residual(), *_pooled()],
    "gated": lambda: [_Gated(), *_pooled()],
    "quadratic": lambda: [_Quadratic(), nn.Linear(2 * MAPS, CLASSES)],
    "no bias": lambda: [nn.AvgPool2d(2), *_hidden(9 * MAPS, bias=False)],
}


def head_net(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Images (B, 3, 12, 12) to scores (B, 5), by a layer `features` of five non-negative maps and a head of `HEADS`."""

    def build() -> nn.Module:
        trunk = nn.Sequential(nn.Conv2d(3, MAPS, 3, 2, 1), nn.ReLU())
        return Net(trunk, *HEADS[name]())

    return seeded(build, seed).to(dtype)


class _Saturated(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return 1 - torch.relu(1 - a.sum((1, 2, 3))).unsqueeze(1).expand(-1, 2)


def saturated() -> nn.Module:
    """y = 1 - relu(1 - sum of all features), for images of two channels that `features` passes on."""
    net = Net(nn.Conv2d(2, 2, 1, bias=False), _Saturated())
    with torch.no_grad():
        net.features.weight.copy_(torch.eye(2)[..., None, None])
    return net.double().eval()


def exact_shap(game: Callable[[Tensor], Tensor], players: int) -> Tensor:
    """(players,) Shapley values of game(z) with z (n, players) of zeros and ones: all 2^players coalitions."""
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=players)), dtype=torch.float64)
    values = game(masks)
    found = torch.zeros(players, dtype=torch.float64)
    for mask, value in zip(masks, values, strict=True):
        size = int(mask.sum())
        for k in range(players):
            if mask[k]:
                found[k] += value * math.factorial(size - 1) * math.factorial(players - size)
            else:
                found[k] -= value * math.factorial(size) * math.factorial(players - size - 1)
    return found / math.factorial(players)


def sampled_shap(game: Callable[[Tensor], Tensor], orders: list[tuple[int, ...]]) -> Tensor:
    """(players,) mean over orders of what each player adds when it joins."""
    found = torch.zeros(len(orders[0]), dtype=torch.float64)
    for order in orders:
        masks = torch.zeros(len(order) + 1, len(order), dtype=torch.float64)
        for step, player in enumerate(order):
            masks[step + 1 :, player] = 1
        found[list(order)] += game(masks).diff()
    return found / len(orders)
