// The part of ONNX Runtime's C interface that spectral_delta.cc uses, declared here because no Python package ships the headers.
//
// ONNX Runtime hands a library one table of functions. Its interface is versioned and append-only: an entry keeps its place and
// its signature for ever, new ones come after it, and a newer runtime serves every older version. So an entry is its place in
// the table, the same for every runtime from the entry's version on. The places and signatures below were read off
// onnxruntime_c_api.h of 1.18 (the newer entry off 1.24); abi_check.cc compares all of this with a real header at compile time,
// and plugins/tests/abi_matrix.sh does so for many versions. To use one more entry, add it here and run that.
//
// Every function here has the platform's C calling convention. On 32-bit Windows ONNX Runtime has another: not supported.
#ifndef SDCT_ONNXRUNTIME_ABI_H_
#define SDCT_ONNXRUNTIME_ABI_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sdct::ort {

// Version 18 of the interface: ONNX Runtime 1.18 and newer.
constexpr uint32_t kApi = 18;
constexpr size_t kApiEntries = 280;  // in the table of ONNX Runtime 1.18

// --- types only pointers to which are passed around ---------------------------------------------------------------------------
struct Allocator;  // its own functions may throw, the table's do not
struct CustomOpDomain;
struct KernelContext;
struct KernelInfo;
struct MemoryInfo;
struct SessionOptions;
struct ShapeInferContext;
struct Status;
struct Table;  // the functions; read by bind()
struct TensorInfo;
struct Value;

// --- enums, with the values used here; the fixed type lets others arrive -----------------------------------------------------
enum class ErrorCode : int { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6, kInvalidGraph = 10, kEpFail = 11 };
enum class ElementType : int { kUndefined = 0, kFloat = 1, kInt32 = 6, kFloat16 = 10, kBFloat16 = 16 };
enum class MemoryType : int { kDefault = 0 };
enum class Characteristic : int { kRequired = 0, kVariadic = 2 };

// --- structures ----------------------------------------------------------------------------------------------------------------
// What the runtime passes to RegisterCustomOps.
struct ApiBase {
  const Table* (*GetApi)(uint32_t version) noexcept;
  const char* (*GetVersionString)() noexcept;
};

// The members of a custom operator after its version, in their order: X(result, name, parameters).
#define SDCT_ORT_CUSTOM_OP(X)                                                                       \
  X(void*, CreateKernel, (const CustomOp*, const Table*, const KernelInfo*))                        \
  X(const char*, GetName, (const CustomOp*))                                                        \
  X(const char*, GetExecutionProviderType, (const CustomOp*))                                       \
  X(ElementType, GetInputType, (const CustomOp*, size_t index))                                     \
  X(size_t, GetInputTypeCount, (const CustomOp*))                                                   \
  X(ElementType, GetOutputType, (const CustomOp*, size_t index))                                    \
  X(size_t, GetOutputTypeCount, (const CustomOp*))                                                  \
  X(void, KernelCompute, (void* kernel, KernelContext*))                                            \
  X(void, KernelDestroy, (void* kernel))                                                            \
  X(Characteristic, GetInputCharacteristic, (const CustomOp*, size_t index))                        \
  X(Characteristic, GetOutputCharacteristic, (const CustomOp*, size_t index))                       \
  X(MemoryType, GetInputMemoryType, (const CustomOp*, size_t index))                                \
  X(int, GetVariadicInputMinArity, (const CustomOp*))                                               \
  X(int, GetVariadicInputHomogeneity, (const CustomOp*))                                            \
  X(int, GetVariadicOutputMinArity, (const CustomOp*))                                              \
  X(int, GetVariadicOutputHomogeneity, (const CustomOp*))                                           \
  X(Status*, CreateKernelV2, (const CustomOp*, const Table*, const KernelInfo*, void** kernel))     \
  X(Status*, KernelComputeV2, (void* kernel, KernelContext*))                                       \
  X(Status*, InferOutputShapeFn, (const CustomOp*, ShapeInferContext*))                             \
  X(int, GetStartVersion, (const CustomOp*))                                                        \
  X(int, GetEndVersion, (const CustomOp*))                                                          \
  X(size_t, GetMayInplace, (int** inputs, int** outputs))                                           \
  X(void, ReleaseMayInplace, (int* inputs, int* outputs))                                           \
  X(size_t, GetAliasMap, (int** inputs, int** outputs))                                             \
  X(void, ReleaseAliasMap, (int* inputs, int* outputs))

// The runtime reads as much of it as `version` says there is.
struct CustomOp {
  uint32_t version;
#define SDCT_ORT_MEMBER(result, name, parameters) result(*name) parameters;
  SDCT_ORT_CUSTOM_OP(SDCT_ORT_MEMBER)
#undef SDCT_ORT_MEMBER
};

// --- the functions: X(place, result, name, parameters) ---------------------------------------------------------------------------
#define SDCT_ORT_ENTRIES(X)                                                                                                  \
  X(0, Status*, CreateStatus, (ErrorCode, const char* message))                                                              \
  X(26, Status*, CreateCustomOpDomain, (const char* name, CustomOpDomain**))                                                 \
  X(27, Status*, CustomOpDomain_Add, (CustomOpDomain*, const CustomOp*))                                                     \
  X(28, Status*, AddCustomOpDomain, (SessionOptions*, CustomOpDomain*))                                                      \
  X(51, Status*, GetTensorMutableData, (Value*, void** data))                                                                \
  X(60, Status*, GetTensorElementType, (const TensorInfo*, ElementType*))                                                    \
  X(61, Status*, GetDimensionsCount, (const TensorInfo*, size_t* rank))                                                      \
  X(62, Status*, GetDimensions, (const TensorInfo*, int64_t* dims, size_t rank))                                             \
  X(65, Status*, GetTensorTypeAndShape, (const Value*, TensorInfo**))                                                        \
  X(72, Status*, MemoryInfoGetId, (const MemoryInfo*, int* id))                                                              \
  X(75, Status*, AllocatorAlloc, (Allocator*, size_t, void** memory))                                                        \
  X(76, Status*, AllocatorFree, (Allocator*, void* memory))                                                                  \
  X(77, Status*, AllocatorGetInfo, (const Allocator*, const MemoryInfo**))                                                   \
  X(86, Status*, KernelInfoGetAttribute_int64, (const KernelInfo*, const char* name, int64_t*))                              \
  X(90, Status*, KernelContext_GetInput, (const KernelContext*, size_t index, const Value**))                                \
  X(91, Status*, KernelContext_GetOutput, (KernelContext*, size_t index, const int64_t* dims, size_t rank, Value**))         \
  X(99, void, ReleaseTensorTypeAndShapeInfo, (TensorInfo*))                                                                  \
  X(101, void, ReleaseCustomOpDomain, (CustomOpDomain*))                                                                     \
  X(132, void, ReleaseAllocator, (Allocator*))                                                                               \
  X(163, Status*, KernelInfoGetAttributeArray_int64, (const KernelInfo*, const char* name, int64_t*, size_t* count))         \
  X(193, Status*, KernelContext_GetGPUComputeStream, (const KernelContext*, void** stream))                                  \
  X(230, Status*, KernelInfo_GetInputCount, (const KernelInfo*, size_t*))                                                    \
  X(231, Status*, KernelInfo_GetOutputCount, (const KernelInfo*, size_t*))                                                   \
  X(244, Status*, KernelInfo_GetNodeName, (const KernelInfo*, char* name, size_t* length))                                   \
  X(267, Status*, ShapeInferContext_GetInputCount, (const ShapeInferContext*, size_t*))                                      \
  X(268, Status*, ShapeInferContext_GetInputTypeShape, (const ShapeInferContext*, size_t index, TensorInfo**))               \
  X(270, Status*, ShapeInferContext_SetOutputTypeShape, (const ShapeInferContext*, size_t index, const TensorInfo*))         \
  X(274, Status*, KernelContext_ParallelFor,                                                                                 \
    (const KernelContext*, void (*body)(void*, size_t), size_t count, size_t batches, void* context))                        \
  X(277, Status*, KernelContext_GetScratchBuffer, (const KernelContext*, const MemoryInfo*, size_t bytes, void** memory))    \
  X(278, Status*, KernelInfoGetAllocator, (const KernelInfo*, MemoryType, Allocator**))

// Entries of version kNewerApi, null in an older runtime: the shape of a tensor without allocating a copy of it.
constexpr uint32_t kNewerApi = 24;
#define SDCT_ORT_NEWER_ENTRIES(X)                         \
  X(414, Status*, GetTensorElementTypeAndShapeDataReference, \
    (const Value*, ElementType*, const int64_t** dims, size_t* rank))

struct Api {
#define SDCT_ORT_MEMBER(place, result, name, parameters) result(*name) parameters noexcept = nullptr;
  SDCT_ORT_ENTRIES(SDCT_ORT_MEMBER)
  SDCT_ORT_NEWER_ENTRIES(SDCT_ORT_MEMBER)
#undef SDCT_ORT_MEMBER
};

#define SDCT_ORT_WITHIN(place, result, name, parameters) static_assert(place < kApiEntries, #name " is newer than 1.18");
SDCT_ORT_ENTRIES(SDCT_ORT_WITHIN)
#undef SDCT_ORT_WITHIN

// The function at `place` of the table.
template <class Function>
void load(const Table* table, size_t place, Function** function) noexcept {
  std::memcpy(function, reinterpret_cast<const char*>(table) + place * sizeof(void*), sizeof *function);
}

// The functions of `table` (version kApi), and of `newer` (version kNewerApi) where that is not null.
inline Api bind(const Table* table, const Table* newer) noexcept {
  Api api;
#define SDCT_ORT_LOAD(place, result, name, parameters) load(table, place, &api.name);
  SDCT_ORT_ENTRIES(SDCT_ORT_LOAD)
#undef SDCT_ORT_LOAD
#define SDCT_ORT_LOAD(place, result, name, parameters) \
  if (newer) load(newer, place, &api.name);
  SDCT_ORT_NEWER_ENTRIES(SDCT_ORT_LOAD)
#undef SDCT_ORT_LOAD
  return api;
}

}  // namespace sdct::ort

#endif  // SDCT_ONNXRUNTIME_ABI_H_
