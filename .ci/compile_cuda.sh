#!/usr/bin/env bash
# Compile every csrc/cuda/*.cu for sm_80, for sm_90 and to PTX of the newest architecture that nvcc knows, and fail on any error
# or register spill. The code of sm_90 is made from the PTX of compute_90, which a build for users keeps beside it; here it would
# be compiled a second time.
#
#   .ci/compile_cuda.sh [python]        python with torch; default $PYTHON, else .venv/bin/python
#
# Works on a machine without a GPU and with CPU-only torch: made is the code for the devices alone, never an object to link.
# The compiler reads the host's part of a source in full on the way and fails on its errors; making it into code would only
# have torch's headers read twice more, which is most of the time. Skips, loudly, without nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-${PYTHON:-.venv/bin/python}}

nvcc=$(command -v nvcc || true)
[ -z "$nvcc" ] && [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] && nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
if [ -z "$nvcc" ]; then
    echo "SKIPPED: nvcc is not installed, no CUDA source was compiled. Cure: install the CUDA toolkit (nvcc)." >&2
    exit 0
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
includes=$("$python" -c 'from torch.utils.cpp_extension import include_paths; print(*("-I" + p for p in include_paths()))')
newest=$("$nvcc" --list-gpu-arch | sort -V | tail -1)
abi=$("$python" -c 'import torch; print(int(torch.compiled_with_cxx11_abi()))')
# c++20 is what cpp_extension passes. C10_CUDA_NO_CMAKE_CONFIGURE_FILE: CPU-only torch does not ship c10's generated CUDA header.
flags=(-fatbin -O3 -std=c++20 --expt-relaxed-constexpr -Xcompiler -fPIC -Xptxas -v -Icsrc -DC10_CUDA_NO_CMAKE_CONFIGURE_FILE
       -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__
       -D__CUDA_NO_BFLOAT16_CONVERSIONS__ "-D_GLIBCXX_USE_CXX11_ABI=$abi"
       -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
       -gencode "arch=$newest,code=$newest")

compile() {
    local log=$out/$(basename "$1").log
    # shellcheck disable=SC2086  # includes are separate words
    "$nvcc" "${flags[@]}" $includes "$1" -o "$out/$(basename "$1").fatbin" >"$log" 2>&1 || { cat "$log" >&2; return 1; }
}

sources=(csrc/cuda/*.cu)
status=0
# One job per two cores at most: a source with torch's headers takes 1-2 GB.
jobs=$(( $(nproc) > 1 ? 2 : 1 ))
for source in "${sources[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || status=1; done
    compile "$source" &
done
while [ "$(jobs -p | wc -l)" -gt 0 ]; do wait -n || status=1; jobs >/dev/null; done
[ "$status" -eq 0 ] || { echo "CUDA compilation failed" >&2; exit 1; }

"$python" .ci/ptxas_report.py "$out"/*.log
