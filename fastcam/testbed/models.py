"""The testbed's networks, small enough to ship: which of ten digits are in a 96x96 scene (ten independent logits), and
`tiny_embed`, which says how alike two scenes are; and `tiny_lfi`, an LFI-CAM network for 32x32 close-ups of one digit,
trained by `benchmarks/faithfulness/bench_lfi_cam.py`.

The first three take float images (N,3,S,S) that `normalize` has standardised (MEAN, STD below) and end in a 12x12
feature map for S = 96; the classifiers return logits (N,10). Between them they hold what attribution code trips over:
batch norm, residual sums, a ReLU module used twice, functional and in-place ReLU, a head that is affine (tiny_resnet)
and one that is not (tiny_vgg).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from fastcam.nn import LFICAM, resnet

__all__ = [
    "ATTENDERS",
    "EMBEDDERS",
    "MEAN",
    "MODELS",
    "STD",
    "TinyEmbed",
    "TinyResNet",
    "TinyVGG",
    "build",
    "load",
    "metadata",
]
__all__ += ["normalize"]

MEAN = (0.49, 0.38, 0.33)
STD = (0.28, 0.23, 0.23)
WEIGHTS = Path(__file__).parent / "weights"


def normalize(images: Tensor) -> Tensor:
    """(images - MEAN) / STD per channel; (N,3,H,W) in [0,1] to the models' input, same dtype and device."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


class Residual(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))); one ReLU module serves both places."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class TinyResNet(nn.Module):
    """Stem and four residual blocks (24 to 80 channels, stride 8), global average pool, one linear layer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.layer1 = Residual(24, 24, 1)
        self.layer2 = Residual(24, 48, 2)
        self.layer3 = nn.Sequential(Residual(48, 80, 2), Residual(80, 80, 1))
        self.fc = nn.Linear(80, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class TinyVGG(nn.Module):
    """Six convolutions and three max-pools down to a bottleneck of 12 maps, then an FC-ReLU-FC head for 96x96 images.

    Twelve maps are few enough to enumerate all 4096 subsets: exact Shapley values of the maps are the yardstick for
    channel weights.
    """

    def __init__(self, classes: int = 10, maps: int = 12) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(64, maps, 1), nn.ReLU()),
        )
        self.fc1 = nn.Linear(maps * 12 * 12, 64)
        self.fc2 = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images).flatten(1)
        return self.fc2(functional.relu(self.fc1(x)))


class TinyEmbed(TinyResNet):
    """TinyResNet's trunk as an embedding network: its 80 last feature maps, averaged. Scenes that share a digit have
    embeddings of similar direction."""

    def __init__(self) -> None:
        super().__init__()
        del self.fc

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(images)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {"tiny_resnet": TinyResNet, "tiny_vgg": TinyVGG}
EMBEDDERS: dict[str, Callable[[], nn.Module]] = {"tiny_embed": TinyEmbed}
ATTENDERS: dict[str, Callable[[], nn.Module]] = {"tiny_lfi": lambda: LFICAM(resnet(8), 10, channels=64)}


def build(name: str) -> nn.Module:
    """An untrained model in train mode, initialised from torch's current seed. ValueError for an unknown name."""
    known = MODELS | EMBEDDERS | ATTENDERS
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown testbed model {name!r}: {hint}there are {', '.join(known)}")
    return known[name]()


def load(name: str, path: str | Path | None = None) -> nn.Module:
    """The model with its shipped weights (or those of `path`), float32 on the CPU, in eval mode.

    Reads safetensors, never pickle. Errors: ValueError for an unknown name, ImportError with the command that installs
    safetensors, RuntimeError when the file is another architecture's.
    """
    model = build(name)
    safe_open = _safe_open()
    with safe_open(path or WEIGHTS / f"{name}.safetensors", "pt") as file:
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a mapping)
    return model.eval()


def metadata(name: str, path: str | Path | None = None) -> dict[str, str]:
    """What training wrote next to the weights: accuracies, seed, arguments, generator and torch version."""
    build(name)
    safe_open = _safe_open()
    with safe_open(path or WEIGHTS / f"{name}.safetensors", "pt") as file:
        return dict(file.metadata())


def _safe_open():  # type: ignore[no-untyped-def]
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("the testbed needs safetensors: pip install 'fastcam[testbed]'") from error
    return safe_open
