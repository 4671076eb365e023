"""Random calls of every op in Triton's interpreter; how, and how to repeat one: `fastcam/_testing/fuzz.py`."""

from __future__ import annotations

import pytest

from fastcam._testing.fuzz import CASES, run

SHORT, LONG = 2, 62


@pytest.mark.parametrize("op", CASES)
def test_fuzz(op):
    for seed in range(SHORT):
        run(op, seed, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_fuzz_long(op):
    for seed in range(SHORT, LONG):
        run(op, seed, "triton")
