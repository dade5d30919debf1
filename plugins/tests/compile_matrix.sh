#!/usr/bin/env bash
# Compiles the TensorRT plugin's host code against several TensorRT versions without a warning and drives each build through
# tensorrt_host_test. Needs TensorRT headers and CUDA's headers, neither TensorRT itself nor a GPU; the kernels are left out.
#
#   plugins/tests/compile_matrix.sh DIR...     each DIR holds NvInfer.h, or include/NvInfer.h
set -u
cd "$(dirname "$0")/.."
cuda=${CUDA_HOME:-/usr/local/cuda}
cxx=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ $# = 0 ]; then
  sed -n 's/^# \{0,1\}//; 2,5p' "$0" >&2
  exit 2
fi

flags=(-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Iinclude)
core=()
for name in plan cpu cpu_path no_cuda; do
  "$cxx" -std=c++17 -O1 -fPIC -Iinclude -DSDCT_ISA=baseline -c "core/$name.cpp" -o "$work/$name.o" || exit 1
  core+=("$work/$name.o")
done

failed=0
for directory in "$@"; do
  [ -f "$directory/NvInfer.h" ] || directory=$directory/include
  system=(-isystem "$directory" -isystem "$cuda/include")
  result=ok
  objects=()
  for name in node library plugin_v2 plugin_v3; do
    "$cxx" "${flags[@]}" "${system[@]}" -c "tensorrt/$name.cpp" -o "$work/$name.o" || result="tensorrt/$name.cpp does not compile cleanly"
    objects+=("$work/$name.o")
  done
  if [ "$result" = ok ]; then
    "$cxx" -shared -o "$work/plugin.so" "${objects[@]}" "${core[@]}" -Wl,-z,defs -Wl,-z,nodelete \
      -Wl,--version-script=tensorrt/exports.map -L"$cuda/lib64" -lcudart_static -lpthread -ldl -lrt || result="does not link"
  fi
  if [ "$result" = ok ]; then
    "$cxx" -std=c++17 -Wall -Wextra -Werror -rdynamic "${system[@]}" tests/tensorrt_host_test.cpp -ldl -o "$work/test" &&
      result=$("$work/test" "$work/plugin.so") || { failed=1; }
  fi
  case $result in
    TensorRT*) echo "$result" ;;
    *) failed=1; echo "$directory: $result" ;;
  esac
done
exit $failed
