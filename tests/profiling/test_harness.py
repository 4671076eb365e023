"""benchmarks/_harness.py and its suites: wrong results get no speed, rows say which kernel ran and on which device."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastcam
from fastcam import _extension, ops
from fastcam.profiling import results

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
A, W = torch.rand(1, 3, 4, 4), torch.rand(1, 3)


def loaded(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # suites put their folder there
    monkeypatch.setitem(sys.modules, "_harness", sys.modules.get("_harness"))
    if sys.modules["_harness"] is None:
        del sys.modules["_harness"]
    spec = importlib.util.spec_from_file_location(f"benchmarks_{Path(path).stem}", BENCHMARKS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def harness(monkeypatch):
    return loaded("_harness.py", monkeypatch)


def op_row(harness, ours=lambda: ops.cam_map(A, W), **baselines):
    expected = fastcam.reference.cam_map(A.double(), W.double(), None, True, True, None)[0]
    options = argparse.Namespace(device="cpu", rounds=2)
    return harness.op_row("a row", ours, baselines, expected, 1e-5, 1000, options, op="cam_map", regime="typical")


def test_a_wrong_result_gets_no_speed(harness, capsys):
    row = op_row(harness, lambda: ops.cam_map(A, W) + 0.5, eager=lambda: ops.cam_map(A, W))
    assert (row["match"], row["speedup"]) == (False, None)
    assert row["max_err"] == pytest.approx(0.5, abs=1e-5)
    assert "MISMATCH, error 0.5" in capsys.readouterr().out
    assert op_row(harness)["match"] is True


@pytest.mark.skipif(_extension.why_not() is not None, reason="extension not built")
def test_a_row_names_its_kernel_and_times_the_others(harness, monkeypatch):
    with fastcam.backend("auto"):
        assert op_row(harness)["backend"] == "cpp"
    with fastcam.backend("reference"):
        row = op_row(harness)
    assert (row["backend"], row["op"], list(row["speedup"])) == ("reference", "cam_map", ["cpp"])
    facts = fastcam.backends()
    facts["ops"]["cam_map"]["cuda"] = {"auto": "cuda", "reasons": {"cpp": "runs on cpu tensors only"}}
    monkeypatch.setattr(harness.fastcam, "backends", lambda: facts | {"chosen": "auto"})
    assert harness._kernels("cam_map", "cuda") == ["cuda", "triton"]


def test_suites_run_where_they_say(harness, monkeypatch):
    """A suite that stays on the CPU takes no other device, and the others bring networks and images there."""
    with pytest.raises(SystemExit):
        harness.arguments("a suite").parse_args(["--device", "cuda"])
    assert harness.arguments("a suite", harness.DEVICES).parse_args(["--device", "cuda"]).device == "cuda"
    small = SimpleNamespace(resnet50=lambda weights: nn.Linear(2, 1))
    for suite in ("bench_deep_lift", "bench_relevance"):
        bench = loaded(f"methods/{suite}.py", monkeypatch)
        monkeypatch.setattr(bench, "torchvision_models", lambda: small)
        assert bench.network("resnet50", "meta").weight.is_meta
        assert all(x.is_meta for x in bench.batch("meta"))


def test_an_installed_package_finds_the_checkout_that_git_is_told(monkeypatch, tmp_path):
    commit = subprocess.run(("git", "rev-parse", "HEAD"), cwd=BENCHMARKS, capture_output=True, text=True)
    if commit.returncode:
        pytest.skip("not a git checkout")
    monkeypatch.delenv("GIT_DIR", raising=False)
    monkeypatch.setattr(results, "_CHECKOUT", tmp_path)
    assert results._output("git", "rev-parse", "HEAD") is None
    monkeypatch.setenv("GIT_DIR", str(BENCHMARKS.parent / ".git"))
    assert results._output("git", "rev-parse", "HEAD") == commit.stdout.strip()
