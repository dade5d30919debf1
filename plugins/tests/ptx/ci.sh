#!/usr/bin/env bash
# Builds everything over the stand-in for a GPU in build/ptx, and runs the kernels' tests and the hosts' launch code there.
#
#     PYTHON=.venv/bin/python plugins/tests/ptx/ci.sh
#
# nvcc is the machine's, or comes from PyPI into build/nvcc.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-2}

skip() { echo "ptx: SKIPPED the kernels' PTX: $1"; exit 0; }
for tool in cmake g++; do command -v "$tool" >/dev/null || skip "$tool is missing"; done
nvcc=$(command -v nvcc || true)
if [ -z "$nvcc" ]; then
  nvcc=$PWD/build/nvcc/nvidia/cu13/bin/nvcc
  if [ ! -x "$nvcc" ]; then
    mkdir -p build
    "$PYTHON" -m pip install --quiet --no-deps --target build/nvcc -r plugins/tests/ptx/requirements.txt >build/nvcc.log 2>&1 ||
      skip "nvcc is missing, and its wheels cannot be had here: $(tail -n 1 build/nvcc.log)"
  fi
fi
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
cmake -S . -B build/ptx "${generator[@]}" -DSDCT_PTX=ON -DSDCT_BENCHMARKS=ON -DSDCT_NVCC="$nvcc" >/dev/null
cmake --build build/ptx -j "$JOBS" >build/ptx/log 2>&1 || { cat build/ptx/log; echo "ptx: FAILED building build/ptx"; exit 1; }
if grep -E 'warning:' build/ptx/log; then
  echo "ptx: FAILED, the compiler warns in build/ptx"
  exit 1
fi
echo "ptx: built build/ptx"

ctest --test-dir build/ptx -R '_host$' --output-on-failure --no-tests=error
tests() {
  OMP_NUM_THREADS=1 PYTHONPATH=. SDCT_GPU_BUILD=build/ptx SDCT_PTX_BUILD=build/ptx \
    "$PYTHON" -m pytest -q -p no:cacheprovider -n "$JOBS" "$@"
}
tests tests/native/test_ptx.py tests/native/test_kernel_counts.py tests/gpu/test_kernels.py
for capability in 75 100; do  # the PTX that nvcc makes for others
  SDCT_PTX_CAPABILITY=$capability tests tests/gpu/test_kernels.py -k 'random or groups or design'
done
