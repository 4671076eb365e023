"""From a picture to the numbers a network takes: resize, crop, normalise, as torchvision's evaluation transforms."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image as pillow

__all__ = ["MAX_PIXELS", "ItemError", "Prepare"]

#: Pillow's own limit, beyond which it warns of a decompression bomb.
MAX_PIXELS = 89_478_485

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")


class ItemError(Exception):
    """One picture cannot be used; str(error) is the reason, to record against it. A job goes on."""


@dataclass(frozen=True)
class Prepare:
    """picture -> (C, H, W) float32:  (crop(resize(picture)) / 255 - mean) / std

    size           (H, W) that the network takes: cut from the middle of the resized picture, which is laid on black
                   where it is smaller
    resize         length of the shorter side before that, the aspect kept; or (H, W) for both, whatever the aspect
    interpolation  Pillow's filter, in INTERPOLATIONS; all but "nearest" average over what a pixel covers
    mean, std      per channel, of pixels in [0, 1]; one channel means grey pictures

    Equal to the bit to torchvision's `Resize`, `CenterCrop`, `ToTensor`, `Normalize` on a Pillow picture. Floating
    point input (C, H, W) is prepared already and passes through as float32. Can be pickled; `Prepare(**asdict(p))`
    equals p, also by way of JSON.
    Raises ValueError where fields do not fit together, and from a call with a picture where they are not known; a call
    raises ItemError for a picture that would become absurdly large.
    """

    size: tuple[int, ...] | None = None
    resize: int | tuple[int, ...] | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("size", "resize", "mean", "std"):  # JSON makes lists of tuples
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {self.interpolation!r}")
        sides = [self.size, self.resize if isinstance(self.resize, tuple) else None]
        numbers = [n for pair in sides if pair is not None for n in pair]
        numbers += [self.resize] if isinstance(self.resize, int) else []
        if any(len(pair) != 2 for pair in sides if pair is not None) or any(n < 1 for n in numbers):
            raise ValueError(f"sizes must be positive (H, W); got size={self.size}, resize={self.resize}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"give both mean and std, or neither; got mean={self.mean}, std={self.std}")
        if self.mean is not None and self.std is not None:
            finite = all(math.isfinite(number) for number in self.mean + self.std)
            if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or not finite or min(self.std) <= 0:
                raise ValueError(
                    "mean and std must be 1 or 3 finite numbers each, std positive; "
                    f"got mean={self.mean}, std={self.std}"
                )

    @property
    def known(self) -> bool:
        """Whether pictures can be prepared."""
        return self.size is not None and self.mean is not None

    def changed(
        self,
        *,
        image_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        crop: float | str | None = None,
    ) -> Prepare:
        """The same with what is given in place of its own.

        image_size  what the network takes; without `crop` the share that is kept stays as it was
        crop        share of the shorter side that is kept (224 / 256 = 0.875), or "squash": all of it, out of aspect
        """
        size, resize = self.size, self.resize
        if image_size is not None:
            size = _pair(image_size)
            if self.size is None or resize is None:
                resize = min(size)
            elif isinstance(resize, int):
                resize = math.floor(resize * min(size) / min(self.size))
            else:
                resize = tuple(math.floor(r * n / o) for r, n, o in zip(resize, size, self.size, strict=True))
        if crop is not None:
            if size is None:
                raise ValueError(f"crop={crop} needs image_size=, the size the network takes")
            if crop == "squash":
                resize = size
            elif isinstance(crop, (int, float)) and 0 < crop <= 1:
                resize = math.floor(min(size) / crop)
            else:
                raise ValueError(f"crop must be 'squash' or a share in (0, 1], such as 0.875; got {crop!r}")
        return Prepare(
            size,
            resize,
            interpolation or self.interpolation,
            self.mean if mean is None else tuple(float(x) for x in mean),
            self.std if std is None else tuple(float(x) for x in std),
        )

    def __call__(self, image: pillow.Image | np.ndarray | Tensor) -> Tensor:
        """(C, H, W) float32."""
        if isinstance(image, (np.ndarray, Tensor)) and "float" in str(image.dtype):
            return torch.as_tensor(image).to(torch.float32)
        pixels = torch.from_numpy(np.array(self.view(image)))
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return pixels.to(torch.float32).contiguous().div_(255).sub_(mean).div_(std)

    def describe(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def view(self, image: pillow.Image | np.ndarray | Tensor) -> pillow.Image:
        """What the network sees of a picture, before it is normalised: mode RGB, or L for one channel."""
        from PIL import Image

        if self.size is None or self.mean is None:
            raise ValueError(
                "how the model wants its pictures is not known: give image_size=, mean= and std= "
                "(and crop=, interpolation= where they are not 1.0 and 'bilinear')"
            )
        if isinstance(image, Tensor):
            image = image.cpu().numpy()
        picture = image if not isinstance(image, np.ndarray) else Image.fromarray(_squeezed(image))
        mode = "L" if len(self.mean) == 1 else "RGB"
        picture = picture if picture.mode == mode else picture.convert(mode)
        width, height = self._resized(*picture.size)
        if width * height > max(MAX_PIXELS, 4 * self.size[0] * self.size[1]):
            raise ItemError(
                f"{picture.width} x {picture.height} pixels would become {width} x {height}: too narrow a picture"
            )
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling[self.interpolation.upper()])
        # round() takes halves to even, as torchvision does
        left, top = round((width - self.size[1]) / 2), round((height - self.size[0]) / 2)
        if (width, height) == (self.size[1], self.size[0]):
            return picture
        if left < 0 or top < 0:
            ground = Image.new(mode, (max(width, self.size[1]), max(height, self.size[0])))
            at = max((self.size[1] - width) // 2, 0), max((self.size[0] - height) // 2, 0)
            ground.paste(picture, at)
            picture = ground
            left, top = round((ground.width - self.size[1]) / 2), round((ground.height - self.size[0]) / 2)
        return picture.crop((left, top, left + self.size[1], top + self.size[0]))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        if self.resize is None:
            return width, height
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width <= height else (long, self.resize)


def too_many_pixels(width: int, height: int, max_pixels: int) -> str:
    return (
        f"{width} x {height} pixels are more than the {max_pixels} allowed; a decompression bomb? (from Python, "
        "fastcam.jobs.sources.open_source(PATH, max_pixels=N) gives images with another limit)"
    )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"image_size must be an integer or (H, W); got {size}")
    return int(sides[0]), int(sides[1])


def _squeezed(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ItemError(f"a picture must be uint8 (H, W, 3 or 1); got {image.dtype} {image.shape}")
    return image[..., 0] if image.shape[2] == 1 else image
