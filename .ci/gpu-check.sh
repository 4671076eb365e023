#!/usr/bin/env bash
# Build with CUDA, test every backend and run the benchmarks on a machine with a GPU. Needs no network and changes
# nothing but benchmarks/results/.
#
#   .ci/gpu-check.sh [--sanitize] [--slow]      PYTHON=python3: one that has torch with CUDA, triton and pytest
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
sanitize=0 marks="not slow and not packaging"
for option in "$@"; do
    case $option in
        --sanitize) sanitize=1 ;;
        --slow) marks="not packaging" ;;
        *) echo "unknown option $option; known: --sanitize --slow" >&2; exit 2 ;;
    esac
done

"$python" - <<'PY' || exit 1
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"gpu-check: {sys.executable} has no torch ({error}). Cure: PYTHON=<python with torch for CUDA> make gpu-check")
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
export PYTHONPATH=$scratch/site FASTCAM_STRICT=1
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

for benchmark in benchmarks/ops/*.py benchmarks/methods/*.py benchmarks/growth/*.py; do
    [ -e "$benchmark" ] || continue
    echo "gpu-check: $benchmark --device cuda"
    "$python" -P "$benchmark" --device cuda || status=1
done
mkdir -p "$root/benchmarks/results"
[ ! -d benchmarks/results ] || cp -r benchmarks/results/. "$root/benchmarks/results/"

"$python" -P - "$scratch/log" "$root/benchmarks/results" <<'PY'
import json
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as tree

import torch
import triton

logs, results = map(pathlib.Path, sys.argv[1:])
rows = []
for backend in ("reference", "cuda", "triton", "auto"):
    report = logs / f"{backend}.xml"
    if not report.exists():
        rows.append({"backend": backend, "tests": 0, "failures": 0, "errors": 1, "skipped": 0, "seconds": 0.0})
        continue
    suite = tree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    rows.append({"backend": backend, **counts, "seconds": round(float(suite.get("time")), 1)})
driver = subprocess.run(
    ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
).stdout.split("\n")[0]
gpu = torch.cuda.get_device_name()
metadata = {
    "gpu": gpu, "driver": driver, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
}
slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
path = results / f"gpu-check--{slug}.json"
path.write_text(json.dumps({"metadata": metadata, "suites": rows}, indent=1) + "\n")
print(f"\n{gpu}, driver {driver}, torch {torch.__version__}, triton {triton.__version__}")
print(f"{'backend':12}{'tests':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
for row in rows:
    print(f"{row['backend']:12}{row['tests']:8}{row['failures'] + row['errors']:8}{row['skipped']:9}{row['seconds']:9}")
print(f"written: {path}")
PY
exit $status
