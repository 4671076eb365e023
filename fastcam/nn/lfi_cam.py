"""LFI-CAM: a classifier that predicts which of its feature maps matter, and attends to where they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcam import ops
from fastcam._dtypes import accumulation_dtype
from fastcam._tracing import transformed
from fastcam.program.state import evaluating

from ._counts import check_counts
from .truncate import features_of

__all__ = ["LFICAM", "FeatureImportanceNetwork", "LFICAMOutput"]


class LFICAMOutput(NamedTuple):
    """What `LFICAM` returns.

    logits      (B, classes)
    attention   (B, 1, h, w) in [0, 1], the same for every class
    importance  (B, K), positive, summing to 1 over the K feature maps
    """

    logits: Tensor
    attention: Tensor
    importance: Tensor


class FeatureImportanceNetwork(nn.Module):
    """Importance of feature maps, read from what the image shows through them.

        M_k = N_k g;   s = softmax_k(mean_ij fin(M))

    with N the features scaled to [0, 1] map by map, g the grey image at their size, and fin four convolutions of the
    same kernel size with batch norms, ending in a ReLU.

    channels  K, feature maps in and out
    kernel    3 (padded) or 1
    squeeze   the middle width is K // squeeze: 1 for the released 3x3 network, 2 for the 1x1 one of March 2021
    relu      "pairs": a ReLU after every second batch norm (as released for CIFAR) · "all": after each (224 pixels)
    input     "masked": M · "features": N without the image
    init      of the convolutions: "kaiming", normal by fan_out (ResNet and DenseNet) · "default", PyTorch's (ResNeXt)

    Parameters: 36 K^2 + 8 K (kernel 3, squeeze 1); 3 K^2 + O(K) (kernel 1, squeeze 2).
    Shapes: features (B, K, h, w), grey (B, 1, h, w) -> (B, K), positive, sum 1, in the accumulation dtype.
    Errors: TypeError for a count that is no integer; ValueError for an unknown option, a squeeze that leaves no
    channel, or features of another K.
    Source: Lee et al., LFI-CAM, ICCV 2021, arXiv 2105.00937, and its released network.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel: Literal[1, 3] = 3,
        squeeze: int = 1,
        relu: Literal["pairs", "all"] = "pairs",
        input: Literal["masked", "features"] = "masked",
        init: Literal["kaiming", "default"] = "kaiming",
    ):
        super().__init__()
        if init not in ("kaiming", "default"):
            raise ValueError(f"init must be 'kaiming' or 'default'; got {init!r}")
        if kernel not in (1, 3):
            raise ValueError(f"kernel must be 1 or 3; got {kernel!r}")
        if relu not in ("pairs", "all"):
            raise ValueError(f"relu must be 'pairs' or 'all'; got {relu!r}")
        if input not in ("masked", "features"):
            raise ValueError(f"input must be 'masked' or 'features'; got {input!r}")
        check_counts(channels=channels, squeeze=squeeze)
        if channels // squeeze < 1:
            raise ValueError(f"{channels} channels // squeeze={squeeze} leaves none")
        self.channels = channels
        self.input = input
        narrow = channels // squeeze
        widths = (channels, channels, narrow, channels, channels) if squeeze > 1 else (channels,) * 5
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False))
            if init == "kaiming":
                nn.init.kaiming_normal_(layers[-1].weight, mode="fan_out")
            layers.append(nn.BatchNorm2d(outputs))
            if relu == "all" or place % 2 == 1:
                layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor, grey: Tensor) -> Tensor:
        if features.ndim != 4 or features.shape[1] != self.channels:
            raise ValueError(
                f"the importance network was made for channels={self.channels}, features (B, {self.channels}, h, w); "
                f"got {tuple(features.shape)}"
            )
        if self.input == "features":
            grey = torch.ones_like(grey)
        pooled = self.layers(_mask(features, grey)).mean((2, 3))
        if not torch.compiler.is_exporting():  # a captured network is run in other precisions than it was captured in
            pooled = pooled.to(accumulation_dtype(pooled.dtype))
        return pooled.softmax(1)


class LFICAM(nn.Module):
    """A classifier with learned feature-importance attention.

        F = backbone(I);   g = bilinear(mean over channels of I);   s = FeatureImportanceNetwork(F, g)
        P = relu(sum_k s_k F_k);   A = (P - min P) / (max P - min P);   logits = linear(mean_ij tail((1 + A) F))

    All of it is trained by one cross-entropy loss on the logits; gradients go through both min-max scalings (ties share
    them evenly), and nothing is detached. At inference the attention map costs no gradient; `fastcam.attribute(model,
    images, "lfi_cam")` gives it at image size, scaled to [0, 1] again.

        model = fastcam.nn.LFICAM(fastcam.nn.resnet(20), num_classes=10)
        logits, attention, importance = model(images)

    backbone      maps images (B, C, H, W) to features (B, K, h, w), or a whole classifier, of which `features_of` takes
                  the part up to `layer`, sharing its modules and parameters
    num_classes   of the linear layer
    layer         dotted name or module of the backbone; None: its output, or where that is no feature map its last one
    channels      K; None: found by running the backbone on one black image of `image_size`
    image_size    (C, H, W) of that image; the only size that a backbone takes which `torch.fx` cannot trace
    tail          module between the attended features and the pooling (DenseNet's last norm and ReLU), which keeps K
                  channels; None: nothing
    fin_kernel, fin_squeeze, fin_relu, fin_input, fin_init   the options of `FeatureImportanceNetwork`; fin_relu None:
                  "pairs" up to an `image_size` of 64 pixels, "all" beyond
    attention     False: A = 0 in the logits, the plain classifier (for comparison); the map is still returned
    constant_map  attention of a constant P: "raw" P itself, which may exceed 1 · "zeros"

    Returns `LFICAMOutput`. Shapes: images (B, C, H, W), logits (B, classes), attention (B, 1, h, w), importance (B, K).
    Errors: TypeError for a backbone that is no module, or a count that is no integer; ValueError or RuntimeError as
    `features_of` where it cannot be cut, RuntimeError where it cannot run on an image of `image_size`; ValueError for
    features with a single position, for a tail that changes their number, for options as `FeatureImportanceNetwork`,
    and in evaluation mode on the CPU for features that are not finite.
    With `attention=False` the importance network gets no gradient from the logits; DistributedDataParallel then wants
    `find_unused_parameters=True`.
    Cost: backbone, four convolutions of K channels, linear layer; the rest is two fused ops, and two in the backward
    pass, which keep nothing of the features' size but the features.
    Source: Lee et al., LFI-CAM, ICCV 2021, arXiv 2105.00937; released network of TrustworthyAI-kr/LFI-CAM. Confirmed
    there: all formulas; not stated in the paper: which of the released importance networks it measured.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        layer: str | nn.Module | None = None,
        channels: int | None = None,
        image_size: tuple[int, int, int] = (3, 64, 64),
        tail: nn.Module | None = None,
        fin_kernel: Literal[1, 3] = 3,
        fin_squeeze: int = 1,
        fin_relu: Literal["pairs", "all"] | None = None,
        fin_input: Literal["masked", "features"] = "masked",
        fin_init: Literal["kaiming", "default"] = "kaiming",
        attention: bool = True,
        constant_map: Literal["raw", "zeros"] = "raw",
    ):
        super().__init__()
        if constant_map not in ("raw", "zeros"):
            raise ValueError(f"constant_map must be 'raw' or 'zeros'; got {constant_map!r}")
        check_counts(num_classes=num_classes, **{} if channels is None else {"channels": channels})
        if tail is not None and not isinstance(tail, nn.Module):
            raise TypeError(f"tail must be None or a torch.nn.Module; got {type(tail).__name__}")
        if not isinstance(image_size, Sequence) or isinstance(image_size, str) or len(image_size) != 3:
            raise ValueError(f"image_size must be (C, H, W); got {image_size!r}")
        check_counts(**{f"image_size[{place}]": size for place, size in enumerate(image_size)})
        self.backbone, channels = _features(backbone, layer, channels, image_size)
        relu: Literal["pairs", "all"] = fin_relu or ("pairs" if max(image_size[1:]) <= 64 else "all")
        self.fin = FeatureImportanceNetwork(
            channels, kernel=fin_kernel, squeeze=fin_squeeze, relu=relu, input=fin_input, init=fin_init
        )
        self.tail = nn.Identity() if tail is None else tail
        self.fc = nn.Linear(channels, num_classes)
        self.attention = attention
        self.constant_map = constant_map

    def forward(self, images: Tensor) -> LFICAMOutput:
        features = self.backbone(images)
        _check_features(features)
        grey = grey_at(images, features.shape[2:])
        importance = self.fin(features, grey)
        attended, attention = _attend(features, importance, self.constant_map)
        if not self.training and not _traced() and attention.device.type == "cpu":
            _check_finite(attention)
        passed = self.tail(attended if self.attention else features)
        if passed.ndim != 4 or passed.shape[1] != self.fc.in_features:
            raise ValueError(
                f"tail must give (B, {self.fc.in_features}, h, w), as many channels as the features have; "
                f"it gave {tuple(passed.shape)}"
            )
        return LFICAMOutput(self.fc(passed.mean((2, 3))), attention, importance)


def grey_at(images: Tensor, size: torch.Size) -> Tensor:
    """(B, 1, *size): mean of the channels, bilinear, align_corners=False."""
    grey = images.mean(1, keepdim=True)
    return functional.interpolate(grey, size=tuple(size), mode="bilinear", align_corners=False)


def _check_finite(attention: Tensor) -> None:
    if math.isfinite(attention.sum().item()):  # one pass, where nothing is wrong
        return
    finite = attention.flatten(1).isfinite().all(1)
    if not finite.all():
        image = int((~finite).nonzero()[0])
        raise ValueError(f"features of image {image} are not finite; check the images and weights")


def _check_features(features: Any) -> None:
    if not isinstance(features, Tensor) or features.ndim != 4:
        given = str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the backbone must give features (B, K, h, w); it gave {given}. Pass layer=, the name of the one that "
            "gives them, or leave channels= out to have the last one found"
        )
    if features.shape[2] * features.shape[3] == 1:
        raise ValueError(
            "the backbone's features have a single position, of which no map can be made; "
            "pass larger images, or fastcam.nn.features_of(model, layer) for an earlier layer"
        )


def _features(
    backbone: nn.Module, layer: str | nn.Module | None, channels: int | None, image_size: tuple[int, int, int]
) -> tuple[nn.Module, int]:
    """The part of the backbone that gives the features, and how many there are."""
    if isinstance(backbone, tuple) and len(backbone) == 2 and all(isinstance(part, nn.Module) for part in backbone):
        raise TypeError(
            "backbone must be a torch.nn.Module; got two, as densenet_bc gives them: features, tail = densenet_bc(); "
            "LFICAM(features, num_classes, tail=tail)"
        )
    if not isinstance(backbone, nn.Module):
        raise TypeError(
            f"backbone must be a torch.nn.Module; got {type(backbone).__name__}. Of a captured or exported network, "
            "pass the module it was made from: it is captured again where that is needed"
        )
    parameter = next((p for p in backbone.parameters() if p.is_floating_point()), torch.zeros(()))
    image = parameter.new_zeros((1, *image_size), requires_grad=False)
    if layer is not None:
        backbone = features_of(backbone, layer, image)
    if channels is not None:
        return backbone, channels
    features = _run(backbone, image)
    if layer is None and not (isinstance(features, Tensor) and features.ndim == 4):
        backbone = features_of(backbone, None, image)
        features = _run(backbone, image)
    _check_features(features)
    return backbone, int(features.shape[1])


def _run(backbone: nn.Module, image: Tensor) -> Any:
    try:
        with evaluating(backbone), torch.no_grad():
            return backbone(image)
    except RuntimeError as error:
        raise RuntimeError(
            f"the backbone does not run on a black image of image_size={tuple(image.shape[1:])}, by which its channels "
            f"are counted: {error}. Pass the size that it takes, or channels="
        ) from error


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or transformed()


# What follows are the two ops or, in a network that is being captured or transformed by torch.func, the same in plain
# operators: those have rules in every method, and for every transform.


def _plainly() -> bool:
    return torch.compiler.is_exporting() or transformed()


def _mask(features: Tensor, grey: Tensor) -> Tensor:
    if not _plainly():
        return ops.lfi_mask(features, grey)
    masks = torch.where(features == 0, 0, _min_max(features, torch.ones_like(features)))
    return masks * grey


def _attend(features: Tensor, importance: Tensor, constant_map: str) -> tuple[Tensor, Tensor]:
    if not _plainly():
        return ops.lfi_attend(features, importance, constant_map)
    weighted = (importance[:, :, None, None] * features).sum(1, keepdim=True).relu()
    attention = _min_max(weighted, weighted if constant_map == "raw" else torch.zeros_like(weighted))
    return (1 + attention) * features, attention


def _min_max(maps: Tensor, constant: Tensor) -> Tensor:
    """Each (h, w) map scaled to [0, 1]; `constant` where it is constant, with finite gradients there too."""
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    varied = high > low
    return torch.where(varied, (maps - low) / torch.where(varied, high - low, 1), constant)
