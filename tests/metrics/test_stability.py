"""Stability of maps on cases counted by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from fastcam.metrics import map_iou, map_stability


def boxes(*columns: tuple[int, int]) -> torch.Tensor:
    """(N, 4, 8) maps that are 1 between two columns."""
    maps = torch.zeros(len(columns), 4, 8)
    for row, (start, stop) in enumerate(columns):
        maps[row, :, start:stop] = 1
    return maps


def test_cases_counted_by_hand():
    a = boxes((0, 4), (0, 4), (0, 4), (0, 0))
    b = boxes((0, 4), (4, 8), (2, 6), (0, 0))
    found = map_iou(a, b)
    assert found[:3].tolist() == [1, 0, pytest.approx(1 / 3)]
    assert found[3].isnan()
    torch.testing.assert_close(map_iou(b, a), found, equal_nan=True)


def test_threshold_is_strict():
    at = torch.full((1, 2, 2), 100 / 255, dtype=torch.float64)
    assert map_iou(at, at).isnan()
    assert map_iou(at + 1e-9, at + 1e-9).item() == 1


def test_mean_over_images_then_over_pairs():
    maps = torch.stack([boxes((0, 4), (0, 4)), boxes((0, 4), (2, 6)), boxes((4, 8), (0, 0))])
    mean, spread, left_out = map_stability(maps)
    # pairs: (1 + 1/3) / 2, (0 + 0) / 2, (0 + 0) / 2
    assert mean == pytest.approx(2 / 9)
    assert spread == pytest.approx(math.sqrt(2 / 9 * (2 / 3) ** 2))
    assert left_out == 0
    nothing = torch.zeros(2, 3, 4, 4)
    nothing[:, 0] = 1
    assert map_stability(nothing) == (1, 0, 2)


def test_released_mode_counts_empty_rows_and_wraps_the_maximum():
    a, b = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    a[0, 0, :4] = 0.9
    b[0, 0, 2:6] = 0.9
    assert map_iou(a, b, mode="released").item() == pytest.approx((1 / 3 + 3) / 4, abs=1e-5)
    a[0, 1, 0] = 1  # the maximum, in a row of its own, becomes 0
    assert map_iou(a, b, mode="released").item() == pytest.approx((1 / 3 + 3) / 4, abs=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="share one shape"):
        map_iou(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="at least two models"):
        map_stability(torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="mode must be"):
        map_iou(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), mode="fast")


def test_rooms_stand_below_the_package():
    names = "fastcam.metrics.map_iou", "fastcam.render.panel", "fastcam.nn.LFICAM"
    code = f"import fastcam; print({', '.join(f'{name}.__name__' for name in names)})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["map_iou", "panel", "LFICAM"], done.stderr


def test_nan_and_pairs_without_images():
    maps = torch.zeros(3, 2, 4, 4)
    maps[0] = 1
    mean, _, left_out = map_stability(maps)  # models 1 and 2 show nothing anywhere
    assert mean == 0
    assert left_out == 2
    with pytest.raises(ValueError, match="NaN"):
        map_stability(maps * torch.nan)
