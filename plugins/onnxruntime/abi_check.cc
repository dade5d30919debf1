// Compares abi.h with a real onnxruntime_c_api.h (1.18 or newer) at compile time; nothing of it is linked anywhere.
//
// Types are compared after putting ONNX Runtime's names for ours (`Real`), so that a parameter, a const, a pointer or an integer
// width too many or too few is a difference. `noexcept` is not: it has no effect on a call.
#include "abi.h"

#include <onnxruntime_c_api.h>

#include <type_traits>

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wignored-attributes"  // "the result must be used" is no part of a type
#endif

namespace {

namespace ours = sdct::ort;

// ONNX Runtime's type for one of ours: structures and enums by name, whatever is built from them recursively, the rest is itself.
template <class T>
struct Real {
  using type = T;
};
template <class T>
struct Real<const T> {
  using type = const typename Real<T>::type;
};
template <class T>
struct Real<T*> {
  using type = typename Real<T>::type*;
};
template <class R, class... P>
struct Real<R(P...)> {
  using type = typename Real<R>::type(typename Real<P>::type...);
};
template <class R, class... P>
struct Real<R(P...) noexcept> {
  using type = typename Real<R(P...)>::type;
};

#define SDCT_SAME(mine, real)      \
  template <>                      \
  struct Real<ours::mine> {        \
    using type = ::real;           \
  };
SDCT_SAME(Allocator, OrtAllocator)
SDCT_SAME(ApiBase, OrtApiBase)
SDCT_SAME(CustomOp, OrtCustomOp)
SDCT_SAME(CustomOpDomain, OrtCustomOpDomain)
SDCT_SAME(KernelContext, OrtKernelContext)
SDCT_SAME(KernelInfo, OrtKernelInfo)
SDCT_SAME(MemoryInfo, OrtMemoryInfo)
SDCT_SAME(SessionOptions, OrtSessionOptions)
SDCT_SAME(ShapeInferContext, OrtShapeInferContext)
SDCT_SAME(Status, OrtStatus)
SDCT_SAME(Table, OrtApi)
SDCT_SAME(TensorInfo, OrtTensorTypeAndShapeInfo)
SDCT_SAME(Value, OrtValue)
SDCT_SAME(ErrorCode, OrtErrorCode)
SDCT_SAME(ElementType, ONNXTensorElementDataType)
SDCT_SAME(MemoryType, OrtMemType)
SDCT_SAME(Characteristic, OrtCustomOpInputOutputCharacteristic)

// A real function pointer without its noexcept.
template <class T>
struct Plain {
  using type = T;
};
template <class R, class... P>
struct Plain<R (*)(P...) noexcept> {
  using type = R (*)(P...);
};

template <class Mine, class Theirs>
constexpr bool same = std::is_same_v<typename Real<Mine>::type, typename Plain<Theirs>::type>;

// --- functions -------------------------------------------------------------------------------------------------------------------
static_assert(ORT_API_VERSION >= ours::kApi, "a header of ONNX Runtime 1.18 or newer is needed");
static_assert(ORT_API_VERSION == ours::kApi ? sizeof(::OrtApi) == ours::kApiEntries * sizeof(void*)
                                            : sizeof(::OrtApi) >= ours::kApiEntries * sizeof(void*),
              "the table of version 18 has another length");

#define SDCT_ENTRY(place, result, name, parameters)                                                \
  static_assert(offsetof(::OrtApi, name) == place * sizeof(void*), #name " has another place");    \
  static_assert(same<decltype(ours::Api::name), decltype(::OrtApi::name)>, #name " has another signature");
SDCT_ORT_ENTRIES(SDCT_ENTRY)
#define SDCT_COUNT(place, result, name, parameters) +1
#if ORT_API_VERSION >= 24
static_assert(ours::kNewerApi == 24, "the version in the condition above");
SDCT_ORT_NEWER_ENTRIES(SDCT_ENTRY)
constexpr int entries = 0 SDCT_ORT_ENTRIES(SDCT_COUNT) SDCT_ORT_NEWER_ENTRIES(SDCT_COUNT);
#else
#define SDCT_BEYOND(place, result, name, parameters) \
  static_assert(sizeof(::OrtApi) <= place * sizeof(void*), #name " is no newer entry");
SDCT_ORT_NEWER_ENTRIES(SDCT_BEYOND)
constexpr int entries = 0 SDCT_ORT_ENTRIES(SDCT_COUNT);
#endif

// --- structures ------------------------------------------------------------------------------------------------------------------
#define SDCT_MEMBER(mine, real, name)                                                                               \
  static_assert(offsetof(ours::mine, name) == offsetof(::real, name), #real "::" #name " has another place");      \
  static_assert(same<decltype(ours::mine::name), decltype(::real::name)>, #real "::" #name " has another type");

#define SDCT_OP(result, name, parameters) SDCT_MEMBER(CustomOp, OrtCustomOp, name)
SDCT_MEMBER(CustomOp, OrtCustomOp, version)
SDCT_ORT_CUSTOM_OP(SDCT_OP)
static_assert(ORT_API_VERSION == ours::kApi ? sizeof(ours::CustomOp) == sizeof(::OrtCustomOp)
                                            : sizeof(ours::CustomOp) <= sizeof(::OrtCustomOp),
              "OrtCustomOp has other members in version 18");
static_assert(alignof(ours::CustomOp) == alignof(::OrtCustomOp));

SDCT_MEMBER(ApiBase, OrtApiBase, GetApi)
SDCT_MEMBER(ApiBase, OrtApiBase, GetVersionString)
static_assert(sizeof(ours::ApiBase) == sizeof(::OrtApiBase), "OrtApiBase has other members");

// --- enums -----------------------------------------------------------------------------------------------------------------------
#define SDCT_VALUE(mine, value, real, name)                                                  \
  static_assert(sizeof(ours::mine) == sizeof(::real), #real " has another size");            \
  static_assert(int(ours::mine::value) == int(::name), #name " has another value");
SDCT_VALUE(ErrorCode, kFail, OrtErrorCode, ORT_FAIL)
SDCT_VALUE(ErrorCode, kInvalidArgument, OrtErrorCode, ORT_INVALID_ARGUMENT)
SDCT_VALUE(ErrorCode, kRuntimeException, OrtErrorCode, ORT_RUNTIME_EXCEPTION)
SDCT_VALUE(ErrorCode, kInvalidGraph, OrtErrorCode, ORT_INVALID_GRAPH)
SDCT_VALUE(ErrorCode, kEpFail, OrtErrorCode, ORT_EP_FAIL)
SDCT_VALUE(ElementType, kUndefined, ONNXTensorElementDataType, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED)
SDCT_VALUE(ElementType, kFloat, ONNXTensorElementDataType, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
SDCT_VALUE(ElementType, kInt32, ONNXTensorElementDataType, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32)
SDCT_VALUE(ElementType, kFloat16, ONNXTensorElementDataType, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)
SDCT_VALUE(ElementType, kBFloat16, ONNXTensorElementDataType, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16)
SDCT_VALUE(MemoryType, kDefault, OrtMemType, OrtMemTypeDefault)
SDCT_VALUE(Characteristic, kRequired, OrtCustomOpInputOutputCharacteristic, INPUT_OUTPUT_REQUIRED)
SDCT_VALUE(Characteristic, kVariadic, OrtCustomOpInputOutputCharacteristic, INPUT_OUTPUT_VARIADIC)

}  // namespace

#if defined(SDCT_ABI_MAIN)
#include <cstdio>
int main() { std::printf("ONNX Runtime 1.%d: %d entries agree\n", ORT_API_VERSION, entries); }
#else
[[maybe_unused]] static constexpr int checked = entries;
#endif
