#!/usr/bin/env bash
# Build with CUDA, test every backend and run the benchmarks on a machine with a GPU. Needs no network and changes
# nothing but benchmarks/results/.
#
#   .ci/gpu-check.sh [--sanitize] [--slow]      PYTHON=python3: one that has torch with CUDA, triton, torchvision and pytest
#
# The op benchmarks time CUDA C++ and Triton in the same turns: which of them `auto` takes (_AUTO_ORDER in
# fastcam/backends.py) follows what they leave in benchmarks/results/. Packages that are missing cost the tests that need them.
#
# --sanitize: instead, run the small GPU tests under compute-sanitizer. By hand, the same is
#   PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
#       python -P -m pytest -q tests/gpu -k small
# (without torch's caching allocator every tensor has its own bounds; also worth running: --tool racecheck, synccheck).
# --slow: also the tests marked slow (15 GB of device memory).
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
sanitize=0 marks="not packaging and not peers and not slow"
for option in "$@"; do
    case $option in
        --sanitize) sanitize=1 ;;
        --slow) marks="not packaging and not peers" ;;
        *) echo "unknown option $option; known: --sanitize --slow" >&2; exit 2 ;;
    esac
done

"$python" - <<'PY' || exit 1
import importlib.util
import sys
for package in ("torch", "triton", "torchvision", "pytest", "setuptools", "ninja", "pybind11"):
    if importlib.util.find_spec(package) is None:
        sys.exit(f"gpu-check: {sys.executable} has no {package}. Cure: PYTHON=<python with torch for CUDA> make gpu-check")
import torch
if torch.version.cuda is None:
    sys.exit(f"gpu-check: torch {torch.__version__} is a CPU build. Cure: PYTHON=<python with torch for CUDA> make gpu-check")
if not torch.cuda.is_available():
    sys.exit(f"gpu-check: torch {torch.__version__} sees no CUDA device on this machine; run it where there is a GPU")
print(f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}")
PY

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/tree" "$scratch/log"
tar --exclude=./.git --exclude=./.venv --exclude=./build --exclude='*.so' --exclude=./fastcam/_build.json -cf - . |
    tar -xf - -C "$scratch/tree"
cd "$scratch/tree"
echo "gpu-check: building"
FASTCAM_BUILD_CUDA=1 "$python" -m pip install -q --no-index --no-build-isolation --no-deps --target "$scratch/site" . \
    >"$scratch/log/build" 2>&1 || { tail -60 "$scratch/log/build" >&2; echo "gpu-check: the build failed" >&2; exit 1; }
# The tests and benchmarks of the copy, the installed package: a checkout ahead of it on the path would hide `_C`.
rm -rf fastcam
# TF32 would make other numbers of float32 convolutions than the CPU and the references have.
export PYTHONPATH=$scratch/site FASTCAM_STRICT=1 NVIDIA_TF32_OVERRIDE=0
"$python" -P -m fastcam.info || true

if [ "$sanitize" = 1 ]; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$python" -P -m pytest -q tests/gpu -k small
    exit
fi

status=0
for backend in reference cuda triton auto; do
    # A forced GPU backend refuses CPU tensors, so it gets the GPU suite; the others get everything.
    case $backend in cuda | triton) suite=tests/gpu ;; *) suite=tests ;; esac
    echo "gpu-check: $suite with FASTCAM_BACKEND=$backend"
    FASTCAM_BACKEND=$backend "$python" -P -m pytest -q "$suite" --ignore=tests/triton -m "$marks" \
        --junitxml="$scratch/log/$backend.xml" -o junit_logging=no || status=1
done

# What is measured belongs to the checkout's commit; the copy has none.
if git_dir=$(git -C "$root" rev-parse --absolute-git-dir 2>/dev/null); then
    export GIT_DIR=$git_dir GIT_WORK_TREE=$root
fi
for benchmark in benchmarks/ops/*.py benchmarks/methods/*.py benchmarks/growth/*.py; do
    echo "gpu-check: $benchmark --device cuda"
    "$python" -P "$benchmark" --device cuda || status=1
done

"$python" -P - "$scratch/log" <<'PY' || status=1
import pathlib
import sys
import xml.etree.ElementTree as tree

sys.path.insert(0, "benchmarks")
import _harness as harness

rows = []
for backend in ("reference", "cuda", "triton", "auto"):
    report = pathlib.Path(sys.argv[1], f"{backend}.xml")
    counts = {"tests": 0, "failures": 0, "errors": 1, "skipped": 0, "time": 0}  # the run broke off
    if report.exists():
        counts = tree.parse(report).getroot().find("testsuite").attrib
    row = {key: int(counts[key]) for key in ("tests", "failures", "errors", "skipped")}
    rows.append({"name": backend, **row, "seconds": float(counts["time"])})
harness.table(rows, list(rows[0]))
harness.write("gpu_check", "cuda", rows, harness.ROOT / "results", tuple(rows[0]))
PY
mkdir -p "$root/benchmarks/results"
cp -r benchmarks/results/. "$root/benchmarks/results/"
exit $status
