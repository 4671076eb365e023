"""Backbones of LFI-CAM's experiments, up to their last feature maps (B, K, h, w).

For 32-pixel images: `resnet`, `densenet_bc`, `resnext29`. For 224 pixels: torchvision's or timm's networks through
`without_classifier`, with 14x14 maps.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcam.program.layers import layer_names

from ._counts import check_counts
from .truncate import features_of

__all__ = ["densenet_bc", "resnet", "resnext29", "without_classifier"]


class Basic(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))"""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (in groups), 1x1 convolutions; `outputs` is four times the width in a ResNet."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, groups: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        y = functional.relu(self.norm2(self.conv2(y)), inplace=True)
        return functional.relu(self.norm3(self.conv3(y)) + self.shortcut(x), inplace=True)


class Dense(nn.Module):
    """x, with `growth` maps more: norm, ReLU, 1x1 convolution to 4 growth, norm, ReLU, 3x3 convolution."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(functional.relu(self.norm2(y)))], dim=1)


def resnet(depth: int = 20, *, block: Literal["basic", "bottleneck"] | None = None) -> nn.Sequential:
    """A ResNet for 32-pixel images, depth 6 n + 2: three stages of n blocks with 16, 32, 64 maps, times 4 with
    bottleneck blocks (None: those from depth 44 on, as LFI-CAM's experiments have it). Features at an eighth of the
    sides squared: 64 or 256 maps of 8x8.
    """
    check_counts(depth=depth)
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6 n + 2, from 8 on; got {depth}")
    kind = block or ("bottleneck" if depth >= 44 else "basic")
    if kind not in ("basic", "bottleneck"):
        raise ValueError(f"block must be 'basic' or 'bottleneck'; got {block!r}")
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    inputs = 16
    for width in (16, 32, 64):
        for place in range((depth - 2) // 6):
            stride = 2 if width > 16 and place == 0 else 1
            outputs = width if kind == "basic" else 4 * width
            layers.append(
                Basic(inputs, width, stride) if kind == "basic" else Bottleneck(inputs, width, outputs, stride)
            )
            inputs = outputs
    return _initialised(nn.Sequential(*layers), "normal")


def densenet_bc(depth: int = 100, growth: int = 12) -> tuple[nn.Sequential, nn.Sequential]:
    """A DenseNet-BC for 32-pixel images, depth 6 n + 4, transitions halving: its features before the last norm, which
    may be negative, and the tail (norm, ReLU) that belongs behind the attention:

    features, tail = densenet_bc();  LFICAM(features, 10, tail=tail)
    """
    check_counts(depth=depth, growth=growth)
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4, from 10 on; got {depth}")
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    for stage in range(3):
        for _ in range((depth - 4) // 6):
            layers.append(Dense(width, growth))
            width += growth
        if stage < 2:
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width // 2, 1, bias=False)]
            layers.append(nn.AvgPool2d(2))
            width //= 2
    tail = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return _initialised(nn.Sequential(*layers), "normal"), _initialised(tail, "normal")


def resnext29(groups: int = 8, widen: int = 4, base: int = 64) -> nn.Sequential:
    """A ResNeXt-29 for 32-pixel images: three stages of three blocks with 64, 128, 256 maps times `widen`, `groups`
    groups of `base` maps, twice that a stage on. 1024 maps of 8x8 by default.
    """
    check_counts(groups=groups, widen=widen, base=base)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    inputs = 64
    for stage in range(3):
        outputs, width = 64 * widen * 2**stage, groups * base * 2**stage
        for place in range(3):
            stride = 2 if stage > 0 and place == 0 else 1
            layers.append(Bottleneck(inputs, width, outputs, stride, groups))
            inputs = outputs
    return _initialised(nn.Sequential(*layers), "kaiming")


def without_classifier(
    model: nn.Module, *, stem: Literal["stride1", "keep"] = "stride1", layer: str = "layer4"
) -> nn.Module:
    """A ResNet of torchvision or timm up to `layer4`, with 14x14 maps of 224-pixel images instead of 7x7.

    stem  "stride1": the first convolution with stride 1, as LFI-CAM's experiments have it · "keep": the usual stem,
          and stride 1 in `layer4`, for pretrained weights (not of the paper)

    The model itself is changed and shared. Raises ValueError for a model without `conv1` and `layer4`.
    """
    if stem not in ("stride1", "keep"):
        raise ValueError(f"stem must be 'stride1' or 'keep'; got {stem!r}")
    layer_names(model, layer)
    first, last = getattr(model, "conv1", None), getattr(model, "layer4", None)
    # Deep stems are several convolutions, of which the first one strides.
    convs = [m for m in first.modules() if isinstance(m, nn.Conv2d)] if isinstance(first, nn.Module) else []
    if not convs or not isinstance(last, nn.Module):
        raise ValueError(f"{type(model).__name__} is no ResNet with conv1 and layer4; use fastcam.nn.features_of")
    if stem == "stride1":
        convs[0].stride = (1, 1)
    else:
        for module in last.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
            elif isinstance(module, nn.AvgPool2d):  # timm's shortcuts may pool
                module.kernel_size = module.stride = 1
    return features_of(model, layer)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _initialised(module: Any, how: str) -> Any:
    """Convolutions from N(0, sqrt(2 / (k k K_out))) ("normal") or Kaiming's normal by fan_out; norms 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            if how == "normal":
                area = layer.kernel_size[0] * layer.kernel_size[1]
                nn.init.normal_(layer.weight, 0, math.sqrt(2 / (area * layer.out_channels)))
            else:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return module
