"""Loading `fastcam._C`: build facts, mismatches found before the library is opened, instruction-set caps."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastcam import _extension

needs_cpp = pytest.mark.skipif(_extension.why_not() is not None, reason="extension not built")


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Writes a build record and makes the loader read it, uncached."""

    def write(**changes):
        path = tmp_path / "_build.json"
        facts = {"built": True, "reason": None, "torch": torch.__version__, "cuda": torch.version.cuda}
        facts["python"] = "{}.{}".format(*sys.version_info)
        path.write_text(json.dumps({**facts, **changes}))
        monkeypatch.setattr(_extension, "RECORD", path)

    monkeypatch.setattr(_extension, "_load", _extension._load.__wrapped__)
    return write


@needs_cpp
def test_build_config_tells_the_facts():
    config = _extension.load().build_config()
    assert torch.__version__.startswith(config["torch"])
    assert config["isa"] == config["isas"][-1] or "FASTCAM_CPU_ISA" in os.environ
    assert config["isas"][0] == "default"
    assert config["compiler"].split()[0] in ("gcc", "clang")
    assert config["threads"] == torch.get_num_threads()
    ops = {"cam_map.with_raw", "channel_weights", "mask_by_features", "rescale_multipliers"}
    ops |= {"impute_linear", "lfi_mask", "lfi_mask_backward", "lfi_attend", "lfi_attend_backward"}
    ops |= {f"relevance_{op}" for op in ("divide", "add", "split", "budgets", "equilibrium", "combine")}
    assert set(config["ops"]["CPU"]) >= ops
    assert config["cuda"] == bool(config["ops"]["CUDA"])


@needs_cpp
def test_kernels_run_on_several_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert _extension.load().build_config()["parallel_chunks"] == 2
        torch.set_num_threads(1)
        assert _extension.load().build_config()["parallel_chunks"] == 1
    finally:
        torch.set_num_threads(before)


@needs_cpp
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_one_openmp_runtime_is_loaded():
    """In a process of its own: other packages (scikit-learn) bring a runtime with them."""
    code = (
        "from fastcam import _extension; _extension.load()\n"
        "names = (line.split()[-1] for line in open('/proc/self/maps') if '.so' in line)\n"
        "print(*{name for name in names if 'omp' in name.rsplit('/', 1)[-1]}, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


@needs_cpp
@pytest.mark.parametrize("cap", ["default", "avx2", "avx512"])
def test_instruction_set_can_be_capped(cap):
    code = "from fastcam import _extension; c = _extension.load().build_config(); print(c['isa'], *c['isas'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTCAM_CPU_ISA": cap},
        capture_output=True,
        text=True,
        check=True,
    )
    chosen, *available = done.stdout.split()
    order = ["default", "avx2", "avx512"]
    assert order.index(chosen) == min(order.index(cap), order.index(available[-1]))


@needs_cpp
def test_unknown_instruction_set_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "from fastcam import _extension; _extension.load()"],
        env={**os.environ, "FASTCAM_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "FASTCAM_CPU_ISA must be default, avx2 or avx512, got 'sse9'" in done.stderr


def test_reason_of_a_failed_build_is_repeated(record):
    record(built=False, reason="compiling failed: no g++")
    with pytest.raises(_extension.ExtensionNotBuilt, match=r"not built: compiling failed: no g\+\+. Cure.*pip install"):
        _extension.load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "2.3.1"}, r"built for torch 2.3 \(running: "),
        ({"cuda": "99.1"}, r"built for cuda 99 \(running: "),
        ({"python": "3.7.9"}, r"built for python cp37 \(running: cp3"),
    ],
)
def test_mismatch_is_found_before_the_library_is_opened(record, monkeypatch, change, message):
    record(**change)
    monkeypatch.setattr(_extension.importlib, "import_module", lambda name: pytest.fail("opened the library"))
    with pytest.raises(_extension.ExtensionMismatch, match=message):
        _extension.load()


def test_missing_record_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "RECORD", tmp_path / "_build.json")
    monkeypatch.setattr(_extension, "_load", _extension._load.__wrapped__)
    with pytest.raises(_extension.ExtensionNotBuilt, match=r"_build\.json is missing"):
        _extension.load()
