"""Timing by turns, agreement, and the shape of result files, on values known in advance."""

from __future__ import annotations

import math

import pytest
import torch

from fastcam.profiling import measure, results


def test_agreement_is_the_largest_difference():
    one, two = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.25, 1.5])
    assert measure.agree(one, two, 0.5) == (True, 0.5)
    assert measure.agree(one, two, 0.49) == (False, 0.5)
    assert measure.agree(one, torch.zeros(2), 9.0) == (False, math.inf)
    assert measure.agree((one, one), (one, two), 0.1) == (False, 0.5)


def test_nan_agrees_with_nothing():
    broken = torch.tensor([math.nan])
    assert measure.agree(broken, torch.zeros(1), 1e9)[0] is False
    assert measure.agree(broken, broken, 1e9)[0] is False


def test_calls_take_turns_after_the_warm_up(monkeypatch):
    order: list[str] = []
    clock = iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    times = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}  # two looks at the clock a call


def test_no_round_begins_after_the_budget_once_there_are_three(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    assert list(measure.turns(20, budget=1.0)) == [0, 1, 2]
    assert list(measure.turns(2, budget=1.0)) == [0, 1]
    assert list(measure.turns(5)) == [0, 1, 2, 3, 4]


def test_a_row_holds_median_and_interquartile_range_in_microseconds():
    row = results.row("x", [1e-6, 2e-6, 3e-6, 4e-6, 100e-6], True, more=7)
    assert row["median_us"] == pytest.approx(3)
    assert row["iqr_us"] == pytest.approx(52 - 1.5)  # quartiles 1.5 and 52 by the exclusive method
    assert (row["n"], row["match"], row["more"]) == (5, True, 7)
    assert measure.iqr([4.0]) == 0.0
    # By turns: quotients 0.5, 0.5 and 0.75; the quotient of the medians would be 3 / 4.
    assert measure.ratio({"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 4.0]}, "a", "b") == 0.5
    with pytest.raises(ValueError, match="shorter"):
        measure.ratio({"a": [1.0, 2.0], "b": [4.0]}, "a", "b")


def document(**row) -> dict:
    entry = {"name": "a", "median_us": 1.0, "iqr_us": 0.0, "n": 3, "match": True, "max_err": 0.0} | row
    return {"metadata": dict.fromkeys(results.METADATA_KEYS), "results": [entry]}


def test_a_wrong_result_may_claim_no_speed():
    results.validate(document())
    results.validate(document(match=False, median_us=None))
    for claim in ({"speedup": {"eager": 2.0}}, {"images_per_s": 5.0}):
        with pytest.raises(ValueError, match=f"claims a speed for wrong results: {next(iter(claim))}"):
            results.validate(document(match=False, **claim))
    with pytest.raises(ValueError, match="median_us must be positive, got None"):
        results.validate(document(median_us=None))
    with pytest.raises(ValueError, match="metadata lacks commit"):
        results.validate({"metadata": {k: 0 for k in results.METADATA_KEYS if k != "commit"}, "results": [{}]})


def test_json_has_no_nan_and_six_digits(tmp_path):
    assert results.storable({"a": math.nan, "b": (1.23456789, math.inf), "c": "x"}) == {
        "a": None,
        "b": [1.23457, None],
        "c": "x",
    }


def test_the_machine_is_a_processor_never_a_host():
    facts = {"gpu": None, "cpu": "Some CPU @ 3.0GHz", "cores": 4, "isa": "avx2"}
    assert results.machine_slug(facts) == "some-cpu-3-0ghz-4c-avx2"
    assert results.machine_slug(facts | {"gpu": "A GPU", "isa": None}) == "a-gpu-4c-reference"
