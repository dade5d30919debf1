#!/usr/bin/env bash
# Installs a wheel where there is no compiler, with its extra `cpu`, as someone does who only runs bundles. Sees that its
# operator library is found, is used, and computes what the portable function body computes; that the commands run a bundle
# without torch; and that those which need torch say so.
#
#   plugins/tests/check_wheel.sh WHEEL BUNDLE...     bundles with adapters; wheel_bundle.py writes a tiny one
#
# Dependencies come in the versions of constraints.txt.
#   PYTHON    the interpreter for the new environment (default python3)
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n 's/^# \{0,1\}//; 2,10p' "$0" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3}
export ORT_DISABLE_TELEMETRY=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset SDCT_LIBRARY_PATH PYTHONPATH
work=$(mktemp -d)
rm=$(command -v rm)
trap '"$rm" -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
python=$work/venv/bin/python

wheel=$(realpath "$1")
shift
bundles=()
for bundle in "$@"; do bundles+=("$(realpath "$bundle")"); done

export PATH=$work/venv/bin
for tool in c++ g++ gcc cc clang clang++ cmake nvcc; do
  if command -v "$tool" >/dev/null; then echo "check_wheel: $tool is still on the PATH"; exit 1; fi
done
"$python" -m pip install --quiet -c "$here/../../constraints.txt" "${wheel}[cpu]"
"$python" -m pip check
cd "$work"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
"$python" "$here/wheel_check.py" "$site" "${bundles[@]}"
echo "${wheel##*/}: ok"
