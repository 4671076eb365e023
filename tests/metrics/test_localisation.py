"""Maps against masks: cases counted by hand, scikit-learn's average precision, scipy's rank correlation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcam import metrics

from .conftest import draw

MAPS = torch.tensor(
    [
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.6, 0.0], [-0.5, 0.0, 1.0, 0.2]],
        [[0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]],
        [[-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -2.0]],
    ]
)
MASKS = torch.zeros(3, 3, 4, dtype=torch.bool)
MASKS[:, 1, 1:3] = True  # two pixels in the middle row


def test_pointing_by_hand():
    # Peaks: one below the mask, two columns and a row off, and the corner of a map that is constant there.
    assert metrics.pointing_game(MAPS, MASKS).tolist() == [0, 0, 0]
    assert metrics.pointing_game(MAPS, MASKS, tolerance=1).tolist() == [0, 0, 0]  # nearer than, not as near as
    assert metrics.pointing_game(MAPS, MASKS, tolerance=1.01).tolist() == [1, 0, 0]
    assert metrics.pointing_game(MAPS, MASKS, tolerance=1.5).tolist() == [1, 1, 1]  # sqrt(2) to the corner
    assert metrics.pointing_game(MAPS.flip(1), MASKS, tolerance=0).tolist() == [0, 0, 0]
    on = MAPS.clone()
    on[:, 1, 1] = 2
    assert metrics.pointing_game(on, MASKS).tolist() == [1, 1, 1]


def test_energy_and_ratio_by_hand():
    energy, ratio = metrics.energy_pointing(MAPS, MASKS), metrics.outside_inside_ratio(MAPS, MASKS)
    assert energy[:2].tolist() == pytest.approx([0.8 / 2, 0.1])
    assert ratio[:2].tolist() == pytest.approx([(1.2 / 10) / (0.8 / 2), (0.9 / 10) / (0.1 / 2)])
    assert energy[2].isnan()
    assert ratio[2].isnan()
    off = MAPS.clone()
    off[:, 1, 1:3] = -1
    assert metrics.outside_inside_ratio(off, MASKS)[:2].tolist() == [math.inf, math.inf]
    assert metrics.energy_pointing(off, MASKS)[:2].tolist() == [0, 0]
    constant = torch.full((3, 3, 4), 0.3)
    assert metrics.outside_inside_ratio(constant, MASKS).tolist() == pytest.approx([1, 1, 1])
    assert metrics.energy_pointing(constant, MASKS).tolist() == pytest.approx([2 / 12] * 3)


def test_overlap_by_hand():
    assert metrics.localisation_iou(MAPS, MASKS).tolist() == pytest.approx([1 / 3, 0, 0])
    assert metrics.localisation_iou(MAPS, MASKS, threshold=0.15).tolist() == pytest.approx([2 / 4, 0, 0])
    # Pixel accuracy 10/12: one of the mask's pixels found, one other pixel taken for it.
    a = 10 / 12
    assert metrics.average_precision(MAPS, MASKS, threshold=0.5)[0].item() == pytest.approx(a * a + (1 - a) / 2)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_is_scikit_learns(levels):
    score = pytest.importorskip("sklearn.metrics").average_precision_score
    maps = (draw(2, 3, 9, 8, seed=3) * levels).round() / levels
    masks = draw(2, 3, 9, 8, seed=4) > 0.8
    found = metrics.average_precision(maps, masks)
    assert found.shape == (2, 3)
    for got, values, truth in zip(found.flatten(), maps.flatten(0, 1), masks.flatten(0, 1), strict=True):
        assert got.item() == pytest.approx(score(truth.ravel().numpy(), values.ravel().numpy()))
    two = metrics.average_precision(maps, masks, threshold=0.1)
    over = maps > 0.1
    for got, values, truth in zip(two.flatten(), over.flatten(0, 1), masks.flatten(0, 1), strict=True):
        both, asked = torch.stack([values, ~values]).double(), torch.stack([truth, ~truth])
        assert got.item() == pytest.approx(score(asked.ravel().numpy(), both.ravel().numpy()))


FUNCTIONS = (
    metrics.pointing_game, metrics.energy_pointing, metrics.outside_inside_ratio, metrics.localisation_iou,
    metrics.average_precision,
)  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_object_and_no_map(function):
    masks, maps = MASKS.clone(), MAPS.clone()
    masks[0] = False
    maps[1, 0, 0] = math.nan
    assert function(maps, masks).isnan().tolist()[:2] == [True, True]
    assert function(MAPS[:0], MASKS[:0]).shape == (0,)
    with pytest.raises(ValueError, match="share one shape"):
        function(MAPS, MASKS[:, :2])
    with pytest.raises(TypeError, match=r"masks must be bool; got torch\.float32"):
        function(MAPS, MASKS.float())
    with pytest.raises(TypeError, match=r"maps must be floating point; got torch\.int64"):
        function(MAPS.long(), MASKS)


def test_arguments():
    with pytest.raises(ValueError, match="tolerance must be a finite number of pixels, at least 0; got -1"):
        metrics.pointing_game(MAPS, MASKS, tolerance=-1)
    with pytest.raises(ValueError, match="threshold must be a finite number; got nan"):
        metrics.localisation_iou(MAPS, MASKS, threshold=math.nan)


def test_rank_correlation_is_scipys():
    spearman = pytest.importorskip("scipy.stats").spearmanr
    a, b = draw(4, 30, seed=1), draw(4, 30, seed=2)
    a[1], b[2] = a[1].round(), (2 * b[2]).round()
    found = metrics.rank_correlation(a, b)
    want = [spearman(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12)
    torch.testing.assert_close(metrics.rank_correlation(a, a.exp()), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(metrics.rank_correlation(a, -a), -torch.ones(4, dtype=torch.float64))
    a[0], b[1, 3] = 1, math.nan
    assert metrics.rank_correlation(a, b).isnan().tolist() == [True, True, False, False]


def test_shap_agreement_by_hand():
    weights, shap = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[4.0, 3.0, -1.0]])
    assert metrics.shap_agreement(weights, shap).item() == pytest.approx(24 / (5 * math.sqrt(26)))
    assert metrics.shap_agreement(2 * weights, shap).item() == pytest.approx(24 / (5 * math.sqrt(26)))
    assert metrics.shap_agreement(weights, shap, kind="rank").item() == pytest.approx(0.5)  # 1 - 6 * 2 / 24
    assert metrics.shap_agreement(0 * weights, shap).isnan().all()
    with pytest.raises(ValueError, match="kind must be"):
        metrics.shap_agreement(weights, shap, kind="pearson")
    with pytest.raises(ValueError, match=r"one shape \(\.\.\., n\); got \(1, 3\) and \(1, 2\)"):
        metrics.shap_agreement(weights, shap[:, :2])


def test_sparsity_by_hand():
    one, flat, half = torch.zeros(2, 5), torch.full((2, 5), -0.7), torch.zeros(2, 5)
    one[1, 3], half[0] = -2, 1
    found = metrics.sparsity(torch.stack([one, flat, half, 0 * one]))
    assert found[:3].tolist() == pytest.approx([0.9, 0, 0.5])
    assert found[3].isnan()
    # Half the mean absolute difference of all pairs over the mean.
    values = draw(6, 7, seed=9).abs()
    pairs = (values.flatten()[:, None] - values.flatten()).abs().mean()
    assert metrics.sparsity(values).item() == pytest.approx((pairs / 2 / values.mean()).item())
    with pytest.raises(ValueError, match="floating point"):
        metrics.sparsity(torch.ones(2, 2, dtype=torch.int64))
