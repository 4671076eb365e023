"""benchmarks/compare.py: what counts as a change, on rows whose noise is known."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("benchmarks_compare", ROOT / "benchmarks" / "compare.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(median, iqr=0.0, n=25, **more):
    return {"name": "a", "median_us": median, "iqr_us": iqr, "n": n, "match": True, **more}


def document(*rows, **facts):
    return {"metadata": {"cpu": "x", "threads": 2, **facts}, "results": list(rows)}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(100), row(104), ""),  # below the threshold
        (row(100), row(106), "slower"),
        (row(106), row(100), "faster"),
        (row(100, iqr=20), row(106), ""),  # three standard errors: 3 * 0.93 * 20 / 5 / 100 = 11 %
        (row(100, iqr=20), row(112), "slower"),
        (row(100, iqr=20, n=2500), row(106), "slower"),  # more rounds, less noise: 1.1 %
        (row(100, iqr=20), row(100 / 1.12), "faster"),
    ],
)
def test_a_change_exceeds_threshold_and_noise(compare, old, new, verdict):
    found = compare.change(old, new, 0.05, "median_us")
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(new["median_us"] / old["median_us"])


def test_the_margin_is_three_standard_errors_of_the_ratio(compare):
    found = compare.change(row(100, iqr=20), row(200, iqr=20), 0.05, "median_us")
    first, second = 0.93 * 20 / 5 / 100, 0.93 * 20 / 5 / 200
    assert found.margin == pytest.approx(3 * math.hypot(first, second))


def test_figures_measured_beside_something_else(compare):
    busy = compare.change(row(100, times_forward=1.1), row(200, times_forward=1.1), 0.05, "times_forward")
    assert (busy.ratio, busy.verdict) == (1.0, "")
    op = compare.change(row(100, pct_copy=80), row(100, pct_copy=40), 0.05, "pct_copy")
    assert (op.ratio, op.verdict) == (2.0, "slower")
    assert compare.change(row(100), row(100), 0.05, "pct_copy") is None


def test_wrong_results_are_neither_faster_nor_slower(compare):
    wrong = row(100) | {"match": False}
    assert compare.change(row(500), wrong, 0.05, "median_us").verdict == "wrong result now"
    assert compare.change(wrong, row(1), 0.05, "median_us").verdict == "wrong result before"


def write(path, *rows, **facts):
    path.write_text(json.dumps(document(*rows, **facts)))
    return str(path)


def test_files_are_compared_and_strict_fails_on_regressions(compare, tmp_path, capsys):
    old = write(tmp_path / "old.json", row(100), row(10) | {"name": "b"}, row(1) | {"name": "gone"})
    new = write(tmp_path / "new.json", row(150), row(5) | {"name": "b"}, threads=4)
    assert compare.main([old, new]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == [
        "  not the same machine: threads: 2 and 4",
        "  faster   -50.0 %  (noise and threshold 5.0 %)  b",
        "  slower   +50.0 %  (noise and threshold 5.0 %)  a",
        "  0 of 2 rows did not change beyond noise",
    ]
    assert compare.main([old, new, "--strict"]) == 1
    assert compare.main([new, new, "--strict"]) == 0


def test_commits_are_compared(compare, capsys):
    done = subprocess.run(("git", "rev-parse", "HEAD"), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert compare.main(["HEAD", "HEAD", "--suite", "cam_map"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cam_map--")
    assert "slower" not in printed
    with pytest.raises(SystemExit, match="neither a file nor a commit"):
        compare.main(["no-such-commit", "HEAD"])
