#!/usr/bin/env bash
# Compares our declaration of ONNX Runtime's C interface (plugins/onnxruntime/abi.h) with the real headers of each version given,
# then makes mistakes in copies of it and sees that the comparison with the last version refuses each.
#
#   plugins/tests/abi_matrix.sh DIR...     each DIR holds onnxruntime_c_api.h of 1.18 or newer
set -euo pipefail
cxx=${CXX:-g++}
if [ $# = 0 ]; then
  sed -n 's/^# \{0,1\}//; 2,5p' "$0" >&2
  exit 2
fi
headers=()
for directory in "$@"; do headers+=("$(cd "$directory" && pwd)"); done
cd "$(dirname "${BASH_SOURCE[0]}")/../onnxruntime"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp abi.h abi_check.cc "$work"
failed=0

for directory in "${headers[@]}"; do
  if "$cxx" -std=c++17 -Wall -Wextra -Werror -DSDCT_ABI_MAIN -isystem "$directory" "$work/abi_check.cc" -o "$work/check" 2>"$work/log"; then
    "$work/check"
  else
    grep 'error' "$work/log" | head -5
    echo "$directory: does NOT agree"
    failed=1
  fi
done
[ $failed = 0 ] || exit 1

# what is wrong, and the substitution that makes it so (sed, the whole file as one line)
mistakes=(
  'two places swapped' 's/X\(60, ([^(]*)GetTensorElementType,([^\n]*\n *)X\(61,/X(61, \1GetTensorElementType,\2X(60,/'
  'a place one too high' 's/X\(274,/X(275,/'
  'the place of a newer entry' 's/X\(414,/X(41,/'
  'another name of the same signature' 's/KernelInfo_GetInputCount/KernelInfo_GetOutputCount2/; s/KernelInfo_GetOutputCount,/KernelInfo_GetInputCount,/; s/KernelInfo_GetOutputCount2/KernelInfo_GetOutputCount/'
  'a parameter less' 's/(GetDimensions, \([^)]*), size_t rank\)/\1)/'
  'a parameter more' 's/(CreateStatus, \([^)]*)\)/\1, int)/'
  'a const less' 's/(GetTensorTypeAndShape, \()const /\1/'
  'a const more' 's/(GetTensorMutableData, \()/\1const /'
  'a pointer less' 's/(GetTensorMutableData, \(Value\*, void)\*\*/\1*/'
  'a pointer more' 's/(ReleaseAllocator, \(Allocator\*)/\1*/'
  'a narrower integer' 's/(GetDimensions, \(const TensorInfo\*, )int64_t/\1int32_t/'
  'an integer of other sign' 's/(MemoryInfoGetId, \([^)]*)int\* id/\1unsigned* id/'
  'a narrower integer inside a callback' 's/void \(\*body\)\(void\*, size_t\)/void (*body)(void*, int)/'
  'parameters in another order' 's/const MemoryInfo\*, size_t bytes,/size_t bytes, const MemoryInfo*,/'
  'another structure' 's/(KernelInfo_GetInputCount, \(const )KernelInfo/\1KernelContext/'
  'another result' 's/X\(99, void,/X(99, Status*,/'
  'another enum value' 's/kBFloat16 = 16/kBFloat16 = 11/'
  'another error code' 's/kEpFail = 11/kEpFail = 12/'
  'an enum of another size' 's/enum class MemoryType : int /enum class MemoryType : short /'
  'two members of the operator swapped' 's/( X\([^\n]*GetStartVersion[^\n]*\n)( X\([^\n]*GetEndVersion[^\n]*\n)/\2\1/; s/(  X\([^\n]*GetStartVersion[^\n]*\n) *(  X\([^\n]*GetEndVersion[^\n]*\n)/\2\1/'
  'a member of the operator less' 's/  X\(void, KernelCompute,[^\n]*\n//'
  'the signature of a member of the operator' 's/(CreateKernelV2, \(const CustomOp\*, const Table\*, const KernelInfo\*), void\*\*/\1, void*/'
  'a wider version of the operator' 's/(struct CustomOp \{\n  )uint32_t/\1uint64_t/'
  'two functions of the allocator swapped' 's/X\(75, ([^(]*)AllocatorAlloc,([^\n]*\n *)X\(76,/X(76, \1AllocatorAlloc,\2X(75,/'
  'the members of the base swapped' 's/(  const Table\* \(\*GetApi\)[^\n]*\n)(  const char\* \(\*GetVersionString\)[^\n]*\n)/\2\1/'
  'a longer table' 's/kApiEntries = 280/kApiEntries = 9999/'
)
caught=0
for ((i = 0; i < ${#mistakes[@]}; i += 2)); do
  what=${mistakes[i]}
  sed -E -z "${mistakes[i + 1]}" abi.h >"$work/abi.h"
  if cmp -s abi.h "$work/abi.h"; then
    echo "mistake '$what': was not made, abi.h has changed; repair this script"
    failed=1
  elif ! "$cxx" -std=c++17 -fsyntax-only -x c++ "$work/abi.h" 2>"$work/log"; then
    head -3 "$work/log"
    echo "mistake '$what': abi.h alone does not compile, which shows nothing; repair this script"
    failed=1
  elif "$cxx" -std=c++17 -fsyntax-only -isystem "$directory" "$work/abi_check.cc" 2>"$work/log"; then
    echo "mistake '$what': NOT noticed"
    failed=1
  elif ! grep -qE 'static assertion failed|static_assert failed' "$work/log"; then
    head -3 "$work/log"
    echo "mistake '$what': refused, but by no assertion; repair this script"
    failed=1
  else
    caught=$((caught + 1))
  fi
done
echo "$caught of $((${#mistakes[@]} / 2)) mistakes noticed"
exit $failed
