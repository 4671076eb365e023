"""Targets: every accepted form, and a clear error for every other."""

from __future__ import annotations

import pytest
import torch

from fastcam.program.targets import resolve_targets

OUTPUT = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 5.0]])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [1, 2]),
        (0, [0, 0]),
        ([2, 1], [2, 1]),
        ((2, 1), [2, 1]),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor([2, 1], dtype=torch.int32), [2, 1]),
        (torch.tensor(1), [1, 1]),
        ("top1", [[1], [2]]),
        ("top2", [[1, 2], [2, 0]]),
        ([[0, 1], [1, 2]], [[0, 1], [1, 2]]),
    ],
)
def test_accepted_forms(given, expected):
    found = resolve_targets(given, OUTPUT, 2)
    assert found.score is None
    assert found.indices.tolist() == expected
    assert found.indices.dtype == torch.int64
    assert found.several == (found.indices.ndim == 2)


def test_callable_is_kept():
    def score(output):
        return output[:, 0]

    found = resolve_targets(score, {"any": "structure"}, 2)
    assert found.score is score
    assert found.indices is None


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (3, IndexError, "target 3 is out of range: the model's classes are 0 to 2"),
        (-1, IndexError, "target -1 is out of range"),
        ([0, 7], IndexError, "target 7 "),
        ([0], ValueError, r"shape \(1,\) do not fit a batch of 2"),
        ([0, 1, 2], ValueError, r"shape \(3,\) do not fit a batch of 2"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "name no class"),
        (torch.zeros(2, 1, 1, dtype=torch.int64), ValueError, "do not fit a batch"),
        ([0.5, 1.0], TypeError, "must hold integers"),
        (torch.tensor([True, False]), TypeError, "must hold integers"),
        ([[0, 1], [2]], TypeError, "same number for each image"),
        (1.5, TypeError, "got float"),
        (True, TypeError, "got bool"),
        ("best", ValueError, "'top1', 'top5'"),
        ("top0", ValueError, "'top1', 'top5'"),
        ("top9", IndexError, "more classes than the model's 3"),
    ],
)
def test_refused_forms(given, error, says):
    with pytest.raises(error, match=says):
        resolve_targets(given, OUTPUT, 2)


@pytest.mark.parametrize("output", [{"out": OUTPUT}, OUTPUT[0], OUTPUT[:, :, None]])
def test_indices_need_a_score_matrix(output):
    with pytest.raises(TypeError, match="targets=callable"):
        resolve_targets(None, output, 2)
