"""Triton's impute_linear, interpreted, against the dense float64 solution of its linear system."""

from __future__ import annotations

import pytest
import torch

import fastcam
from fastcam import ops
from fastcam._testing.imputation import check_impute_linear, holes
from fastcam._testing.ops import make


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [((1, 2, 9, 10), torch.float32, "channels_last"), ((2, 1, 4, 5), torch.bfloat16, "contiguous"),
     ((1, 2, 2, 3), torch.float64, "transposed")],
    ids=str,
)  # fmt: skip
def test_sizes_and_dtypes(shape, dtype, layout):
    """One level and two; a known pixel of one channel is not finite."""
    images, missing = make(shape, dtype, 1, layout), holes(shape[0], *shape[2:], 0)
    missing[0, -1, -1] = False
    if shape[1] > 1:
        images[0, 1, -1, -1] = torch.inf
    with fastcam.backend("triton"):
        got = ops.impute_linear(images, missing, 20)
    check_impute_linear(got[:, :1].contiguous(), images[:, :1], missing)
    if shape[1] > 1:
        assert got[0, 1][missing[0]].isnan().all()
        assert torch.equal(got[0, 1][~missing[0]], images[0, 1][~missing[0]])


def test_more_programs_than_are_run_at_once(monkeypatch):
    from fastcam.kernels import impute_linear

    images, missing = make((3, 1, 2, 3), torch.float32, 2), holes(3, 2, 3, 1)
    monkeypatch.setattr(impute_linear, "PROGRAMS", 2)
    check_impute_linear(impute_linear.launch(images, missing, 20), images, missing)


def test_empty_batch():
    with fastcam.backend("triton"):
        assert ops.impute_linear(torch.rand(0, 3, 4, 5), torch.zeros(0, 4, 5, dtype=torch.bool)).shape == (0, 3, 4, 5)
