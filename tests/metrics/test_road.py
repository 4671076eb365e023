"""ROAD against a loop that solves the whole system densely for one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcam import metrics


def imputed(image: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Every missing pixel the weighted mean of its neighbours: a dense linear system."""
    channels, height, width = image.shape
    places = np.argwhere(missing)
    number = {tuple(place): i for i, place in enumerate(places)}
    matrix, right = np.zeros((len(places), len(places))), np.zeros((len(places), channels))
    for i, (y, x) in enumerate(places):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                at = y + dy, x + dx
                if (dy, dx) == (0, 0) or not (0 <= at[0] < height and 0 <= at[1] < width):
                    continue
                weight = 1 / 6 if 0 in (dy, dx) else 1 / 12
                matrix[i, i] += weight
                if at in number:
                    matrix[i, number[at]] -= weight
                else:
                    right[i] += weight * image[:, at[0], at[1]]
    found = image.copy()
    found[:, missing] = np.linalg.solve(matrix, right).T
    return found


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_equals_a_loop(model, images, targets, noise):
    maps = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fractions = (0.1, 0.5, 0.8)
    settings = {"fractions": fractions, "noise": noise, "chunk": 4}
    grain = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy() * noise
    want = {}
    for order, sign in (("most", 1), ("least", -1)):
        scores = np.empty((3, 3))
        for i in range(3):
            values = sign * maps[i].numpy()
            for j, share in enumerate(fractions):
                missing = values >= np.percentile(values, 100 * (1 - share))
                filled = imputed(images[i].numpy(), missing)
                filled[:, missing] += grain[:, missing]
                with torch.no_grad():
                    scores[i, j] = model(torch.from_numpy(filled)[None]).softmax(1)[0, targets[i]]
        want[order] = scores
        curve = metrics.road_curve(model, images, maps, targets, order=order, **settings)
        np.testing.assert_allclose(curve.scores.numpy(), scores, atol=1e-7)
        assert curve.fractions.tolist() == list(fractions)
    combined = metrics.road(model, images, maps, targets, **settings)
    np.testing.assert_allclose(combined.numpy(), (want["least"] - want["most"]).mean(1) / 2, atol=1e-7)


def test_equal_values_are_taken_in_row_order(model, images, targets):
    flat = torch.zeros(3, 6, 7, dtype=torch.float64)
    order = -torch.arange(42, dtype=torch.float64).reshape(1, 6, 7).expand(3, 6, 7)
    torch.testing.assert_close(
        metrics.road_curve(model, images, flat, targets).scores,
        metrics.road_curve(model, images, order, targets).scores,
    )


def test_errors(model, images, maps, targets):
    with pytest.raises(ValueError, match="order must be 'most' or 'least'; got 'best'"):
        metrics.road_curve(model, images, maps, targets, order="best")
    with pytest.raises(ValueError, match="noise must be a finite standard deviation; got -1"):
        metrics.road(model, images, maps, targets, noise=-1)
    with pytest.raises(ValueError, match="ascend within"):
        metrics.road(model, images, maps, targets, fractions=())
    with pytest.raises(ValueError, match="ascend within"):
        metrics.road(model, images, maps, targets, fractions=(0.1, math.inf))
