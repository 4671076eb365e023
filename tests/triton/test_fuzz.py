"""Random calls of every op in Triton's interpreter; how, and how to repeat one: `fastcam/_testing/fuzz.py`."""

from __future__ import annotations

import importlib.util

import pytest

from fastcam._testing.fuzz import CASES, run

SHORT, LONG = 2, 62
OPS = [op for op in CASES if importlib.util.find_spec(f"fastcam.kernels.{op}")]  # the others run on the reference


@pytest.mark.parametrize("op", OPS)
def test_fuzz(op):
    for seed in range(SHORT):
        run(op, seed, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_fuzz_long(op):
    for seed in range(SHORT, LONG):
        run(op, seed, "triton")
