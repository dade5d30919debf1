// What both plugin interfaces share: attributes, checks of tensors, the kernels of a node, logging. No exception leaves a guard.
#ifndef SDCT_TENSORRT_NODE_H_
#define SDCT_TENSORRT_NODE_H_

#include <NvInfer.h>

#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sdct/sdct.h"

namespace sdct::tensorrt {

// The ONNX parser looks a plugin up by op_type and the attributes plugin_version ("1" where absent) and plugin_namespace
// ("" where absent), so an exported node needs none of them.
constexpr char const* kPluginName = "SpectralDelta";
constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "";

// Inputs of a node; y_1 ... y_m follow from kFirstY on, and output j is y_j'.
enum Input : int32_t { kX, kIds, kScales, kValues, kIndices, kFirstY };

// Why a node, tensor or call is refused.
class Refused : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- Logging -----------------------------------------------------------------------------------------------------------------

// The logger of whoever calls on this thread, else TensorRT's global one; null where there is none.
nvinfer1::ILogger* host_logger() noexcept;

// Logs "SpectralDelta <node>: <message>" as an error through the logger of the caller, stderr where there is none.
void log_error(std::string const& node, char const* message) noexcept;

// `body()`, or `failure` with the reason logged where it throws.
template <typename Result, typename Body>
Result guard(std::string const& node, Result failure, Body body) noexcept {
  try {
    return body();
  } catch (std::exception const& error) {
    log_error(node, error.what());
  } catch (...) {
    log_error(node, "unknown exception");
  }
  return failure;
}

// --- Attributes --------------------------------------------------------------------------------------------------------------

// Names of the fields a creator advertises: d_in int32 [1], d_out int32 [m], capacity int32 [m].
std::vector<nvinfer1::PluginField> const& attribute_fields();

// Checks names, types and lengths of every field. `saved` says that the fields come from an engine and carry a version.
// Throws Refused.
Shape read_fields(nvinfer1::PluginFieldCollection const* fields, bool saved);

// The fields of `shape` plus the version; they point into `shape`.
std::vector<nvinfer1::PluginField> saved_fields(Shape const& shape);

// The same as bytes, with a checksum. read_bytes throws Refused for anything write_bytes did not write.
std::vector<char> write_bytes(Shape const& shape);
Shape read_bytes(void const* data, size_t size);

// One line that tells two shapes apart, e.g. "1:4096:4096x700,1024x700".
std::string describe(Shape const& shape);

// --- Tensors -----------------------------------------------------------------------------------------------------------------

using Extents = std::vector<int64_t>;  // -1 where not known yet

template <typename Dims>
Extents extents(Dims const& dims) {
  return Extents(dims.d, dims.d + (dims.nbDims > 0 ? dims.nbDims : 0));
}

inline Extents extents(nvinfer1::DimsExprs const& dims) {
  Extents found;
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    found.push_back(dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : -1);
  }
  return found;
}

// -1 where not known yet.
struct Sizes {
  int64_t tokens;
  int64_t rows;
  int64_t blends;
  int64_t slots;
};

// Checks count, rank and every known extent against the contract. `outputs` may be empty. Throws Refused.
Sizes check_extents(Shape const& shape, std::vector<Extents> const& inputs, std::vector<Extents> const& outputs);

// Whether tensor `pos` of `inputs` inputs and then `outputs` outputs may have the type and format of `tensor`, given x.
bool supports(Shape const& shape, int32_t pos, nvinfer1::PluginTensorDesc const& tensor, nvinfer1::PluginTensorDesc const& x,
              int32_t inputs, int32_t outputs) noexcept;

inline nvinfer1::PluginTensorDesc const& plain(nvinfer1::PluginTensorDesc const& desc) { return desc; }
inline nvinfer1::PluginTensorDesc const& plain(nvinfer1::DynamicPluginTensorDesc const& desc) { return desc.desc; }

// Checks types, formats and extents of all tensors of a node. Throws Refused.
template <typename Desc>
Sizes check_tensors(Shape const& shape, Desc const* in, int32_t inputs, Desc const* out, int32_t outputs) {
  std::vector<Extents> found[2];
  for (int32_t i = 0; i < inputs + outputs; ++i) {
    nvinfer1::PluginTensorDesc const& desc = plain(i < inputs ? in[i] : out[i - inputs]);
    if (!supports(shape, i, desc, plain(in[kX]), inputs, outputs)) {
      throw Refused("tensor " + std::to_string(i) + " of " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                    " outputs has DataType " + std::to_string(static_cast<int32_t>(desc.type)) + " and TensorFormat " +
                    std::to_string(static_cast<int32_t>(desc.format)) +
                    "; x, y and outputs must share one float type, ids and indices be int32, scales and values float32, all linear");
    }
    found[i < inputs ? 0 : 1].push_back(extents(desc.dims));
  }
  return check_extents(shape, found[0], found[1]);
}

// --- Kernels -----------------------------------------------------------------------------------------------------------------

// The plan of a node and its tables on every device it has run on; shared by a plugin and its clones.
class Kernels {
 public:
  explicit Kernels(Shape const& shape);  // throws Refused
  ~Kernels();
  Kernels(Kernels const&) = delete;
  Kernels& operator=(Kernels const&) = delete;

  Shape const& shape() const { return plan_shape(*plan_); }
  // For the current device; allocates on the first call for it, which therefore belongs in set-up. Throws Refused.
  DevicePlan const& device_plan();

 private:
  Plan* plan_ = nullptr;
  std::mutex mutex_;
  std::vector<std::pair<int, DevicePlan*>> device_plans_;  // guarded by mutex_
};

// Device workspace of a call with an x of these extents. Throws Refused.
size_t workspace_bytes(Kernels& kernels, Extents const& x);

// Runs a node on `stream`; every extent must be known. Throws Refused.
void run(Kernels& kernels, nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const* output_descs,
         void const* const* inputs, void* const* outputs, void* workspace, CUstream_st* stream);

}  // namespace sdct::tensorrt

#endif  // SDCT_TENSORRT_NODE_H_
