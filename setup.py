"""Builds `fastcam._C` where torch and a compiler allow it, and records in `fastcam/_build.json` what happened.

FASTCAM_BUILD_EXT and FASTCAM_BUILD_CUDA (docs/environment.md) are unset ("auto": build if possible, else go on
without), 0 (do not build) or 1 (a failure is an error).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
INSTALL = "pip install --no-build-isolation ."


def switch(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be unset, 0 or 1, got {value!r}")
    return value


BUILD_EXT, BUILD_CUDA = switch("FASTCAM_BUILD_EXT"), switch("FASTCAM_BUILD_CUDA")
RECORD: dict = {
    "built": False,
    "reason": "the build did not get as far as compiling",
    "python": platform.python_version(),
}


def give_up(reason: str, *, required: bool) -> None:
    """Go on without the extension and say so, or stop if the user asked for it."""
    if required:
        raise SystemExit(f"fastcam: cannot build the requested extension: {reason}")
    RECORD.update(built=False, reason=reason)
    line = "=" * 100
    print(
        f"{line}\nfastcam: WITHOUT its compiled extension: {reason}\nops run on the slow PyTorch references "
        f"(Triton on GPUs). Cure the reason, then: {INSTALL}\n{line}",
        file=sys.stderr,
    )


def arch_list(cuda_home: str) -> str:
    """The GPU architectures to build for when neither the user nor a visible GPU says so, + PTX for later ones."""
    nvcc = subprocess.run([f"{cuda_home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(nvcc.stdout.split())
    wanted = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
    found = [arch for arch in wanted if f"compute_{arch.replace('.', '')}" in known]
    return ";".join(found) + "+PTX"


def max_jobs() -> str:
    """One nvcc job has been seen at 5 GB, so at most one job per 6 GiB of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 6
    return str(max(1, min(os.cpu_count() or 1, int(memory / 6))))


def extensions() -> list[Extension]:
    """The one extension, or none with the reason in RECORD."""
    required = "1" in (BUILD_EXT, BUILD_CUDA)
    if BUILD_EXT == "0":
        if BUILD_CUDA == "1":
            raise SystemExit("fastcam: FASTCAM_BUILD_CUDA=1 contradicts FASTCAM_BUILD_EXT=0")
        give_up("FASTCAM_BUILD_EXT=0 was set when it was built", required=False)
        return []
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension
    except ImportError as error:
        give_up(
            f"torch could not be imported while building ({error}); install torch first and build with "
            "--no-build-isolation",
            required=required,
        )
        return []
    missing = [] if torch.version.cuda else [f"torch {torch.__version__} is a CPU build"]
    missing += [] if CUDA_HOME else ["nvcc (CUDA_HOME) was not found"]
    if BUILD_CUDA == "1" and missing:
        raise SystemExit(f"fastcam: FASTCAM_BUILD_CUDA=1, but {' and '.join(missing)}")
    cuda = BUILD_CUDA != "0" and not missing
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    # -fopenmp at compile only: without it at::parallel_for is serial, with it at link a second OpenMP runtime loads.
    # -Wno-psabi: vector types cross only always_inline functions, which have no ABI.
    # -g0: Python was built with -g, and debug information of templates costs a third of the compile time.
    # -fno-math-errno: with it a square root is an instruction, which loops can have for whole vectors.
    cxx = ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-fvisibility=hidden", "-Wall"]
    cxx += os.environ.get("FASTCAM_BUILD_FLAGS", "").split()
    flags = {"cxx": cxx}
    if cuda:
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu"))
        flags["nvcc"] = ["-O3", "--expt-relaxed-constexpr"]
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
            os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list(CUDA_HOME)
        RECORD["arch_list"] = os.environ.get("TORCH_CUDA_ARCH_LIST", "the visible GPU's")
    RECORD.update(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cuda_sources=cuda,
        flags=cxx,
        cxx11_abi=torch.compiled_with_cxx11_abi(),
        compiler=os.environ.get("CXX", "c++"),
    )
    make = CUDAExtension if cuda else CppExtension
    macros = [("FASTCAM_WITH_CUDA", "1")] if cuda else []
    return [
        make("fastcam._C", sources, include_dirs=[str(ROOT / "csrc")], define_macros=macros, extra_compile_args=flags)
    ]


class BuildPy(build_py):
    """Leaves a record even when there is nothing to compile."""

    def run(self) -> None:
        super().run()
        write_record(Path("fastcam") if self.editable_mode else Path(self.build_lib, "fastcam"))


class BuildExt(build_ext):
    """Compiles through torch's builder; a failure costs the extension, not the installation."""

    def run(self) -> None:
        from torch.utils.cpp_extension import BuildExtension

        target = Path(self.get_ext_fullpath("fastcam._C")).parent
        required = "1" in (BUILD_EXT, BUILD_CUDA)
        compiler = os.environ.get("CXX") or "c++"
        builder = BuildExtension(self.distribution)
        builder.inplace, builder.editable_mode = self.inplace, getattr(self, "editable_mode", False)
        builder.parallel = self.parallel
        os.environ.setdefault("MAX_JOBS", max_jobs())
        try:
            if not shutil.which(compiler.split()[0]):
                raise FileNotFoundError(f"no C++ compiler: {compiler!r} is not on the path; install g++ or set CXX")
            builder.ensure_finalized()
            builder.run()
        except Exception as error:  # a missing compiler, a compile or a link error: each has its own type
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            give_up(f"{first_line} (compiler output: add -v to pip install)", required=required)
            self.extensions = []  # the distribution keeps its own list: the wheel was begun as a platform wheel
        else:
            RECORD.update(built=True, reason=None)
        target.mkdir(parents=True, exist_ok=True)
        write_record(target)


def write_record(folder: Path) -> None:
    RECORD["fastcam"] = RECORD.get("fastcam") or version()
    (folder / "_build.json").write_text(json.dumps(RECORD, indent=1) + "\n")


def version() -> str:
    line = next(x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("version"))
    return line.split('"')[1]


kernels = [f"fastcam.kernels.{name}" for name in find_packages("kernels")]
setup(
    packages=[*find_packages(include=["fastcam*"]), "fastcam.kernels", *kernels],
    package_dir={"fastcam.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
)
