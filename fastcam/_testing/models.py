"""Tiny fixed-seed networks for tests and benchmarks, and torchvision's model zoo beside a CPU-only torch.

Every builder returns a float32 network in evaluation mode whose weights depend on `seed` alone and leaves torch's own
random state as it was. Unless said otherwise images are (B, 3, *spatial) of any size from 8 pixels up, scores (B, 5),
and the layer to explain is the module `features`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcam._torchvision import torchvision_models

__all__ = ["GivenFeatures", "Net", "by_hand", "gap_linear", "residual", "seeded", "structured", "tokens"]
__all__ += ["torchvision_models", "vgg_like"]

CLASSES = 5
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """`build()` under a fixed seed, batch-norm statistics and affine parameters away from their defaults, in eval."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight.data, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias.data, module.running_mean):
                    tensor.normal_(0, 0.2)
    return model.eval()


class _Block(nn.Module):
    """Convolution and ReLU; `act` is "module", "inplace" or "functional"."""

    def __init__(self, inputs: int, outputs: int, act: str = "module", stride: int = 1, rank: int = 2):
        super().__init__()
        self.conv = _CONV[rank](inputs, outputs, 3, stride, 1)
        self.relu = functional.relu if act == "functional" else nn.ReLU(inplace=act == "inplace")

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Net(nn.Module):
    """features -> head, so that all networks here share their layers' names."""

    def __init__(self, features: nn.Module, *head: nn.Module):
        super().__init__()
        self.features = features
        self.head = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def gap_linear(*, act: str = "module", rank: int = 2, bias: bool = True, seed: int = 0) -> nn.Module:
    """Two conv-ReLU blocks, global average pool, one linear layer: the head is affine, CAM exists.

    `act` as in `_Block`: all three spellings hold the same weights, so they are twins; the ReLU in question follows
    `features.0.conv` and `features.1.conv`. `rank` is the number of spatial dimensions (1, 2, 3).
    """

    def build() -> nn.Module:
        features = nn.Sequential(_Block(3, 6, act=act, rank=rank), _Block(6, 6, act=act, stride=2, rank=rank))
        return Net(features, _POOL[rank](1), nn.Flatten(), nn.Linear(6, CLASSES, bias=bias))

    return seeded(build, seed)


def vgg_like(*, act: str = "module", rank: int = 2, bias: bool = True, seed: int = 0) -> nn.Module:
    """Two conv-ReLU blocks, 2 x 2 average pool, FC-ReLU-FC: the head is not affine. `bias` is that of the head."""

    def build() -> nn.Module:
        features = nn.Sequential(_Block(3, 6, act=act, rank=rank), _Block(6, 8, act=act, stride=2, rank=rank))
        first, last = nn.Linear(8 * 2**rank, 12, bias=bias), nn.Linear(12, CLASSES, bias=bias)
        return Net(features, _POOL[rank](2), nn.Flatten(), first, nn.ReLU(), last)

    return seeded(build, seed)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        inner = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(inner)) + x)


def residual(*, seed: int = 0) -> nn.Module:
    """A batch-norm residual block whose single in-place ReLU module runs three times, then a 1 x 1 conv and pooling."""
    head = (nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return seeded(lambda: Net(_Residual(), nn.Conv2d(8, 8, 1), *head, nn.Linear(8, CLASSES)), seed)


class _Split(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return {"low": x, "high": x * x} if self.kind == "dict" else (x, x * x)


class _Structured(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.features = _Block(3, 6)
        self.split = _Split(kind)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Any:
        parts = self.split(self.features(x))
        low, high = parts.values() if isinstance(parts, dict) else parts
        logits = self.fc((low + high).mean((2, 3)))
        return {"logits": logits, "aux": -logits} if self.kind == "dict" else (logits, -logits)


def structured(kind: str, *, seed: int = 0) -> nn.Module:
    """Output {"logits", "aux"} for kind "dict", (logits, aux) for "tuple"; the layer `split` inside likewise."""
    return seeded(lambda: _Structured(kind), seed)


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 12))
        self.features = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.mix = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        return self.fc(self.mix(self.features(x))[:, 0])


def tokens(*, seed: int = 0) -> nn.Module:
    """A two-block vision transformer on 4 x 4 patches; layer `features` gives (B, 1 + n, 12), class token first."""
    return seeded(_Tokens, seed)


def by_hand(weight: list[list[float]], bias: list[float] | None = None) -> nn.Module:
    """Pool + linear with the given (C, K) weight on a layer `features` that passes the (B, K, h, w) images through."""
    classes, channels = len(weight), len(weight[0])
    model = Net(
        nn.Conv2d(channels, channels, 1, bias=False),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)),
    )
    with torch.no_grad():
        model.features.weight.copy_(torch.eye(channels)[..., None, None])
        model.head[2].weight.copy_(torch.tensor(weight))
        model.head[2].bias.copy_(torch.tensor(bias or [0.0] * classes))
    return model.eval()


class GivenFeatures(nn.Module):
    """A backbone whose features are a parameter, whatever the images."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.features = nn.Parameter(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.features
