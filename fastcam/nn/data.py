"""Labelled images to train on: a folder of them, or the testbed's digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fastcam._pictures import upright_rgb

__all__ = ["ImageFolder", "Images", "Stored", "augmented", "digits", "image_folder"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


class Images(Protocol):
    """Labelled images, one at a time: `image(i)` is (3, H, W) in [0, 1], the same at every call."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    """Images (N, 3, H, W) in memory with labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        return self.images[index]


@dataclass(frozen=True)
class ImageFolder:
    """Image files, decoded when asked for, as `fastcam run` does (upright, what is transparent on white, 16-bit grey
    scaled to 8); `resize` is the shorter side's length, or None."""

    paths: Sequence[Path]
    labels: Tensor
    resize: int | None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        """Raises ValueError naming the file where it cannot be read."""
        import numpy as np
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as file:
                file.load()  # what is cut short says so here
                picture = upright_rgb(file)
        except Exception as error:
            raise ValueError(f"cannot read the image {path}: {error}") from error
        if self.resize is not None:
            scale = self.resize / min(picture.size)
            size = tuple(max(self.resize, round(side * scale)) for side in picture.size)
            picture = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1).contiguous()


def image_folder(root: str | Path, *, resize: int | None = None) -> tuple[ImageFolder, list[str]]:
    """The images of `root`/class/..., and the classes' names in alphabetical order; hidden folders are no classes.

    Raises ValueError where there is no such folder, no class, or a class without images.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"{root} holds no folders; expected one for each class, with its images inside")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise ValueError(f"class folder {root / name} holds no images ({', '.join(sorted(SUFFIXES))})")
        paths += found
        labels += [label] * len(found)
    return ImageFolder(paths, torch.tensor(labels), resize), names


def digits(count: int, *, split: str = "train", seed: int = 0, size: int = 32) -> tuple[Stored, Tensor]:
    """Close-ups of digits on photographs (`fastcam.testbed.close_ups`), and their masks (N, size, size)."""
    from fastcam.testbed import close_ups, make_scenes

    views = close_ups(make_scenes((count + 1) // 2, split=split, seed=seed, size=2 * size))
    return Stored(views.images[:count], views.labels[:count]), views.masks[:count]


def augmented(image: Tensor, size: int, how: str, seed: Sequence[int]) -> Tensor:
    """A random view (3, size, size) of an image, decided by `seed` alone.

    how  "crop": padded by an eighth of the side and cut out at random · "crop+flip": and mirrored at random ·
         "resized": a random part of 8 to 100 % of the area, enlarged, and mirrored at random · "none": the middle
    """
    generator = torch.Generator().manual_seed(hash(tuple(seed)) & 0x7FFF_FFFF_FFFF_FFFF)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    if how == "resized":
        height, width = image.shape[1:]
        for _ in range(10):
            area, ratio = uniform(0.08, 1) * height * width, 2 ** uniform(-0.415, 0.415)
            h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if 0 < h <= height and 0 < w <= width:
                break
        else:
            h = w = min(height, width)
        top, left = int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1))
        view = image[:, top : top + h, left : left + w].unsqueeze(0)
        view = functional.interpolate(view, (size, size), mode="bilinear", align_corners=False, antialias=True)[0]
    else:
        pad = size // 8 if how != "none" else 0
        padded = functional.pad(image, (pad,) * 4)
        height, width = padded.shape[1] - size, padded.shape[2] - size
        top, left = height // 2, width // 2
        if how != "none":
            top, left = int(uniform(0, height + 1)), int(uniform(0, width + 1))
        view = padded[:, top : top + size, left : left + size]
    if how in ("crop+flip", "resized") and uniform(0, 1) < 0.5:
        view = view.flip(2)
    return view
