"""The streaming mean against numpy over everything at once."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fastcam.metrics import Mean

from .conftest import draw


def test_equals_numpy_however_it_is_cut():
    values = draw(50, 4) * 1e-3 + 1e6  # a mean far from zero, where sums of squares would cancel
    values[7, 1], values[8, 1], values[:, 3] = math.nan, math.inf, math.nan
    whole, parts, left, right = Mean().update(values), Mean(), Mean(), Mean()
    for part in values.split(7):
        parts.update(part)
    left.update(values[:20])
    right.update(values[20:])
    merged = left.merge(right).merge(Mean())
    stored = Mean.from_state_dict(json.loads(json.dumps(merged.state_dict())))
    known = np.where(np.isfinite(values.numpy()), values.numpy(), np.nan)[:, :3]
    n = np.isfinite(known).sum(0)
    for found in (whole, parts, merged, stored):
        np.testing.assert_allclose(found.mean.numpy()[:3], np.nanmean(known, 0), rtol=1e-15)
        spread = np.nanstd(known, 0, ddof=1) / np.sqrt(n)
        np.testing.assert_allclose(found.standard_error.numpy()[:3], spread, rtol=1e-5)
        assert found.count.tolist() == [50, 48, 50, 0]
        assert found.left_out.tolist() == [0, 2, 0, 50]
        assert found.mean[3].isnan()
        assert found.standard_error[3].isnan()
        low, high = found.interval
        torch.testing.assert_close((high - low)[:3], 2 * 1.96 * found.standard_error[:3], rtol=1e-5, atol=0)


def test_nothing_one_and_errors():
    assert Mean().mean.isnan()
    assert Mean().count == 0
    assert Mean.from_state_dict(Mean().state_dict()).count == 0
    one = Mean().update(torch.tensor([2.0]))
    assert one.mean == 2
    assert one.standard_error.isnan()
    with pytest.raises(ValueError, match="do not join"):
        one.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one value an item"):
        one.update(torch.tensor(1.0))
