"""Random calls of every op on the backends of this process; how, and how to repeat one: `fastcam/_testing/fuzz.py`."""

from __future__ import annotations

import pytest

from fastcam._library import SCHEMAS
from fastcam._testing import fuzz
from fastcam._testing.fuzz import CASES, WAIVERS, Case, repetition, run

SHORT, LONG = 8, 596  # seeds an op; 18 ops make the long run one of more than 10,000 cases a backend


@pytest.mark.parametrize("op", CASES)
def test_fuzz(backend, op):
    for seed in range(SHORT):
        run(op, seed, backend)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SHORT, LONG, 49))
@pytest.mark.parametrize("op", CASES)
def test_fuzz_long(backend, op, first):
    for seed in range(first, first + 49):
        run(op, seed, backend)


def test_every_op_is_fuzzed():
    assert set(CASES) == {name.partition(".")[0] for name in SCHEMAS}


def test_cases_are_functions_of_their_seed():
    for op in CASES:
        first, second = (fuzz.case(op, 3) for _ in range(2))
        for a, b in zip(first.arguments, second.arguments, strict=True):
            assert type(a) is type(b)
            assert not hasattr(a, "stride") or (a.stride() == b.stride() and a.equal(b)) or bool(a.isnan().any())


def test_kinds_of_values_and_dtypes_all_come_up():
    draws = [fuzz.Draw(op, seed) for op in CASES for seed in range(SHORT)]
    assert {d.kind for d in draws} == {"plain", "zeros", "ties", "constant", "tiny", "subnormal", "huge", "odd"}
    assert len({d.dtype for d in draws}) == 4


def test_failures_name_their_repetition_and_waivers_must_be_true(monkeypatch):
    op, waived = "relevance_budgets", {("relevance_budgets", 5, "reference"): "a reason"}
    with pytest.raises(
        AssertionError, match=r"passes now, remove its waiver \(a reason\): python -P -m .* 5 reference"
    ):
        run(op, 5, "reference", waived)

    def wrong(*_, **__):
        raise AssertionError("values differ")

    made = fuzz.case(op, 5)
    monkeypatch.setitem(fuzz.CASES, op, lambda _: Case(made.arguments, wrong))
    with pytest.raises(AssertionError, match=f"values differ\nrepeat with: {repetition(op, 5, 'reference')}"):
        run(op, 5, "reference")
    run(op, 5, "reference", waived)


def test_waivers_have_reasons():
    assert all(op in CASES and reason.strip() for (op, _, _), reason in WAIVERS.items())
