"""Scenes with known answers: two handwritten digits of different classes on a crop of a natural photograph.

Every scene is a function of (seed, split, index) alone: scene 7 is the same picture whether it is made alone, in a
batch of eight or in a batch of a thousand. Training and test scenes share neither a digit nor a pixel of background:
the digits are the first 1347 and the last 450 of scikit-learn's 1797 (the tail is harder than a shuffled sample would
be), the backgrounds are the left 65 % and the right 35 % of each photograph.

Photographs come from the installed scikit-image (astronaut: NASA, public domain; chelsea: S. van der Walt, coffee:
R. Michetti, motorcycle: D. Scharstein, all CC0; rocket: SpaceX, public domain) and scikit-learn (china, flower: CC BY
2.0, credited in its `datasets/images/README.txt`). They are opened by path, so nothing is ever downloaded.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GENERATOR_VERSION", "REGIONS", "SPLITS", "CloseUps", "Scenes", "close_ups", "make_scenes"]

GENERATOR_VERSION = 1
"""Raised whenever a change alters the pixels of any scene; stored with the trained weights."""

SPLITS = ("train", "test")
REGIONS = ("grown", "strokes", "box")
TRAIN_DIGITS = 1347
TRAIN_COLUMNS = 0.65
PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)


@dataclass(frozen=True)
class Scenes:
    """Scenes and their ground truth; slot o of an image is its object o (drawn at random, in no order).

    images (N,3,S,S) float32 in [0,1]; labels (N,2) int64, two different digits; masks (N,2,S,S) bool, the region of
    each digit, never overlapping; boxes (N,2,4) int64, left, top, right, bottom of the digit's strokes, the latter two
    exclusive.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class CloseUps:
    """Half-size views, one around each digit: images (2N,3,S/2,S/2), labels (2N,), masks (2N,S/2,S/2) of that digit."""

    images: Tensor
    labels: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)


def close_ups(scenes: Scenes) -> CloseUps:
    """Both digits of every scene, each in the middle of its view as far as the border allows."""
    side = scenes.images.shape[-1] // 2
    corners = ((scenes.boxes[..., :2] + scenes.boxes[..., 2:] - side) // 2).clamp(0, side)
    places = [
        (row, slot, slice(top, top + side), slice(left, left + side))
        for row, pair in enumerate(corners.tolist())
        for slot, (left, top) in enumerate(pair)
    ]
    return CloseUps(
        torch.stack([scenes.images[row, :, rows, columns] for row, _, rows, columns in places]),
        scenes.labels.flatten(),
        torch.stack([scenes.masks[row, slot, rows, columns] for row, slot, rows, columns in places]),
    )


def make_scenes(
    count: int, *, split: str = "test", seed: int = 0, start: int = 0, size: int = 96, region: str = "grown"
) -> Scenes:
    """Scenes start .. start+count-1 of the endless sequence that `seed` and `split` define.

    Pixel: background * (1 - a) + colour * a, with a the digit's coverage in [0,1] (8x8 grey values, enlarged to 0.26 to
    0.46 of the image side, edges sharpened). `region` says what the masks cover: "strokes" (a > 0.5), "grown" (strokes
    widened by S // 32 pixels, the default: a map of 12x12 cells cannot follow a stroke's edge), or "box".
    Errors: ValueError for a negative count or start, a side under 32, an unknown split or region; ImportError with the
    command that installs scikit-learn, scikit-image and pillow. Cost: about 2 ms a scene on one core.
    """
    if count < 0 or start < 0:
        raise ValueError(f"count and start must not be negative, got count={count}, start={start}")
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if region not in REGIONS:
        raise ValueError(f"unknown region {region!r}: choose one of {', '.join(REGIONS)}")
    images: np.ndarray = np.empty((count, size, size, 3), np.float32)
    labels: np.ndarray = np.empty((count, 2), np.int64)
    masks: np.ndarray = np.zeros((count, 2, size, size), bool)
    boxes: np.ndarray = np.empty((count, 2, 4), np.int64)
    for row in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), start + row])
        images[row] = _background(rng, split, size)
        labels[row] = rng.choice(10, 2, replace=False)
        for slot, (left, top, side) in enumerate(_places(rng, size)):
            coverage = _coverage(rng, split, int(labels[row, slot]), side)
            patch = images[row, top : top + side, left : left + side]
            colour = _colour(rng, patch.mean((0, 1)))
            patch += coverage[..., None] * (colour - patch)
            strokes = coverage > 0.5
            x0, y0, x1, y1 = boxes[row, slot] = _bounds(strokes, left, top)
            if region == "box":
                masks[row, slot, y0:y1, x0:x1] = True
            else:
                masks[row, slot, top : top + side, left : left + side] = strokes
    truth = torch.from_numpy(masks)
    if region == "grown":
        truth = _grow(truth, size // 32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Scenes(pixels, torch.from_numpy(labels), truth, torch.from_numpy(boxes))


def _background(rng: np.random.Generator, split: str, size: int) -> np.ndarray:
    from PIL.Image import Resampling

    photographs = _photographs(split)
    photograph = photographs[rng.integers(len(photographs))]
    width, height = photograph.size
    extent = rng.integers(96, min(width, height, 240) + 1)
    left, top = rng.integers(width - extent + 1), rng.integers(height - extent + 1)
    crop = photograph.resize((size, size), Resampling.BILINEAR, (left, top, left + extent, top + extent))
    pixels = np.asarray(crop, np.float32) / 255
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _places(rng: np.random.Generator, size: int) -> list[tuple[int, int, int]]:
    """Two squares (left, top, side) at least a sixteenth of the image apart; redrawn until they are."""
    gap = size // 16
    while True:
        sides = rng.integers(round(0.26 * size), round(0.46 * size) + 1, 2)
        corners = rng.integers(1, size - sides, (2, 2))
        apart = corners[:, 0] + sides[0] + gap <= corners[:, 1], corners[:, 1] + sides[1] + gap <= corners[:, 0]
        if np.any(apart):
            return [(int(corners[0, i]), int(corners[1, i]), int(sides[i])) for i in range(2)]


def _coverage(rng: np.random.Generator, split: str, digit: int, side: int) -> np.ndarray:
    """One handwritten `digit` of the split as (side, side) coverage in [0,1]."""
    from PIL.Image import Resampling, fromarray

    examples = _digits(split)[digit]
    grey = fromarray(examples[rng.integers(len(examples))]).resize((side, side), Resampling.BICUBIC)
    ramp = np.clip((np.asarray(grey) - 0.3) / 0.35, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _colour(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """A random colour that stands out: the first of eight whose luminance is 0.35 from `behind`, or the farthest."""
    luminance = np.array([0.299, 0.587, 0.114], np.float32)
    hsv = rng.uniform((0, 0.3, 0.3), (1, 1, 1), (8, 3))
    colours = np.array([colorsys.hsv_to_rgb(*candidate) for candidate in hsv], np.float32)
    distance = np.abs((colours - behind) @ luminance)
    return colours[np.argmax(np.minimum(distance, 0.35))]


def _bounds(strokes: np.ndarray, left: int, top: int) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(strokes.any(1)).tolist(), np.flatnonzero(strokes.any(0)).tolist()
    return left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1


def _grow(masks: Tensor, radius: int) -> Tensor:
    rows = functional.max_pool2d(masks.float(), (2 * radius + 1, 1), 1, (radius, 0))
    return functional.max_pool2d(rows, (1, 2 * radius + 1), 1, (0, radius)).bool()


@lru_cache(maxsize=len(SPLITS))
def _digits(split: str) -> list[np.ndarray]:
    """Per class the split's (n,8,8) float32 grey values in [0,1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn") from error
    data: Any = load_digits()
    part = slice(None, TRAIN_DIGITS) if split == "train" else slice(TRAIN_DIGITS, None)
    grey, classes = data.images[part].astype(np.float32) / 16, data.target[part]
    return [grey[classes == digit] for digit in range(10)]


@lru_cache(maxsize=len(SPLITS))
def _photographs(split: str) -> list[Image]:
    """The split's part of each photograph."""
    try:
        from PIL import Image
    except ImportError as error:
        raise _missing("pillow") from error
    parts = []
    for package, name in PHOTOGRAPHS:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise _missing("scikit-image" if package == "skimage" else "scikit-learn")
        with Image.open(Path(spec.origin).parent / name) as file:
            photograph = file.convert("RGB")
        border = round(TRAIN_COLUMNS * photograph.width)
        columns = (0, border) if split == "train" else (border, photograph.width)
        parts.append(photograph.crop((columns[0], 0, columns[1], photograph.height)))
    return parts


def _missing(package: str) -> ImportError:
    return ImportError(f"the testbed needs {package}, which is not installed: pip install 'fastcam[testbed]'")
