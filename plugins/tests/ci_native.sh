#!/usr/bin/env bash
# Builds the native parts and checks them, as far as this machine can; what it lacks is skipped with a line that says so.
#
#     PYTHON=.venv/bin/python plugins/tests/ci_native.sh
#
#   build/sanitize   core, driver and operator library under AddressSanitizer and UBSan, run against scipy and ONNX Runtime
#   build/threads    core and operator library under ThreadSanitizer, in many threads, without ONNX Runtime
#   build/native     the same optimised; the rest of the test suite runs with the operator that .venv's installation built
#   build/cuda       the GPU kernels, compiled only
#   build/toolchains the kernels and both hosts with the oldest CUDA that can be had and the newest (toolchains.py)
#   build/ptx        the GPU kernels and what launches them, executed on the CPU (ptx/ci.sh)
#
# The operator library is built from the project's own declarations. Those are compared with ONNX Runtime's real headers where
# these can be had: ONNXRUNTIME_INCLUDE_DIR, or the system's, or Debian's libonnxruntime-dev through apt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-2}

skip() { echo "native: SKIPPED $1: $2"; }

for tool in cmake g++; do
  command -v "$tool" >/dev/null || { skip "everything native" "$tool is missing"; exit 0; }
done
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)

# Debian 13 packages the headers; on Debian 12 they are taken from its successor, with the machine's own sources
# rewritten to a private list, so that nothing is installed and no other server is asked.
fetch_headers() {
  local folder=$1 sources=/etc/apt/sources.list.d/debian.sources
  command -v apt-get >/dev/null && command -v dpkg >/dev/null && [ -f "$sources" ] || return 1
  mkdir -p "$folder"/{lists/partial,cache,sources} || return 1
  awk 'BEGIN { RS = ""; ORS = "\n\n" } !/-security/' "$sources" |
    sed -E 's/^Suites: .*/Suites: trixie/' >"$folder/sources/debian.sources"
  local apt=(apt-get -q -o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$folder/sources"
    -o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder/cache" -o "APT::Sandbox::User=root")
  (cd "$folder" && "${apt[@]}" update && "${apt[@]}" download libonnxruntime-dev) >"$folder/log" 2>&1 || return 1
  dpkg -x "$folder"/libonnxruntime-dev_*.deb "$folder/unpacked"
}

headers=${ONNXRUNTIME_INCLUDE_DIR:-}
for place in /usr/include/onnxruntime /usr/local/include/onnxruntime "$PWD/build/headers/unpacked/usr/include/onnxruntime"; do
  [ -z "$headers" ] && [ -f "$place/onnxruntime_c_api.h" ] && headers=$place
done
if [ -z "$headers" ]; then
  if fetch_headers "$PWD/build/headers"; then
    headers=$PWD/build/headers/unpacked/usr/include/onnxruntime
  else
    skip "the comparison of abi.h with ONNX Runtime's headers" "none can be had; set ONNXRUNTIME_INCLUDE_DIR"
  fi
fi
if [ -n "$headers" ]; then
  plugins/tests/abi_matrix.sh "$headers" || { echo "native: FAILED, abi.h disagrees with $headers"; exit 1; }
fi

build() { # folder, options ...
  local folder=$1
  shift
  cmake -S . -B "$folder" "${generator[@]}" -DONNXRUNTIME_INCLUDE_DIR="$headers" "$@" >/dev/null
  cmake --build "$folder" -j "$JOBS" >"$folder/log" 2>&1 || { cat "$folder/log"; echo "native: FAILED building $folder"; exit 1; }
  if grep -E 'warning:' "$folder/log"; then
    echo "native: FAILED, the compiler warns in $folder"
    exit 1
  fi
  echo "native: built $folder"
}

check() { # preloaded libraries, build folder, tests ...
  local preload=$1 folder=$2
  shift 2
  LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 PYTHONPATH=. \
    SDCT_DRIVER="$PWD/$folder/sdct_driver" SDCT_LIBRARY_PATH="$PWD/$folder" \
    "$PYTHON" -m pytest -q -p no:cacheprovider "$@"
}

build build/sanitize -DSDCT_CUDA=OFF -DSDCT_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1
check "" build/sanitize tests/native/test_core.py
check "$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" build/sanitize tests/native/test_operator.py

# what loads at an address that this sanitizer does not expect is run without randomised addresses
threads() {
  local fixed=()
  setarch "$(uname -m)" -R true 2>/dev/null && fixed=(setarch "$(uname -m)" -R)
  TSAN_OPTIONS=exitcode=66 "${fixed[@]}" build/threads/sdct_threads "$@" >build/threads/report 2>&1
}
build build/threads -DSDCT_CUDA=OFF -DSDCT_SANITIZE=thread -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1
threads || { cat build/threads/report; echo "native: FAILED, threads disturb each other in the operator"; exit 1; }
code=0
threads --race || code=$?
if [ "$code" != 66 ] || ! grep -q 'WARNING: ThreadSanitizer: data race' build/threads/report; then
  cat build/threads/report
  echo "native: FAILED, ThreadSanitizer does not see a slot that is written while it is read"
  exit 1
fi
echo "native: the operator is free of data races, and a planted one is seen"

build build/native -DSDCT_CUDA=OFF
check "" build/native tests/native/test_core.py tests/native/test_operator.py

if command -v nvcc >/dev/null; then
  build build/cuda -DSDCT_TESTS=OFF -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-75-real;90-real}"
  # no register may spill to memory
  if grep -E '[1-9][0-9]* bytes spill' build/cuda/log; then
    echo "native: FAILED, a kernel spills registers"
    exit 1
  fi
else
  skip "the GPU kernels" "nvcc is missing"
fi
"$PYTHON" plugins/tests/toolchains.py --architectures ends 11.7 13.5 ||
  { echo "native: FAILED, a CUDA toolchain does not compile the kernels or a host as it should"; exit 1; }

PYTHON=$PYTHON JOBS=$JOBS plugins/tests/ptx/ci.sh
