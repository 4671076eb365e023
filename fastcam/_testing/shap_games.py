"""Games of feature maps for the tests of SHAP values, and the values by their definition, taken on the bare head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastcam
from fastcam.methods import shap_cam
from fastcam.methods._method import Passage
from fastcam.program.targets import resolve_targets

from .models import Net, seeded

__all__ = ["by_coalitions", "by_orders", "draw", "explain", "game_of", "head_only", "mlp", "pick"]


class Identity(nn.Module):
    """A layer to explain that gives the images as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0


def head_only(*head: nn.Module) -> nn.Module:
    """Images are the features: whatever the test draws are the maps."""
    return Net(Identity(), *head).double().eval()


def mlp(maps: int, side: int = 4, seed: int = 0, classes: int = 4) -> nn.Module:
    """Max-pool 2/2, then three linear layers with ReLU between: maps interact in every order."""

    def build() -> nn.Module:
        first, last = nn.Linear(maps * (side // 2) ** 2, 16), nn.Linear(16, classes)
        hidden = nn.Linear(16, 16)
        return head_only(nn.MaxPool2d(2), nn.Flatten(), first, nn.ReLU(), hidden, nn.ReLU(), last)

    return seeded(build, seed)


def draw(batch: int, maps: int, side: int = 4, seed: int = 0) -> Tensor:
    """Standard normal float64 images."""
    return torch.randn(batch, maps, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pick(chosen: int) -> Callable[[Tensor], Tensor]:
    """The score of one class."""
    return lambda output: output[:, chosen]


def by_orders(net: nn.Module, features: Tensor, base: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, K): the mean over all K! orders of what each map adds when it is put in place; coalitions kept by name."""
    batch, channels = features.shape[:2]
    base = base.expand_as(features)
    known: dict[frozenset[int], Tensor] = {}

    def value(present: frozenset[int]) -> Tensor:
        if present not in known:
            mixed = base.clone()
            for k in present:
                mixed[:, k] = features[:, k]
            with torch.no_grad():
                known[present] = score(net.head(mixed))
        return known[present]

    total = torch.zeros(batch, channels, dtype=torch.float64)
    for order in itertools.permutations(range(channels)):
        for place, k in enumerate(order):
            before = frozenset(order[:place])
            total[:, k] += value(before | {k}) - value(before)
    return total / math.factorial(channels)


def by_coalitions(net: nn.Module, features: Tensor, chosen: int) -> Tensor:
    """(B, K): the formula over coalitions, for as many maps as orders are too many."""
    batch, channels = features.shape[:2]
    values = {}
    for bits in itertools.product((0, 1), repeat=channels):
        mask = torch.tensor(bits, dtype=features.dtype).reshape(-1, *(1,) * (features.ndim - 2))
        with torch.no_grad():
            values[bits] = net.head(features * mask)[:, chosen]
    found = torch.zeros(batch, channels, dtype=features.dtype)
    for bits, value in values.items():
        for k in range(channels):
            if not bits[k]:
                size, joined = sum(bits), (*bits[:k], 1, *bits[k + 1 :])
                weight = math.factorial(size) * math.factorial(channels - size - 1) / math.factorial(channels)
                found[:, k] += weight * (values[joined] - value)
    return found


def explain(net: nn.Module, images: Tensor, targets: Any = 1, **options: Any) -> fastcam.Attribution:
    """`shap_cam` at layer `features`, raw maps."""
    settings: dict[str, Any] = {"layer": "features", "normalize": False, "size": "layer"}
    return fastcam.attribute(net, images, "shap_cam", targets=targets, **settings | options)


def passage_of(net: nn.Module, images: Tensor, targets: Any = 1) -> Passage:
    explainer = fastcam.Explainer(net, "shap_cam", layer="features")
    forward = explainer._session(images).forward(images, "closed_form", by_index=True)
    resolved = resolve_targets(targets, forward.output, len(images))
    return Passage(forward, images, forward.features, resolved, explainer.options)


def game_of(
    net: nn.Module, images: Tensor, targets: Any = 1, reference: Tensor | float = 0.0, chunk: int = 64
) -> shap_cam._Game:
    """The game of `net` at layer `features`, for the estimators themselves."""
    passage = passage_of(net, images, targets)
    base = shap_cam._as_features(reference, passage.features)
    empty = shap_cam._reference_scores(passage, base, shap_cam.ShapCamOptions(), False)
    return shap_cam._Game(passage, base, empty.double(), passage.scores().double(), chunk)
