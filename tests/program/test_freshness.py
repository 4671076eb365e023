"""Freshness: a key changes exactly when the tensor does, whichever way it was written."""

from __future__ import annotations

import pytest
import torch

from fastcam.program.freshness import Freshness

SHAPES = [(3,), (64, 3, 7, 7), (101, 67), (5000,), (8193,)]


def tensors(dtype: torch.dtype) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {i: torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(SHAPES)}
    made[len(made)] = torch.randn(9001, generator=generator).to(dtype)[1:]  # an odd storage offset
    made[len(made)] = torch.ones(6000, dtype=dtype)
    made[len(made)] = torch.randn(90, 70, generator=generator).to(dtype).t()
    return made


def touch_last(t: torch.Tensor) -> None:
    t.data[-1] = 7.5


def double(t: torch.Tensor) -> None:
    t.data.mul_(2)


def reverse(t: torch.Tensor) -> None:
    t.data.copy_(t.data.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [touch_last, double, reverse])
def test_writes_through_data_are_seen(dtype, change):
    freshness = Freshness()
    kept = tensors(dtype)
    before = freshness.keys(kept)
    assert freshness.keys(kept) == before
    for index, tensor in kept.items():
        if change is reverse and tensor.eq(tensor.flip(0)).all():
            continue
        change(tensor)
        after = freshness.keys(kept)
        assert after[index] != before[index], (index, tensor.shape)
        assert freshness.keys(kept) == after
        before = after


def test_a_large_tensor_does_not_make_others_new():
    freshness = Freshness()
    kept = tensors(torch.float32)
    before = freshness.keys(kept)
    kept[3].data.mul_(2)
    after = freshness.keys(kept)
    assert [index for index in kept if after[index] != before[index]] == [3]


def test_swapped_filters_and_flipped_signs_are_seen():
    weight = torch.randn(512, 16, 1, 1, dtype=torch.float64)
    freshness = Freshness()
    before = freshness.keys({0: weight})
    weight.data[[1, 2]] = weight.data[[2, 1]]
    after = freshness.keys({0: weight})
    assert after != before
    weight.data.neg_()
    assert freshness.keys({0: weight}) != after


def test_nan_is_not_news():
    freshness = Freshness()
    kept = {0: torch.full((10,), torch.nan), 1: torch.full((9000,), torch.nan)}
    assert freshness.keys(kept) == freshness.keys(kept)
