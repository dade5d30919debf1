#!/usr/bin/env bash
# Runs the operator library in several versions of ONNX Runtime, each installed into a folder of its own, against scipy.
#
#   plugins/tests/ort_versions.sh [VERSION...]     default: the oldest and the newest the package allows
#
#   PYTHON              an interpreter with numpy, scipy and onnx, which makes the models (default .venv/bin/python)
#   SDCT_LIBRARY_PATH   the folder of the library (default build/native)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
library=${SDCT_LIBRARY_PATH:-build/native}/libsdct_onnxruntime.so
[ -f "$library" ] || { echo "$library is missing: cmake -S . -B build/native && cmake --build build/native"; exit 2; }
export ORT_DISABLE_TELEMETRY=1 PIP_DISABLE_PIP_VERSION_CHECK=1

if [ $# = 0 ]; then
  set -- "$(sed -nE 's/.*"onnxruntime>=([0-9.]+).*/\1/p' pyproject.toml).*" newest
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" plugins/tests/ort_versions.py make "$work/cases"

failed=0
for version in "$@"; do
  what=onnxruntime
  [ "$version" = newest ] || what="onnxruntime==$version"
  numpy=numpy
  case $version in 1.1?.*) numpy='numpy<2' ;; esac # built for numpy 1
  folder=$work/runtime
  rm -rf "$folder"
  if ! "$PYTHON" -m pip install --quiet --no-deps --only-binary :all: --target "$folder" "$what" "$numpy" >"$work/log" 2>&1; then
    tail -3 "$work/log"
    echo "$what: cannot be installed for this Python"
    failed=1
    continue
  fi
  PYTHONPATH=$folder "$PYTHON" plugins/tests/ort_versions.py run "$work/cases" "$library" || failed=1
done
exit $failed
