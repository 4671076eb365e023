"""Pictures of maps: every pixel against the written formula, every refusal against its message."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

import matplotlib
import numpy as np
from PIL import Image

from fastcam import render


def test_to_pixels_by_hand():
    images = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1).expand(2, 3, 4, 5)
    pixels = render.to_pixels(images)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels.dtype == torch.uint8
    assert pixels[1, 2, 3].tolist() == [0, 64, 255]
    grey = render.to_pixels(torch.full((1, 4, 5), 0.5))
    assert grey.shape == (4, 5, 3)
    assert (grey == 128).all()


def test_to_pixels_undoes_the_normalisation():
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    prepared = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    difference = render.to_pixels(prepared, mean=mean, std=std).int() - render.to_pixels(images).int()
    assert difference.abs().max() <= 1  # one rounding step


@pytest.mark.parametrize("colormap", ["turbo", "jet", "coolwarm"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_overlay_is_its_formula(colormap, alpha):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 5, 7, generator=generator)
    maps = torch.rand(2, 5, 7, generator=generator)
    if colormap == "coolwarm":
        maps = 2 * maps - 1
    out = render.overlay(images, maps, colormap, alpha=alpha)
    assert out.shape == (2, 5, 7, 3)
    assert out.dtype == torch.uint8
    # Oracle: the docstring's formula pixel by pixel, colours from matplotlib's own lookup.
    place = maps.numpy() if colormap != "coolwarm" else (maps.numpy() + 1) / 2
    colour = 255 * matplotlib.colormaps[colormap](np.rint(place * 255).astype(int))[..., :3]
    opacity = alpha * np.sqrt(np.abs(maps.numpy()))[..., None]
    base = np.rint(255 * images.permute(0, 2, 3, 1).numpy())
    expected = (1 - opacity) * base + opacity * colour
    assert np.abs(out.numpy() - expected).max() <= 0.51  # half a rounding step


def test_overlay_leaves_the_image_where_there_is_no_evidence():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    for colormap in render.COLORMAPS:
        assert torch.equal(render.overlay(image, torch.zeros(8, 8), colormap), render.to_pixels(image))


def test_overlay_of_several_maps_an_image():
    images, maps = torch.rand(2, 3, 6, 6), torch.rand(2, 4, 6, 6)
    out = render.overlay(images.unsqueeze(1).expand(-1, 4, -1, -1, -1), maps)
    assert torch.equal(out[1, 2], render.overlay(images[1], maps[1, 2]))


@pytest.mark.parametrize(
    ("images", "maps", "options", "message"),
    [
        (torch.rand(2, 3, 4, 4), torch.rand(2, 5, 5), {}, r"\(2, 5, 5\) do not fit images \(2, 3, 4, 4\)"),
        (torch.rand(2, 4, 4, 4), torch.rand(2, 4, 4), {}, r"got \(2, 4, 4, 4\)"),
        (torch.rand(3, 4, 4), -torch.ones(4, 4), {}, r"\[0,1\], got -1 to -1; a signed map needs"),
        (torch.rand(3, 4, 4), torch.full((4, 4), float("nan")), {}, "got nan"),
        (torch.rand(3, 4, 4) * 5 - 2, torch.rand(4, 4), {}, "need mean= and std="),
        (torch.rand(3, 4, 4), torch.rand(4, 4), {"colormap": "turbot"}, "did you mean 'turbo'"),
        (torch.rand(3, 4, 4), torch.rand(4, 4), {"alpha": 2.0}, "alpha must lie in .*got 2.0"),
        (torch.rand(3, 4, 4), torch.rand(4, 4), {"mean": (0.5, 0.5, 0.5)}, "both mean and std"),
    ],
)
def test_bad_overlays_are_named(images, maps, options, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        render.overlay(images, maps, **options)


def test_outline_by_hand():
    pixels = torch.full((7, 7, 3), 200, dtype=torch.uint8)
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[1:6, 1:6] = True
    out = render.outline(pixels, mask, dim=0.5, colour=(1, 2, 3))
    assert out[0, 0].tolist() == [100, 100, 100]
    assert out[1, 3].tolist() == [1, 2, 3]
    assert out[3, 3].tolist() == [200, 200, 200]
    assert (pixels == 200).all()


def test_ring_by_hand():
    pixels = torch.full((21, 21, 3), 200, dtype=torch.uint8)
    out = render.ring(pixels, 10, 10, radius=5, colour=(255, 0, 10))
    assert out[10, 15].tolist() == out[5, 10].tolist() == [255, 0, 10]
    assert out[10, 10].tolist() == out[0, 0].tolist() == [200, 200, 200]
    assert out[10, 17].tolist() != [200, 200, 200]  # the dark edge
    assert render.ring(pixels, 0, 20).shape == pixels.shape
    with pytest.raises(ValueError, match=r"uint8 \(H,W,3\), got torch.float32"):
        render.ring(pixels.float(), 0, 0)


def test_panel_places_its_cells(tmp_path):
    def plain(red):
        return torch.tensor([red, 0, 0], dtype=torch.uint8).expand(10, 10, 3)

    group = render.Group(plain(50), "caption", [("a", [plain(100), plain(150)]), ("b", [plain(200), "no map"])])
    path = render.panel([group], tmp_path / "new" / "panel.png", columns=["one", "two"], cell=40)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    for red, area in ((50, 84 * 84), (100, 1600), (150, 1600), (200, 1600)):
        rows = np.nonzero((picture == (red, 0, 0)).all(-1))[0]
        assert len(rows) == area, red  # a full, unscaled-colour square
        assert (np.ptp(rows) + 1) ** 2 == area
    column = {red: np.nonzero((picture == (red, 0, 0)).all(-1))[1].min() for red in (50, 100, 150, 200)}
    assert column[50] < column[100] == column[200] < column[150]


def test_long_texts_of_a_panel_stay_in_their_place(tmp_path):
    """No text runs over a picture or into the next column's, and every line of a caption is on the sheet."""

    def sheet(name, columns, caption, label="a"):
        cells = [torch.full((40, 40, 3), red, dtype=torch.uint8) for red in (60, 120)]
        groups = [render.Group(cells[0], caption, [(label, cells)]), render.Group(cells[1], "next", [("b", cells)])]
        path = render.panel(groups, tmp_path / f"{name}.png", columns=columns, cell=120)
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    short = sheet("short", ["x", "two"], "one line")
    left = 20 + 120 + 60  # margin, picture, label
    long = sheet("long", ["averylongnameofaclassindeed", "two"], "one line", "far too long a label")
    assert np.array_equal(short[:, left + 124 :], long[:, left + 124 :])  # the second column
    assert not np.array_equal(short, long)
    lines = sheet("lines", ["x", "two"], "one line\nanother\nand a third, with words without end " + 40 * "word ")
    assert lines.shape[0] == short.shape[0] + 40  # two lines more
    for found in (long, lines):
        for red in (60, 120):
            assert (found == red).all(-1).sum() == 3 * 120 * 120
    ink = lambda found: np.flatnonzero((found.sum(-1) < 600)[:, 20:140].any(1))  # noqa: E731
    assert ink(lines)[-1] - 40 == ink(short)[-1] < short.shape[0] - 5


def test_bad_panels_are_named(tmp_path):
    cell = torch.zeros(4, 4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least one group"):
        render.panel([], tmp_path / "x.png", columns=[])
    with pytest.raises(ValueError, match="row 'a' has 1 cells for 2 columns"):
        render.panel([render.Group(cell, "", [("a", [cell])])], tmp_path / "x.png", columns=["one", "two"])


def test_missing_packages_name_the_command(monkeypatch, tmp_path):
    cell = torch.zeros(4, 4, 3, dtype=torch.uint8)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'fastcam\[viz\]'$"):
        render.panel([render.Group(cell, "", [("a", [cell])])], tmp_path / "x.png", columns=["one"])
    render.colours.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'fastcam\[viz\]'$"):
        render.overlay(torch.rand(3, 4, 4), torch.rand(4, 4))


def test_importing_loads_no_plotting_package():
    code = (
        "import sys, fastcam.render, fastcam.cli, fastcam.testbed;"
        "print([m for m in ('PIL', 'matplotlib', 'sklearn', 'skimage', 'safetensors') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
