#include "node.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>

namespace sdct::tensorrt {
namespace {

constexpr char const* kVersionField = "contract_version";
constexpr uint32_t kMagic = 0x54434453;  // "SDCT"

[[noreturn]] void refuse(std::string const& message) { throw Refused(message); }

std::string text(Extents const& extents) {
  std::string out = "[";
  for (size_t i = 0; i < extents.size(); ++i) {
    out += (i ? ", " : "") + (extents[i] < 0 ? std::string("?") : std::to_string(extents[i]));
  }
  return out + "]";
}

// Creating a plan is the core's own check of a shape.
Shape checked(Shape const& shape) {
  Plan* plan = nullptr;
  Status const status = create_plan(shape, &plan);
  destroy_plan(plan);
  if (status != Status::kOk) {
    refuse("attributes " + describe(shape) + ": " + status_text(status));
  }
  return shape;
}

std::vector<int32_t> int_field(nvinfer1::PluginField const& field, std::string const& expected) {
  if (field.type != nvinfer1::PluginFieldType::kINT32) {
    refuse("attribute " + std::string(field.name) + " must be int32 (PluginFieldType 5), got type " +
           std::to_string(static_cast<int32_t>(field.type)) + "; export the model again");
  }
  if (field.data == nullptr || field.length < 1 || field.length > kMaxProjections) {
    refuse("attribute " + std::string(field.name) + " must hold " + expected + ", got " + std::to_string(field.length) +
           " numbers; export the model again");
  }
  auto const* data = static_cast<char const*>(field.data);
  std::vector<int32_t> numbers(field.length);
  std::memcpy(numbers.data(), data, numbers.size() * sizeof(int32_t));
  return numbers;
}

Shape make_shape(int32_t d_in, std::vector<int32_t> const& d_out, std::vector<int32_t> const& capacity) {
  Shape shape{};
  shape.d_in = d_in;
  shape.projections = static_cast<int32_t>(d_out.size());
  std::copy(d_out.begin(), d_out.end(), shape.d_out);
  std::copy(capacity.begin(), capacity.end(), shape.capacity);
  return checked(shape);
}

uint32_t checksum(uint32_t const* words, size_t count) {  // FNV-1a over bytes
  uint32_t hash = 2166136261u;
  auto const* bytes = reinterpret_cast<unsigned char const*>(words);
  for (size_t i = 0; i < count * sizeof(uint32_t); ++i) {
    hash = (hash ^ bytes[i]) * 16777619u;
  }
  return hash;
}

// The product of all extents but the last, -1 where one of them is not known.
int64_t leading(Extents const& extents) {
  int64_t product = 1;
  for (size_t i = 0; i + 1 < extents.size(); ++i) {
    if (extents[i] < 0) {
      return -1;
    }
    if (extents[i] != 0 && product > INT64_MAX / extents[i]) {
      refuse("a tensor of extents " + text(extents) + " is too large");
    }
    product *= extents[i];
  }
  return product;
}

bool differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }

void expect_rank(char const* name, Extents const& found, size_t rank) {
  if (found.size() != rank) {
    refuse(std::string(name) + " must have rank " + std::to_string(rank) + ", got " + text(found));
  }
}

void expect_last(std::string const& name, Extents const& found, int64_t last) {
  if (found.empty() || differ(found.back(), last)) {
    refuse(name + " must end in an extent of " + std::to_string(last) + ", got " + text(found));
  }
}

// Why the core did not do something.
std::string reason(Status status) {
  return status_text(status) + (status == Status::kCuda ? std::string(": ") + cuda_error() : std::string());
}

DataType core_type(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return DataType::kFloat32;
    case nvinfer1::DataType::kHALF:
      return DataType::kFloat16;
#if NV_TENSORRT_MAJOR >= 9
    case nvinfer1::DataType::kBF16:
      return DataType::kBFloat16;
#endif
    default:
      refuse("x and y must be float32, float16 or bfloat16, got DataType " + std::to_string(static_cast<int32_t>(type)));
  }
}

}  // namespace

void log_error(std::string const& node, char const* message) noexcept {
  try {
    std::string const line = std::string(kPluginName) + " " + (node.empty() ? "(unnamed)" : node) + ": " + message;
    if (nvinfer1::ILogger* logger = host_logger()) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    } else {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
  } catch (...) {  // out of memory: nothing more can be said
  }
}

std::vector<nvinfer1::PluginField> const& attribute_fields() {
  using nvinfer1::PluginField;
  using nvinfer1::PluginFieldType;
  static std::vector<PluginField> const fields = {PluginField("d_in", nullptr, PluginFieldType::kINT32, 1),
                                                  PluginField("d_out", nullptr, PluginFieldType::kINT32, 1),
                                                  PluginField("capacity", nullptr, PluginFieldType::kINT32, 1)};
  return fields;
}

Shape read_fields(nvinfer1::PluginFieldCollection const* fields, bool saved) {
  if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
    refuse("no attributes were given; expected d_in, d_out and capacity");
  }
  std::vector<int32_t> d_in, d_out, capacity, version;
  std::pair<char const*, std::vector<int32_t>*> const known[] = {
      {"d_in", &d_in}, {"d_out", &d_out}, {"capacity", &capacity}, {kVersionField, &version}};
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    nvinfer1::PluginField const& field = fields->fields[i];
    std::string const name = field.name ? field.name : "";
    auto const* entry =
        std::find_if(std::begin(known), std::end(known), [&](auto const& candidate) { return name == candidate.first; });
    if (entry == std::end(known) || (entry->second == &version && !saved)) {
      refuse("unknown attribute '" + name + "'; this plugin knows d_in, d_out and capacity (contract version " +
             std::to_string(kVersion) + ")");
    }
    if (!entry->second->empty()) {
      refuse("attribute " + name + " is given twice");
    }
    bool const list = entry->second == &d_out || entry->second == &capacity;
    *entry->second = int_field(field, list ? "1 to " + std::to_string(kMaxProjections) + " numbers" : "1 number");
    if (!list && entry->second->size() != 1) {
      refuse("attribute " + name + " must hold 1 number, got " + std::to_string(entry->second->size()));
    }
  }
  for (auto const& [name, numbers] : known) {
    if (numbers->empty() && (numbers != &version || saved)) {
      refuse("attribute " + std::string(name) + " is missing; export the model again");
    }
  }
  if (saved && version[0] != kVersion) {
    refuse("the engine holds contract version " + std::to_string(version[0]) + ", this plugin reads " +
           std::to_string(kVersion) + "; build the engine again");
  }
  if (d_out.size() != capacity.size()) {
    refuse("d_out has " + std::to_string(d_out.size()) + " numbers and capacity " + std::to_string(capacity.size()) +
           "; both need one for each projection");
  }
  return make_shape(d_in[0], d_out, capacity);
}

std::vector<nvinfer1::PluginField> saved_fields(Shape const& shape) {
  using nvinfer1::PluginField;
  using nvinfer1::PluginFieldType;
  return {PluginField("d_in", &shape.d_in, PluginFieldType::kINT32, 1),
          PluginField("d_out", shape.d_out, PluginFieldType::kINT32, shape.projections),
          PluginField("capacity", shape.capacity, PluginFieldType::kINT32, shape.projections),
          PluginField(kVersionField, &kVersion, PluginFieldType::kINT32, 1)};
}

std::vector<char> write_bytes(Shape const& shape) {
  std::vector<uint32_t> words = {kMagic, kVersion, static_cast<uint32_t>(shape.d_in),
                                 static_cast<uint32_t>(shape.projections)};
  words.insert(words.end(), shape.d_out, shape.d_out + shape.projections);
  words.insert(words.end(), shape.capacity, shape.capacity + shape.projections);
  words.push_back(checksum(words.data(), words.size()));
  auto const* bytes = reinterpret_cast<char const*>(words.data());
  return std::vector<char>(bytes, bytes + words.size() * sizeof(uint32_t));
}

Shape read_bytes(void const* data, size_t size) {
  std::vector<uint32_t> words(size / sizeof(uint32_t));
  if (data == nullptr || size % sizeof(uint32_t) != 0 || words.size() < 7) {
    refuse("the engine holds " + std::to_string(size) + " bytes for this node, which cannot be; build it again");
  }
  std::memcpy(words.data(), data, size);
  if (words[0] != kMagic) {
    refuse("the engine's bytes for this node were not written by this plugin; build it again");
  }
  if (words[1] != kVersion) {
    refuse("the engine holds contract version " + std::to_string(words[1]) + ", this plugin reads " +
           std::to_string(kVersion) + "; build the engine again");
  }
  uint32_t const count = words[3];
  if (count < 1 || count > kMaxProjections || words.size() != 5 + 2 * static_cast<size_t>(count) ||
      checksum(words.data(), words.size() - 1) != words.back()) {
    refuse("the engine's bytes for this node are damaged; build it again");
  }
  auto const first = words.begin() + 4;
  return make_shape(static_cast<int32_t>(words[2]), std::vector<int32_t>(first, first + count),
                    std::vector<int32_t>(first + count, first + 2 * count));
}

std::string describe(Shape const& shape) {
  std::string out = std::to_string(kVersion) + ":" + std::to_string(shape.d_in) + ":";
  for (int32_t j = 0; j < shape.projections && j < kMaxProjections; ++j) {
    out += (j ? "," : "") + std::to_string(shape.d_out[j]) + "x" + std::to_string(shape.capacity[j]);
  }
  return out;
}

Sizes check_extents(Shape const& shape, std::vector<Extents> const& inputs, std::vector<Extents> const& outputs) {
  size_t const projections = static_cast<size_t>(shape.projections);
  if (inputs.size() != kFirstY + projections || (!outputs.empty() && outputs.size() != projections)) {
    refuse("a node of " + std::to_string(projections) + " projections has " + std::to_string(kFirstY + projections) +
           " inputs and " + std::to_string(projections) + " outputs, got " + std::to_string(inputs.size()) + " and " +
           std::to_string(outputs.size()));
  }
  Extents const &x = inputs[kX], &ids = inputs[kIds], &scales = inputs[kScales];
  Extents const &values = inputs[kValues], &indices = inputs[kIndices];
  expect_rank("adapter_ids", ids, 2);
  expect_rank("adapter_scales", scales, 2);
  expect_rank("values", values, 2);
  expect_rank("indices", indices, 3);
  int64_t entries = 0;
  for (size_t j = 0; j < projections; ++j) {
    entries += shape.capacity[j];
  }
  if (x.size() < 2) {
    refuse("x must have rank 2 or more, got " + text(x));
  }
  expect_last("x", x, shape.d_in);
  expect_last("values", values, entries);
  expect_last("indices", indices, 2);
  if (differ(indices[1], entries)) {
    refuse("indices must be [slots, " + std::to_string(entries) + ", 2], got " + text(indices));
  }
  if (differ(values[0], indices[0])) {
    refuse("values " + text(values) + " and indices " + text(indices) + " differ in their number of slots");
  }
  if (values[0] == 0 || indices[0] == 0) {
    refuse("the bank has no slot; slot 0 must exist and hold zeros");
  }
  if (differ(ids[0], scales[0]) || differ(ids[1], scales[1])) {
    refuse("adapter_ids " + text(ids) + " and adapter_scales " + text(scales) + " differ in shape");
  }
  int64_t const tokens = leading(x);
  for (size_t j = 0; j < projections; ++j) {
    std::string const name = "y_" + std::to_string(j + 1);
    Extents const& y = inputs[kFirstY + j];
    expect_last(name, y, shape.d_out[j]);
    if (differ(leading(y), tokens)) {
      refuse(name + " " + text(y) + " and x " + text(x) + " differ in their number of tokens");
    }
    for (size_t i = 0; !outputs.empty() && i < std::max(y.size(), outputs[j].size()); ++i) {
      if (y.size() != outputs[j].size() || differ(y[i], outputs[j][i])) {
        refuse("output " + std::to_string(j) + " " + text(outputs[j]) + " must have the shape of " + name + " " + text(y));
      }
    }
  }
  int64_t const rows = std::max(ids[0], scales[0]);
  if (tokens >= 0 && rows >= 0 && (rows == 0 ? tokens != 0 : tokens % rows != 0)) {
    refuse("x " + text(x) + " has " + std::to_string(tokens) + " tokens, which cannot be split over the " +
           std::to_string(rows) + " rows of adapter_ids");
  }
  return {tokens, rows, std::max(ids[1], scales[1]), std::max(values[0], indices[0])};
}

bool supports(Shape const& shape, int32_t pos, nvinfer1::PluginTensorDesc const& tensor, nvinfer1::PluginTensorDesc const& x,
              int32_t inputs, int32_t outputs) noexcept {
  using Type = nvinfer1::DataType;
  if (inputs != kFirstY + shape.projections || outputs != shape.projections ||
      tensor.format != nvinfer1::TensorFormat::kLINEAR) {
    return false;
  }
  switch (pos) {
    case kX:
#if NV_TENSORRT_MAJOR >= 9
      return tensor.type == Type::kFLOAT || tensor.type == Type::kHALF || tensor.type == Type::kBF16;
#else
      return tensor.type == Type::kFLOAT || tensor.type == Type::kHALF;
#endif
    case kIds:
    case kIndices:
      return tensor.type == Type::kINT32;
    case kScales:
    case kValues:
      return tensor.type == Type::kFLOAT;
    default:
      return tensor.type == x.type;
  }
}

Kernels::Kernels(Shape const& shape) {
  Status const status = create_plan(shape, &plan_);
  if (status != Status::kOk) {
    refuse("attributes " + describe(shape) + ": " + status_text(status));
  }
}

Kernels::~Kernels() {
  for (auto const& [device, device_plan] : device_plans_) {
    cuda_release(device_plan);
  }
  destroy_plan(plan_);
}

DevicePlan const& Kernels::device_plan() {
  int device = 0;
  cudaError_t const error = cudaGetDevice(&device);
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // reported here; the host's own checks must not meet it again
    refuse(std::string("no CUDA device: ") + cudaGetErrorString(error));
  }
  std::lock_guard<std::mutex> const lock(mutex_);
  for (auto const& [known, device_plan] : device_plans_) {
    if (known == device) {
      return *device_plan;
    }
  }
  device_plans_.reserve(device_plans_.size() + 1);  // nothing may fail between preparing and keeping
  DevicePlan* prepared = nullptr;
  Status const status = cuda_prepare(*plan_, &prepared);
  if (status != Status::kOk) {
    refuse("cannot prepare device " + std::to_string(device) + ": " + reason(status));
  }
  device_plans_.emplace_back(device, prepared);
  return *prepared;
}

size_t workspace_bytes(Kernels& kernels, Extents const& x) {
  int64_t const tokens = leading(x);
  return tokens > 0 ? cuda_workspace_bytes(kernels.device_plan(), tokens) : 0;
}

void run(Kernels& kernels, nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const* output_descs,
         void const* const* inputs, void* const* outputs, void* workspace, CUstream_st* stream) {
  Shape const& shape = kernels.shape();
  Sizes const sizes =
      check_tensors(shape, input_descs, kFirstY + shape.projections, output_descs, shape.projections);
  if (sizes.tokens == 0) {
    return;
  }
  Problem problem{};
  problem.type = core_type(input_descs[kX].type);
  problem.rows = sizes.rows;
  problem.blends = sizes.blends;
  problem.slots = sizes.slots;
  problem.tokens = sizes.tokens;
  problem.x = inputs[kX];
  problem.ids = static_cast<int32_t const*>(inputs[kIds]);
  problem.scales = static_cast<float const*>(inputs[kScales]);
  problem.values = static_cast<float const*>(inputs[kValues]);
  problem.indices = static_cast<int32_t const*>(inputs[kIndices]);
  for (int32_t j = 0; j < shape.projections; ++j) {
    problem.y_in[j] = inputs[kFirstY + j];
    problem.y_out[j] = outputs[j];
  }
  set_dense_strides(shape, &problem);
  DevicePlan const& device_plan = kernels.device_plan();
  size_t const bytes = cuda_workspace_bytes(device_plan, sizes.tokens);
  Status const status = cuda_run(device_plan, problem, bytes ? workspace : nullptr, bytes, stream);
  if (status != Status::kOk) {
    refuse("the kernel was not launched: " + reason(status));
  }
}

}  // namespace sdct::tensorrt
