"""The pointing game on maps whose answer is written down by hand."""

from __future__ import annotations

import pytest
import torch

from fastcam.testbed import pointing_accuracy, pointing_hits


def test_hits_by_hand():
    maps = torch.zeros(2, 2, 3, 4)
    masks = torch.zeros(2, 2, 3, 4, dtype=torch.bool)
    masks[0, 0, 1, 2] = masks[0, 1, 2, 3] = masks[1, 0, 0, 0] = masks[1, 1, 2, 2] = True
    maps[0, 0, 1, 2] = 1  # on its pixel
    maps[0, 1, 2, 2] = 1  # one to the left
    maps[1, 0] = -1  # constant: the first pixel, which is in the mask
    maps[1, 1, 2, 2], maps[1, 1, 1, 1] = 0.5, 0.25
    assert pointing_hits(maps, masks).tolist() == [[True, False], [True, True]]
    assert pointing_accuracy(maps, masks) == 0.75


def test_a_random_map_scores_the_masked_fraction():
    # Oracle: a hit has probability 1/4; three standard errors of 4000 draws are 0.021.
    maps = torch.rand(4000, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(8, 8, dtype=torch.bool)
    masks[:4, :4] = True
    assert pointing_accuracy(maps, masks.expand(4000, 8, 8)) == pytest.approx(0.25, abs=0.021)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 3\), \(2, 4, 4\)"):
        pointing_hits(torch.rand(2, 3, 3), torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"bool, got torch\.uint8"):
        pointing_hits(torch.rand(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.uint8))
