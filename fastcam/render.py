"""Maps as pictures: overlays, outlines, rings, and labelled panels. Needs the extra `viz` (pillow, matplotlib)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from fastcam import ops
from fastcam._dtypes import ACCUMULATION, accumulation_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["COLORMAPS", "Group", "colours", "outline", "overlay", "panel", "ring", "to_pixels"]

COLORMAPS = {
    **dict.fromkeys(("turbo", "jet", "inferno", "magma", "viridis"), "unsigned"),
    **dict.fromkeys(("coolwarm", "bwr", "seismic"), "signed"),
}
"""Colormap to the maps it shows: "unsigned" in [0,1], "signed" in [-1,1] with zero at the middle colour."""


def to_pixels(images: Tensor, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """round(255 clamp(images * std + mean)): images (...,3,H,W) or (...,1,H,W) to uint8 pixels (...,H,W,3).

    mean and std per channel undo the network's normalisation; without them the images are already in [0,1].
    The result is contiguous and on the images' device. Errors: ValueError for another channel count, for images that
    need mean and std but came without, and for one of them alone; TypeError for images that are not floating point.
    """
    _check_images(images, mean, std)
    values = images.detach().float()
    if mean is not None and std is not None:
        scale, shift = (torch.tensor(tuple(each), device=values.device).view(-1, 1, 1) for each in (std, mean))
        values = values * scale + shift
    pixels = values.expand(*values.shape[:-3], 3, *values.shape[-2:]).movedim(-3, -1)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()


def overlay(
    images: Tensor,
    maps: Tensor,
    colormap: str = "turbo",
    *,
    alpha: float = 0.8,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """(1 - o) image + o colour(map), with opacity o = alpha sqrt(|map|): no evidence, no colour.

    images (...,3,H,W) or (...,1,H,W); maps (...,H,W) of the same leading shape, in [0,1] for an unsigned colormap and
    in [-1,1] for a signed one (`COLORMAPS`); result (...,H,W,3) uint8, contiguous, on the images' device. To show T
    maps of each image, pass images.unsqueeze(1).expand(-1, T, -1, -1, -1). mean, std: see `to_pixels`.
    Errors: ValueError for shapes that do not fit, maps out of range or not finite, alpha outside [0,1], an unknown
    colormap; ImportError with the command that installs matplotlib.
    """
    if maps.shape != images.shape[:-3] + images.shape[-2:]:
        raise ValueError(
            f"maps {tuple(maps.shape)} do not fit images {tuple(images.shape)}: expected (...,H,W) of both"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0,1], got {alpha}")
    signed = _is_signed(colormap)
    _check_images(images, mean, std)
    lowest = -1 if signed else 0
    if maps.numel():
        low, high = (extreme.item() for extreme in maps.detach().aminmax())
        if not (low >= lowest - 1e-3 and high <= 1 + 1e-3):
            cure = "" if signed else "; a signed map needs a signed colormap such as 'coolwarm'"
            raise ValueError(f"{colormap!r} shows maps in [{lowest},1], got {low:.3g} to {high:.3g}{cure}")
    pixels = images.detach() if images.dtype in ACCUMULATION else images.detach().float()
    acc = accumulation_dtype(pixels.dtype)
    values = maps.detach().to(pixels.device, maps.dtype if maps.dtype in (pixels.dtype, acc) else acc)
    if images.ndim == 5 and images.stride(1) == 0:  # maps of one image
        pixels = pixels[:, 0]
    else:
        pixels, values = pixels.reshape(-1, *pixels.shape[-3:]), values.reshape(-1, *values.shape[-2:])
    table = colours(colormap).to(pixels.device, acc)
    numbers = {k: None if v is None else [float(n) for n in v] for k, v in (("mean", mean), ("std", std))}
    found = ops.overlay(pixels, values, table, float(alpha), signed, **numbers)
    return found.view(*maps.shape, 3)


def outline(pixels: Tensor, mask: Tensor, *, dim: float = 0.35, colour: Sequence[int] = (255, 255, 255)) -> Tensor:
    """Pixels (H,W,3) uint8 darkened to `dim` outside mask (H,W) bool, the mask's rim in `colour`; a new tensor."""
    _check_pixels(pixels)
    if mask.dtype != torch.bool or mask.shape != pixels.shape[:2]:
        raise ValueError(f"mask must be bool {tuple(pixels.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
    touches_outside = functional.max_pool2d((~mask).float()[None], 3, 1, 1)[0] > 0
    result = torch.where(mask.unsqueeze(-1), pixels.float(), pixels.float() * dim).round().to(torch.uint8)
    result[mask & touches_outside] = torch.tensor(colour, dtype=torch.uint8, device=pixels.device)
    return result


def ring(
    pixels: Tensor, row: float, column: float, *, radius: float = 6.0, colour: Sequence[int] = (255, 255, 255)
) -> Tensor:
    """Pixels (H,W,3) uint8 with a ring of `colour` on a dark edge around (row, column), cut at the border; a copy."""
    _check_pixels(pixels)
    rows, columns = (torch.arange(n, device=pixels.device, dtype=torch.float32) for n in pixels.shape[:2])
    distance = ((rows - row).square().unsqueeze(1) + (columns - column).square()).sqrt().sub(radius).abs()
    result = pixels.float()
    for paint, half_width in (((20, 20, 20), 1.8), (colour, 1.0)):
        coverage = (half_width + 0.5 - distance).clamp(0, 1).unsqueeze(-1)
        result = result + coverage * (torch.tensor(paint, device=pixels.device) - result)
    return result.round().to(torch.uint8)


@dataclass(frozen=True)
class Group:
    """One image of a panel: a large picture with a caption, beside it rows of a label and one cell a column.

    picture and cells are uint8 (H,W,3); the text of a cell that is a string stands in an empty field. A label's first
    line is large, further lines are small.
    """

    picture: Tensor
    caption: str
    rows: Sequence[tuple[str, Sequence[Tensor | str]]]


def panel(
    groups: Sequence[Group],
    path: str | Path,
    *,
    columns: Sequence[str],
    title: str = "",
    note: str = "",
    cell: int = 112,
) -> Path:
    """Writes groups under each other as one PNG and returns its path; a cell is `cell` pixels wide and high.

    columns are the titles of the cells; title stands above, note (any number of lines) below. What is too wide for its
    place is cut in the middle. Missing folders are made.
    Errors: ValueError for no groups, groups without rows, or a row with another number of cells than columns;
    ImportError with the command that installs pillow.
    """
    if not groups or any(not group.rows for group in groups):
        raise ValueError("a panel needs at least one group, and each group at least one row")
    for label, cells in (row for group in groups for row in group.rows):
        if len(cells) != len(columns):
            raise ValueError(f"row {label!r} has {len(cells)} cells for {len(columns)} columns")
    Image, ImageDraw, ImageFont = _pillow()
    gap, margin, ink, grey = 4, 20, (28, 30, 34), (112, 117, 125)
    text, small, large = (ImageFont.load_default(size) for size in (cell // 7, cell // 8, cell // 5))
    picture = max(len(group.rows) for group in groups) * (cell + gap) - gap
    label_width = cell // 2
    left = margin + picture + label_width
    right = left + len(columns) * (cell + gap) - gap
    wrapped = ["\n".join(_wrapped(line, text.getlength, cell) for line in column.splitlines()) for column in columns]
    titles = [_fitted(column, text.getlength, cell) for column in wrapped]
    captions = [_fitted(group.caption, text.getlength, right - margin) for group in groups]
    top = margin + (cell // 3 if title else 0) + cell // 6 * max(len(each.splitlines()) for each in ("", *titles))
    heights = [
        len(group.rows) * (cell + gap) + (len(caption.splitlines()) + 1) * cell // 6
        for group, caption in zip(groups, captions, strict=True)
    ]
    foot = len(note.splitlines()) * (cell // 5)
    sheet = Image.new("RGB", (right + margin, top + sum(heights) + foot + margin // 2), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), title, ink, large)
    for place, column in enumerate(titles):
        above = (left + place * (cell + gap) + cell / 2, top - 5)
        draw.multiline_text(above, column, ink, text, anchor="md", align="center", spacing=1)
    for group, caption, height in zip(groups, captions, heights, strict=True):
        tall = len(group.rows) * (cell + gap) - gap
        sheet.paste(_scaled(Image, group.picture, tall), (margin, top))
        draw.text((margin, top + tall + 5), caption, grey, text)
        for number, (label, cells) in enumerate(group.rows):
            upper = top + number * (cell + gap)
            head, _, rest = label.partition("\n")
            head, rest = (_fitted(t, f.getlength, label_width - gap) for t, f in ((head, large), (rest, small)))
            draw.text((left - label_width / 2, upper + cell / 2), head, ink, large, anchor="mm")
            draw.multiline_text((left - label_width / 2, upper + 5 * cell / 8), rest, grey, small, anchor="ma")
            for place, content in enumerate(cells):
                corner = (left + place * (cell + gap), upper)
                if isinstance(content, str):
                    draw.rectangle((*corner, corner[0] + cell - 1, upper + cell - 1), (243, 244, 246))
                    middle = (corner[0] + cell / 2, upper + cell / 2)
                    draw.multiline_text(middle, content, grey, small, anchor="mm", align="center")
                else:
                    sheet.paste(_scaled(Image, content, cell), corner)
        top += height
    draw.multiline_text((margin, top), note, grey, text)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path


def _wrapped(title: str, width: Callable[[str], float], limit: float) -> str:
    """The title, or if it is too wide two lines, broken behind the space or underscore that makes them most equal."""
    breaks = [place + 1 for place, letter in enumerate(title) if letter in " _"]
    if width(title) <= limit or not breaks:
        return title
    best = min(breaks, key=lambda place: max(width(title[:place]), width(title[place:])))
    return f"{title[:best]}\n{title[best:]}"


def _fitted(text: str, width: Callable[[str], float], limit: float) -> str:
    """The text, of lines that are too wide their beginning and end with "…" between."""

    def cut(line: str, kept: int) -> str:
        return line if kept >= len(line) else f"{line[: kept - kept // 2]}…{line[len(line) - kept // 2 :]}"

    lines = []
    for line in text.splitlines():
        kept = min(len(line), int(limit))  # no letter is narrower than a pixel
        while kept and width(cut(line, kept)) > limit:
            kept -= 1
        lines.append(cut(line, kept))
    return "\n".join(lines)


def _scaled(module: Any, pixels: Tensor, side: int) -> Image:
    _check_pixels(pixels)
    image = module.fromarray(pixels.cpu().numpy())
    return image if image.size == (side, side) else image.resize((side, side), module.Resampling.BICUBIC)


def _check_pixels(pixels: Tensor) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be uint8 (H,W,3), got {pixels.dtype} {tuple(pixels.shape)}")


def _check_images(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, got {images.dtype}")
    if images.ndim < 3 or images.shape[-3] not in (1, 3):
        raise ValueError(f"images must be (...,3,H,W) or (...,1,H,W), got {tuple(images.shape)}")
    if (mean is None) != (std is None):
        raise ValueError(f"give both mean and std or neither, got mean={mean}, std={std}")
    if mean is None and images.numel():
        low, high = (extreme.item() for extreme in images.detach().aminmax())
        if low < -0.01 or high > 1.01:
            raise ValueError(
                f"images must lie in [0,1], got {low:.3g} to {high:.3g}; normalised images need mean= and std="
            )


def _is_signed(colormap: str) -> bool:
    if colormap not in COLORMAPS:
        close = difflib.get_close_matches(colormap, COLORMAPS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown colormap {colormap!r}: {hint}there are {', '.join(COLORMAPS)}")
    return COLORMAPS[colormap] == "signed"


@lru_cache(maxsize=len(COLORMAPS))
def colours(colormap: str) -> Tensor:
    """The colormap's 256 colours in [0,255], (256,3) float64 on the CPU."""
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError("colormaps need matplotlib: pip install 'fastcam[viz]'") from error
    return 255 * torch.tensor([colormaps[colormap](step)[:3] for step in range(256)], dtype=torch.float64)


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError("panels need pillow: pip install 'fastcam[viz]'") from error
    return Image, ImageDraw, ImageFont
