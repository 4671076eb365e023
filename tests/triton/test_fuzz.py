"""Random calls of every op in Triton's interpreter; how, and how to repeat one: `fastcam/_testing/fuzz.py`."""

from __future__ import annotations

import importlib.util

import pytest

from fastcam._testing.fuzz import CASES, run

SHORT, LONG = 2, 62
SLOW = {"impute_linear"}  # some hundred steps of a solver a case


def test_every_op_has_a_kernel():
    assert all(importlib.util.find_spec(f"fastcam.kernels.{op}") for op in CASES)


@pytest.mark.parametrize("op", [op for op in CASES if op not in SLOW])
def test_fuzz(op):
    for seed in range(SHORT):
        run(op, seed, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_fuzz_long(op):
    for seed in range(SHORT, SHORT + 6 if op in SLOW else LONG):
        run(op, seed, "triton")
