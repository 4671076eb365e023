"""What wheels, sdists and installations contain. Builds run in copies of the checkout; nothing here is changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source checkout"),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the files that belong to the package, without build products."""
    target = tmp_path_factory.mktemp("checkout") / "src"
    skip = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "out", "*.so", "_build.json", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, target, ignore=skip)
    return target


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def wheel_command(out: Path) -> list[str]:
    return [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out), "."]


def build_wheel(source: Path, out: Path, **environment: str) -> Path:
    run(*wheel_command(out), cwd=source, **environment)
    return next(out.glob("*.whl"))


def build_record(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("fastcam/_build.json"))


@pytest.fixture(scope="module")
def full_wheel(checkout, tmp_path_factory) -> Path:
    """With the extension; made from the sdist, so that the sdist is proven complete."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})", cwd=checkout)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    # What the wheel holds does not depend on how fast its code is, the time to build it does.
    quick = {"FASTCAM_BUILD_EXT": "1", "FASTCAM_BUILD_FLAGS": "-O0"}
    return build_wheel(next(p for p in folder.iterdir() if p.is_dir()), tmp_path_factory.mktemp("wheel"), **quick)


def test_wheel_has_one_top_level_package_and_all_files(full_wheel):
    with zipfile.ZipFile(full_wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastcam"}
    for needed in (
        "fastcam/py.typed",
        "fastcam/testbed/weights/tiny_resnet.safetensors",
        "fastcam/testbed/weights/tiny_lfi.safetensors",
        "fastcam/_build.json",
        "fastcam/kernels/__init__.py",
        "fastcam/kernels/cam_map.py",
    ):
        assert needed in names
    assert any(name.startswith("fastcam/_C.") for name in names)
    assert build_record(full_wheel)["built"]


def test_clean_install_runs_outside_the_checkout(full_wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True, system_site_packages=False)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", full_wheel, cwd=tmp_path)
    # torch and numpy come from this environment: installing them again would prove nothing about fastcam.
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    (next((tmp_path / "env" / "lib").glob("python*")) / "site-packages" / "here.pth").write_text(packages + "\n")
    code = (
        "import fastcam, fastcam.kernels, torch, sys\n"
        f"assert fastcam.__file__.startswith({str(tmp_path)!r}), fastcam.__file__\n"
        "assert fastcam.backends()['ops']['cam_map']['cpu']['auto'] == 'cpp', fastcam.backends()\n"
        "print(fastcam.ops.cam_map(torch.ones(1, 1, 2, 2), torch.ones(1, 1), normalize=False).sum().item())\n"
    )
    assert run(python, "-P", "-c", code, cwd=tmp_path, FASTCAM_STRICT="1").stdout.strip() == "4.0"


def test_switched_off_extension_gives_a_pure_package_with_the_reason(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path, FASTCAM_BUILD_EXT="0")
    assert wheel.name.endswith("-none-any.whl")
    record = build_record(wheel)
    assert not record["built"]
    assert "FASTCAM_BUILD_EXT=0" in record["reason"]


def test_missing_compiler_degrades_with_the_reason(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path, CXX="/no/such/compiler")
    record = build_record(wheel)
    assert not record["built"]
    assert "no C++ compiler: '/no/such/compiler'" in record["reason"]


def test_missing_compiler_is_an_error_when_the_extension_is_required(checkout, tmp_path):
    environment = {**os.environ, "CXX": "/no/such/compiler", "FASTCAM_BUILD_EXT": "1"}
    done = subprocess.run(
        wheel_command(tmp_path), cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "cannot build the requested extension" in done.stdout + done.stderr


def test_missing_cuda_is_one_sentence_when_cuda_is_required(checkout, tmp_path):
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        pytest.skip("this torch has CUDA")
    command = [sys.executable, "setup.py", "--version"]
    environment = {**os.environ, "FASTCAM_BUILD_CUDA": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"FASTCAM_BUILD_CUDA=1, but torch {torch.__version__} is a CPU build" in done.stderr


def test_build_without_torch_gives_a_working_wheel_with_the_reason(checkout, tmp_path):
    blocked = tmp_path / "block"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('no torch in this build environment')\n")
    wheel = build_wheel(checkout, tmp_path, PYTHONPATH=str(blocked))
    assert wheel.name.endswith("-none-any.whl")
    assert "torch could not be imported while building" in build_record(wheel)["reason"]
