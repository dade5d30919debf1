// Kernel core of sdct_export: the sparse cosine-space update of a group of linear layers, on the GPU and on the CPU.
//
// For every token t, with row r = row of t, and every projection j of the group (all in float32, rounded once to `type`):
//
//     y_out_j[t] = y_in_j[t] + IDCT( sum_k scales[r, k] * scatter_add_row( value * gather_col( DCT( x[t] ) ) ) )
//
// DCT is the orthonormal DCT-II of length d_in, IDCT the orthonormal DCT-III of length d_out_j; value, row and col come from
// the bank slot ids[r, k]. Slot 0 means "none": a row whose ids are all 0 is copied bit for bit (not even touched where
// y_out == y_in) and its x is never read.
//
// This header is the whole interface. It knows nothing of TensorRT, ONNX Runtime or torch: raw pointers, sizes, strides and a
// stream. No function throws. Everything may be called from several threads at once unless it says otherwise.
//
// Use:
//     1. create_plan(shape, &plan)            once per node: validates, factorises, builds tables on the host
//     2. cuda_prepare(plan, &device_plan)     once per node and device (GPU only): the one place that allocates device memory
//     3. cuda_run(device_plan, problem, ...)  per call: one kernel launch on the caller's stream, no allocation, no
//        synchronisation, capturable into a CUDA graph            -- or --  cpu_run(plan, problem, parallel)
//     4. cuda_release(device_plan), destroy_plan(plan)
#ifndef SDCT_SDCT_H_
#define SDCT_SDCT_H_

#include <cstddef>
#include <cstdint>

struct CUstream_st;  // *CUstream_st is cudaStream_t

namespace sdct {

// Version of this interface and of the node contract (SpectralDelta version 1).
constexpr int32_t kVersion = 1;

constexpr int32_t kMaxProjections = 8;   // outputs of one node
constexpr int32_t kMaxLength = 1 << 20;  // longest d_in or d_out

enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum class Status : int32_t {
  kOk = 0,
  kBadShape,     // Shape outside its limits
  kBadProblem,   // null pointer, negative size, tokens not a multiple of rows, ...
  kWorkspace,    // workspace missing, too small or not aligned to 16 bytes
  kUnavailable,  // built without CUDA
  kOutOfMemory,  // host or device
  kCuda,         // a CUDA call failed; cuda_error() has the text
};

// One English sentence for a status, never null.
const char* status_text(Status status) noexcept;

// Elements are 4, 2 and 2 bytes.
size_t element_bytes(DataType type) noexcept;

// The attributes of a node. 1 <= projections <= kMaxProjections, lengths in 1 .. kMaxLength, capacities >= 0.
struct Shape {
  int32_t d_in;
  int32_t projections;
  int32_t d_out[kMaxProjections];
  int32_t capacity[kMaxProjections];
};

// One call. Pointers are device pointers for cuda_run and host pointers for cpu_run. Strides count elements between tokens.
struct Problem {
  DataType type;             // of x and of every y
  int64_t rows;              // batch rows
  int64_t blends;            // k, adapters blended per row; may be 0
  int64_t slots;             // of the bank, at least 1
  int64_t tokens;            // over all rows; may be 0
  const int32_t* token_row;  // [tokens] row of each token for ragged batches; a token outside 0 .. rows - 1 has no adapter.
                             // null: token t belongs to row t / (tokens / rows), tokens a multiple of rows
  const void* x;             // [tokens, d_in]
  int64_t x_stride;          // >= d_in
  const int32_t* ids;        // [rows, blends]; an id outside 0 .. slots - 1 counts as 0
  const float* scales;       // [rows, blends]
  const float* values;       // [slots, n], n = sum of capacities; projection j owns the columns after those of 0 .. j - 1
  const int32_t* indices;    // [slots, n, 2] (row, col). Rows ascend within a projection; unused places follow at its end with
                             // value 0 and repeated indices. An entry with a row or col out of range counts as value 0,
                             // whatever the bank holds nothing is read or written outside the buffers named here.
  const void* y_in[kMaxProjections];     // [tokens, d_out_j]
  void* y_out[kMaxProjections];          // [tokens, d_out_j], equal to y_in[j] or disjoint from every input
  int64_t y_in_stride[kMaxProjections];  // >= d_out_j
  int64_t y_out_stride[kMaxProjections];
};

// Fills x_stride and the y strides of a problem whose tensors are dense.
void set_dense_strides(const Shape& shape, Problem* problem) noexcept;

// Whether the sizes and pointers of `problem` fit `shape`; looks at no tensor's contents. cuda_run and cpu_run check it too.
Status check_problem(const Shape& shape, const Problem& problem) noexcept;

// ---------------------------------------------------------------------------------------------------------------------------
// Plan: host tables of one node (shared between plans of equal lengths). Immutable.

class Plan;
Status create_plan(const Shape& shape, Plan** plan) noexcept;
void destroy_plan(Plan* plan) noexcept;  // null is fine
const Shape& plan_shape(const Plan& plan) noexcept;

// ---------------------------------------------------------------------------------------------------------------------------
// GPU. In a build without CUDA every function returns kUnavailable.

class DevicePlan;

// Uploads the tables to the current device (equal lengths share one copy per device) and picks launch sizes. Allocates and
// synchronises: call it at set-up, never while a stream is captured.
Status cuda_prepare(const Plan& plan, DevicePlan** device_plan) noexcept;
void cuda_release(DevicePlan* device_plan) noexcept;  // null is fine; call with no kernel of it in flight

// Bytes of device workspace cuda_run needs for up to `tokens` tokens. 0 wherever the transforms fit in shared memory, as for
// every size in use; longer ones run in global memory. The same on all GPUs with the same limit of shared memory.
size_t cuda_workspace_bytes(const DevicePlan& device_plan, int64_t tokens) noexcept;

// Launches on `stream`; the device of cuda_prepare must be current. `workspace`: cuda_workspace_bytes(.., problem.tokens) bytes,
// aligned to 16, private to this call until the stream has passed it; null where 0 are needed.
Status cuda_run(const DevicePlan& device_plan, const Problem& problem, void* workspace, size_t workspace_bytes,
                CUstream_st* stream) noexcept;

// Text of the last CUDA error this thread met in the functions above, never null.
const char* cuda_error() noexcept;

// ---------------------------------------------------------------------------------------------------------------------------
// CPU. The numbers of a token depend on its row alone: neither on the other rows of the call nor on the number of threads.

// Runs body(context, i) for every i in 0 .. count - 1, in any order and on any threads, and returns when all are done.
struct Parallel {
  void (*run)(void* pool, size_t count, void (*body)(void* context, size_t i), void* context);
  void* pool;
  int32_t threads;  // how many may run at once, for splitting the work
};

// null `parallel`: everything on the calling thread.
Status cpu_run(const Plan& plan, const Problem& problem, const Parallel* parallel) noexcept;

// Vector instructions cpu_run uses on this machine: "avx512", "avx2" or "baseline".
const char* cpu_isa() noexcept;

}  // namespace sdct

#endif  // SDCT_SDCT_H_
