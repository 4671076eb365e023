"""Which implementation ran, and what forced, missing and strict choices say. Oracle: recorded calls, exact messages."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastcam
from fastcam import _extension, ops

backends = importlib.import_module("fastcam.backends")  # the attribute fastcam.backends is the function
A, W = torch.rand(1, 3, 4, 4), torch.rand(1, 3)
needs_cpp = pytest.mark.skipif(_extension.why_not() is not None, reason="extension not built")


@pytest.fixture
def fresh_table(monkeypatch):
    """Nothing resolved yet, so that this test sees the first call, and the choice left to `auto`."""
    monkeypatch.setattr(backends, "_TABLE", {})
    with fastcam.backend("auto"):
        yield


@pytest.fixture
def no_extension(monkeypatch, fresh_table):
    """As if the extension had not been built."""
    reason = "the test took it away"
    monkeypatch.setattr(_extension, "_load", lambda: _extension.ExtensionNotBuilt(reason))
    bare = {n: backends.Op(n, op.overload, op.reference, frozenset()) for n, op in backends._OPS.items()}
    monkeypatch.setattr(backends, "_OPS", bare)
    monkeypatch.setattr(backends, "_PLAIN_CALLS", {})
    return reason


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own with these switches only."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTCAM_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, check=False
    )


@needs_cpp
def test_auto_takes_cpp_on_cpu_and_reference_only_when_forced(monkeypatch, fresh_table):
    calls = []
    known = backends._OPS["cam_map"]

    def spy(*args):
        calls.append("reference")
        return known.reference(*args)

    monkeypatch.setitem(backends._OPS, "cam_map", backends.Op("cam_map", known.overload, spy, known.keys))
    ops.cam_map(A, W)
    assert calls == []
    assert backends.implementation("cam_map", "cpu") is torch.ops.fastcam.cam_map.with_raw
    with fastcam.backend("reference"):
        ops.cam_map(A, W)
    assert calls == ["reference"]
    ops.cam_map(A, W)
    assert calls == ["reference"]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_and_unusable_raises_with_every_reason(fresh_table, name):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter makes triton usable")
    with fastcam.backend(name), pytest.raises(RuntimeError) as caught:
        ops.cam_map(A, W)
    message = str(caught.value)
    assert f"backend '{name}' cannot run fastcam.ops.cam_map on cpu tensors" in message
    for candidate in ("reference: usable", "cpp: ", "cuda: runs on cuda tensors only", "triton: runs on cuda tensors"):
        assert candidate in message


def test_forced_cpp_without_extension_raises_with_reason_and_cure(no_extension):
    with fastcam.backend("cpp"), pytest.raises(RuntimeError) as caught:
        ops.channel_weights(A, A)
    assert no_extension in str(caught.value)
    assert "pip install --no-build-isolation" in str(caught.value)


def test_automatic_fallback_logs_one_line_an_op(no_extension, caplog, monkeypatch):
    monkeypatch.setattr(backends, "_STRICT", False)
    with caplog.at_level(logging.WARNING, "fastcam"):
        for _ in range(3):
            maps = ops.cam_map(A, W)
    assert len(caplog.records) == 1
    assert "fastcam.ops.cam_map on cpu uses the slow PyTorch reference: cpp: " in caplog.text
    assert no_extension in caplog.text
    with fastcam.backend("reference"):
        assert torch.equal(maps, ops.cam_map(A, W))


def test_strict_raises_instead_of_falling_back(no_extension, monkeypatch):
    monkeypatch.setattr(backends, "_STRICT", True)
    with pytest.raises(RuntimeError, match=f"FASTCAM_STRICT is set and fastcam.ops.cam_map .*{no_extension}"):
        ops.cam_map(A, W)
    with fastcam.backend("reference"):  # an explicit choice is no fallback
        ops.cam_map(A, W)


def test_python_kernel_on_the_cuda_key_hands_keywords_on(monkeypatch):
    monkeypatch.setattr(backends, "_TABLE", {("mask_by_features", "cuda", "auto"): lambda *a, **k: (a, k)})
    kernel = backends._python_cuda_kernel("mask_by_features")
    assert kernel(1, 2, scale=0.5) == ((1, 2), {"scale": 0.5})


def test_unknown_name_gets_the_closest_match():
    with (
        pytest.raises(ValueError, match=r"unknown backend 'refrence', expected one of .* did you mean 'reference'\?"),
        fastcam.backend("refrence"),
    ):
        pass


def test_choice_ends_with_the_block_also_after_an_error():
    with pytest.raises(KeyError), fastcam.backend("reference"):
        raise KeyError
    assert backends.backends()["chosen"] == (os.environ.get("FASTCAM_BACKEND") or "auto")


def test_choice_belongs_to_its_task():
    seen = {}

    async def task(name):
        with fastcam.backend(name):
            await asyncio.sleep(0.01)
            seen[name] = backends.backends()["chosen"]

    async def both():
        await asyncio.gather(task("reference"), task("cpp"))

    asyncio.run(both())
    assert seen == {"reference": "reference", "cpp": "cpp"}


def test_report_says_what_auto_would_take_and_why_not_the_others():
    report = fastcam.backends()
    json.dumps(report)
    backwards = {"lfi_attend_backward", "lfi_mask_backward"}  # registered, not exported
    assert set(report["ops"]) - backwards == set(ops.__all__) - {"cam_map_with_raw"}
    for op in report["ops"]:
        entry = report["ops"][op]["cpu"]
        assert entry["auto"] == ("reference" if _extension.why_not() else "cpp")
        assert set(entry["reasons"]) | {entry["auto"], "reference"} >= {"cpp"}
        assert "reference" not in entry["reasons"]
    assert report["available"]["reference"] is None


def test_environment_chooses_and_checks():
    code = "import fastcam; print(fastcam.backends()['chosen'])"
    assert python(code, FASTCAM_BACKEND="reference").stdout.strip() == "reference"
    refused = python(code, FASTCAM_BACKEND="cp")
    assert refused.returncode != 0
    assert "FASTCAM_BACKEND: unknown backend 'cp'" in refused.stderr
    assert "did you mean 'cpp'?" in refused.stderr


def test_import_is_lean():
    code = (
        "import sys, fastcam, fastcam.ops, torch\n"
        "names = ('triton', 'matplotlib', 'PIL', 'sklearn', 'fastcam.kernels.cam_map')\n"
        "heavy = [m for m in names if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_works_where_triton_is_absent():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastcam\n"
        "assert fastcam.ops.cam_map(torch.rand(1, 3, 4, 4), torch.rand(1, 3)).shape == (1, 4, 4)\n"
        "found, reason = sys.modules['fastcam.backends']._triton_launcher('cam_map')\n"
        "assert found is None and 'pip install triton' in reason, reason\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


@needs_cpp
def test_the_backward_pass_runs_by_the_backend_of_the_forward_pass(monkeypatch, fresh_table):
    """Autograd runs it in a thread of its own on GPUs, which knows nothing of the caller's choice."""
    calls = []

    def spy(name):
        op = backends._OPS[name]
        counted = lambda *a: (calls.append(name), op.reference(*a))[1]  # noqa: E731
        monkeypatch.setitem(backends._OPS, name, backends.Op(name, op.overload, counted, op.keys))

    spy("lfi_mask_backward")
    spy("lfi_attend_backward")
    features = torch.rand(1, 3, 4, 4, requires_grad=True)
    with fastcam.backend("reference"):
        total = ops.lfi_mask(features, torch.rand(1, 1, 4, 4)).sum() + ops.lfi_attend(features, W)[0].sum()
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()
    assert sorted(calls) == ["lfi_attend_backward", "lfi_mask_backward"]
    assert features.grad is not None
