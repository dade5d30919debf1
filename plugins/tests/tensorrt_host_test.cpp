// Drives the TensorRT plugin library through its own interface, with no TensorRT and no GPU: the host below is this program.
// Built against each TensorRT version's headers by compile_matrix.sh. Usage: tensorrt_host_test LIBRARY
#include <NvInfer.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "expected.h"

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

namespace {

std::string g_log;
int g_checks = 0;
int g_failures = 0;

struct Logger final : nvinfer1::ILogger {
  void log(Severity severity, char const* message) noexcept override {
    g_log += severity == Severity::kERROR ? message : "not an error";
    g_log += "\n";
  }
} g_logger;

#define CHECK(condition)                                                                     \
  do {                                                                                       \
    ++g_checks;                                                                              \
    if (!(condition)) {                                                                      \
      ++g_failures;                                                                          \
      std::printf("%s:%d: %s; log: %s\n", __FILE__, __LINE__, #condition, g_log.c_str());    \
    }                                                                                        \
    g_log.clear();                                                                           \
  } while (false)

// `condition` and an error in the log that names the node and holds `reason`.
#define CHECK_REFUSED(condition, reason)                                                                              \
  do {                                                                                                                \
    bool const refused = (condition);                                                                                 \
    CHECK(refused && g_log.find("SpectralDelta attn.q") == 0 && g_log.find(reason) != std::string::npos);              \
  } while (false)

struct Expr final : nvinfer1::IDimensionExpr, nvinfer1::apiv::VDimensionExpr {
  explicit Expr(int64_t value) : value(value) { mImpl = this; }
  bool isConstant() const override { return value >= 0; }
  decltype(std::declval<nvinfer1::IDimensionExpr>().getConstantValue()) getConstantValue() const override { return value; }
#if NV_TENSORRT_MAJOR >= 10
  bool isSizeTensor() const override { return false; }
#endif
  int64_t value;
};

struct Builder final : nvinfer1::IExprBuilder {};

Dims dims(std::vector<int64_t> const& extents) {
  Dims out{};
  out.nbDims = static_cast<int32_t>(extents.size());
  for (size_t i = 0; i < extents.size(); ++i) {
    out.d[i] = extents[i];
  }
  return out;
}

using Shapes = std::vector<std::vector<int64_t>>;

// A node of two projections, d_in 64, d_out 64 and 32, capacity 7 and 3, with the tensors of a call.
struct Node {
  std::vector<int32_t> d_in{64}, d_out{64, 32}, capacity{7, 3};
  Shapes in{{4, 5, 64}, {4, 2}, {4, 2}, {9, 10}, {9, 10, 2}, {4, 5, 64}, {4, 5, 32}};
  Shapes out{{4, 5, 64}, {4, 5, 32}};
  DataType type = DataType::kFLOAT;

  std::vector<PluginTensorDesc> descs() const {
    std::vector<DataType> const types{type,          DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT32,
                                      type,          type,             type,             type};
    std::vector<PluginTensorDesc> found;
    for (size_t i = 0; i < in.size() + out.size(); ++i) {
      PluginTensorDesc desc{};
      desc.dims = dims(i < in.size() ? in[i] : out[i - in.size()]);
      desc.type = types[i];
      desc.format = TensorFormat::kLINEAR;
      found.push_back(desc);
    }
    return found;
  }
  std::vector<DynamicPluginTensorDesc> dynamic() const {
    std::vector<DynamicPluginTensorDesc> found;
    for (PluginTensorDesc const& desc : descs()) {
      DynamicPluginTensorDesc full{};
      full.desc = desc;
      full.min = full.max = desc.dims;
      found.push_back(full);
    }
    return found;
  }
  std::vector<PluginField> fields() const {
    auto const field = [](char const* name, std::vector<int32_t> const& v) {
      return PluginField(name, v.data(), PluginFieldType::kINT32, static_cast<int32_t>(v.size()));
    };
    return {field("d_in", d_in), field("d_out", d_out), field("capacity", capacity)};
  }
};

PluginFieldCollection collection(std::vector<PluginField> const& fields) {
  PluginFieldCollection out{};
  out.nbFields = static_cast<int32_t>(fields.size());
  out.fields = fields.data();
  return out;
}

// --- what differs between the two interfaces ---------------------------------------------------------------------------------

#if NV_TENSORRT_MAJOR >= 10
using Creator = nvinfer1::IPluginCreatorV3One;
using Plugin = nvinfer1::IPluginV3;
constexpr char const* kEntry = "getCreators";
using Entry = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
Creator* as_creator(nvinfer1::IPluginCreatorInterface* creator) { return static_cast<Creator*>(creator); }
auto* build(Plugin* p) {
  return static_cast<nvinfer1::IPluginV3OneBuild*>(p->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}
auto* runtime(Plugin* p) {
  return static_cast<nvinfer1::IPluginV3OneRuntime*>(p->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}
Plugin* create(Creator* c, std::vector<PluginField> const& fields) {
  PluginFieldCollection const all = collection(fields);
  return c->createPlugin("attn.q", &all, nvinfer1::TensorRTPhase::kBUILD);
}
void destroy(Plugin* p) { delete p; }
bool supports(Plugin* p, int32_t pos, Node const& node, std::vector<PluginTensorDesc> const& descs) {
  std::vector<DynamicPluginTensorDesc> all;
  for (auto const& desc : descs) {
    DynamicPluginTensorDesc full{};
    full.desc = desc;
    all.push_back(full);
  }
  return build(p)->supportsFormatCombination(pos, all.data(), static_cast<int32_t>(node.in.size()),
                                             static_cast<int32_t>(node.out.size()));
}
bool configures(Plugin* p, Node const& node) {
  auto const all = node.dynamic();
  return build(p)->configurePlugin(all.data(), static_cast<int32_t>(node.in.size()), all.data() + node.in.size(),
                                   static_cast<int32_t>(node.out.size())) == 0;
}
bool infers(Plugin* p, nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs* out, int32_t outputs) {
  Builder builder;
  return build(p)->getOutputShapes(in, inputs, nullptr, 0, out, outputs, builder) == 0;
}
int32_t enqueue(Plugin* p, std::vector<PluginTensorDesc> const& descs, void const* const* in, void* const* out) {
  return runtime(p)->enqueue(descs.data(), descs.data() + 7, in, out, nullptr, nullptr);
}
size_t workspace(Plugin* p, Node const& node) {
  auto const all = node.dynamic();
  return build(p)->getWorkspaceSize(all.data(), 7, all.data() + 7, 2);
}
int32_t outputs(Plugin* p) { return build(p)->getNbOutputs(); }

void check_interface(Creator* creator, Plugin* plugin, Node const& node) {
  auto* core =
      static_cast<nvinfer1::IPluginV3OneCore*>(plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
  CHECK(std::string(core->getPluginName()) == "SpectralDelta" && std::string(core->getPluginVersion()) == "1" &&
        std::string(core->getPluginNamespace()).empty());
  DataType const in[] = {DataType::kHALF,  DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT,
                         DataType::kINT32, DataType::kHALF,  DataType::kHALF};
  DataType out[2] = {};
  CHECK(build(plugin)->getOutputDataTypes(out, 2, in, 7) == 0 && out[0] == DataType::kHALF && out[1] == DataType::kHALF);
  CHECK_REFUSED(build(plugin)->getOutputDataTypes(out, 2, in, 6) != 0, "6 inputs");

  // what an engine keeps makes the same plugin at run time, and only there
  PluginFieldCollection const* saved = runtime(plugin)->getFieldsToSerialize();
  CHECK(saved && saved->nbFields == 4);
  Plugin* again = creator->createPlugin("attn.q", saved, nvinfer1::TensorRTPhase::kRUNTIME);
  CHECK(again && std::string(build(again)->getTimingCacheID()) == build(plugin)->getTimingCacheID());
  destroy(again);
  CHECK_REFUSED(creator->createPlugin("attn.q", saved, nvinfer1::TensorRTPhase::kBUILD) == nullptr, "contract_version");
  auto const fields = node.fields();
  PluginFieldCollection const fresh = collection(fields);
  CHECK_REFUSED(creator->createPlugin("attn.q", &fresh, nvinfer1::TensorRTPhase::kRUNTIME) == nullptr, "missing");
  auto newer = fields;
  int32_t const version = 2;
  newer.emplace_back("contract_version", &version, PluginFieldType::kINT32, 1);
  PluginFieldCollection const future = collection(newer);
  CHECK_REFUSED(creator->createPlugin("attn.q", &future, nvinfer1::TensorRTPhase::kRUNTIME) == nullptr, "version 2");

  Node other = node;
  other.capacity = {3, 7};
  Plugin* different = create(creator, other.fields());
  CHECK(different && std::string(build(different)->getTimingCacheID()) != build(plugin)->getTimingCacheID());
  destroy(different);
  Plugin* attached = runtime(plugin)->attachToContext(nullptr);
  CHECK(attached != nullptr && attached != plugin && configures(attached, node));
  destroy(attached);

  auto const descs = node.descs();
  auto changed = descs;
  changed[3].dims.d[1] = 11;
  CHECK_REFUSED(runtime(plugin)->onShapeChange(changed.data(), 7, changed.data() + 7, 2) != 0, "values");
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
  auto* aliased = static_cast<nvinfer1::IPluginV3OneBuildV2*>(build(plugin));
  CHECK(aliased->getAliasedInput(0) == 5 && aliased->getAliasedInput(1) == 6);
#endif
}

#else

using Creator = nvinfer1::IPluginCreator;
using Plugin = nvinfer1::IPluginV2DynamicExt;
constexpr char const* kEntry = "getPluginCreators";
using Entry = Creator* const* (*)(int32_t&);
Creator* as_creator(Creator* creator) { return creator; }
Plugin* create(Creator* c, std::vector<PluginField> const& fields) {
  PluginFieldCollection const all = collection(fields);
  return static_cast<Plugin*>(c->createPlugin("attn.q", &all));
}
void destroy(Plugin* p) { p->destroy(); }
bool supports(Plugin* p, int32_t pos, Node const& node, std::vector<PluginTensorDesc> const& descs) {
  return p->supportsFormatCombination(pos, descs.data(), static_cast<int32_t>(node.in.size()),
                                      static_cast<int32_t>(node.out.size()));
}
bool configures(Plugin* p, Node const& node) {
  auto const all = node.dynamic();
  p->configurePlugin(all.data(), static_cast<int32_t>(node.in.size()), all.data() + node.in.size(),
                     static_cast<int32_t>(node.out.size()));
  return g_log.empty();  // the interface cannot refuse, only log
}
bool infers(Plugin* p, nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs* out, int32_t outputs) {
  Builder builder;
  for (int32_t j = 0; j < outputs; ++j) {
    out[j] = p->getOutputDimensions(j, in, inputs, builder);
  }
  return out[0].nbDims >= 0;
}
int32_t enqueue(Plugin* p, std::vector<PluginTensorDesc> const& descs, void const* const* in, void* const* out) {
  return p->enqueue(descs.data(), descs.data() + 7, in, out, nullptr, nullptr);
}
size_t workspace(Plugin* p, Node const& node) {
  auto const descs = node.descs();
  return p->getWorkspaceSize(descs.data(), 7, descs.data() + 7, 2);
}
int32_t outputs(Plugin* p) { return p->getNbOutputs(); }

void check_interface(Creator* creator, Plugin* plugin, Node const&) {
  CHECK(std::string(plugin->getPluginType()) == "SpectralDelta" && std::string(plugin->getPluginVersion()) == "1" &&
        std::string(plugin->getPluginNamespace()).empty());
  DataType const in[] = {DataType::kHALF,  DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT,
                         DataType::kINT32, DataType::kHALF,  DataType::kHALF};
  CHECK(plugin->getOutputDataType(1, in, 7) == DataType::kHALF);

  std::vector<char> bytes(plugin->getSerializationSize());
  plugin->serialize(bytes.data());
  auto* again = static_cast<Plugin*>(creator->deserializePlugin("attn.q", bytes.data(), bytes.size()));
  CHECK(again && again->getNbOutputs() == 2);
  std::vector<char> twice(again->getSerializationSize());
  again->serialize(twice.data());
  CHECK(twice == bytes);
  destroy(again);
  for (size_t i = 0; i < bytes.size(); ++i) {  // one damaged byte, anywhere
    auto damaged = bytes;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x20);
    CHECK_REFUSED(creator->deserializePlugin("attn.q", damaged.data(), damaged.size()) == nullptr, "engine");
  }
  for (size_t size = 0; size < bytes.size(); ++size) {
    CHECK_REFUSED(creator->deserializePlugin("attn.q", bytes.data(), size) == nullptr, "engine");
  }
  bytes.push_back(0);
  CHECK_REFUSED(creator->deserializePlugin("attn.q", bytes.data(), bytes.size()) == nullptr, "engine");
  CHECK_REFUSED(creator->deserializePlugin("attn.q", nullptr, 36) == nullptr, "engine");
}
#endif

void check_fields(Creator* creator) {
  Node const good;
  PluginFieldCollection const* names = creator->getFieldNames();
  CHECK(names && names->nbFields == 3 && !std::strcmp(names->fields[0].name, "d_in") &&
        !std::strcmp(names->fields[1].name, "d_out") && !std::strcmp(names->fields[2].name, "capacity"));
  for (size_t i = 0; i < 3; ++i) {
    std::string const name = good.fields()[i].name;
    auto fields = good.fields();
    fields.erase(fields.begin() + static_cast<long>(i));
    CHECK_REFUSED(create(creator, fields) == nullptr, "attribute " + name + " is missing");
    fields = good.fields();
    fields.push_back(fields[i]);
    CHECK_REFUSED(create(creator, fields) == nullptr, "attribute " + name + " is given twice");
    for (int32_t type = 0; type < 9; ++type) {
      if (type != static_cast<int32_t>(PluginFieldType::kINT32)) {
        fields = good.fields();
        fields[i].type = static_cast<PluginFieldType>(type);
        CHECK_REFUSED(create(creator, fields) == nullptr, "must be int32");
      }
    }
    for (int32_t length : {0, -1, 9, 1 << 30}) {
      fields = good.fields();
      fields[i].length = length;
      CHECK_REFUSED(create(creator, fields) == nullptr, "must hold");
    }
    fields = good.fields();
    fields[i].data = nullptr;
    CHECK_REFUSED(create(creator, fields) == nullptr, "must hold");
  }
  auto fields = good.fields();
  fields.emplace_back("scaling", fields[0].data, PluginFieldType::kINT32, 1);
  CHECK_REFUSED(create(creator, fields) == nullptr, "unknown attribute 'scaling'");
  fields = good.fields();
  fields[0].name = nullptr;
  CHECK_REFUSED(create(creator, fields) == nullptr, "unknown attribute ''");
  CHECK_REFUSED(create(creator, {}) == nullptr, "missing");
  Node bad = good;
  bad.d_in = {64, 64};
  CHECK_REFUSED(create(creator, bad.fields()) == nullptr, "1 number");
  bad = good;
  bad.capacity = {7};
  CHECK_REFUSED(create(creator, bad.fields()) == nullptr, "one for each projection");
  for (int32_t value : {0, -1, -2147483647 - 1, (1 << 20) + 1, 2147483647}) {
    bad = good;
    bad.d_in = {value};
    CHECK_REFUSED(create(creator, bad.fields()) == nullptr, "attributes");
    bad = good;
    bad.d_out[1] = value;
    CHECK_REFUSED(create(creator, bad.fields()) == nullptr, "attributes");
  }
  bad = good;
  bad.capacity[0] = -1;
  CHECK_REFUSED(create(creator, bad.fields()) == nullptr, "attributes");
}

void check_formats(Plugin* plugin) {
  Node node;
  std::vector<DataType> const floats{DataType::kFLOAT, DataType::kHALF,
#if NV_TENSORRT_MAJOR >= 9
                                     DataType::kBF16
#endif
  };
  for (DataType type : floats) {
    node.type = type;
    auto const descs = node.descs();
    for (int32_t pos = 0; pos < 9; ++pos) {
      CHECK(supports(plugin, pos, node, descs));
      auto wrong = descs;
      wrong[pos].format = TensorFormat::kCHW32;
      CHECK(!supports(plugin, pos, node, wrong));
      wrong = descs;
      wrong[pos].type = DataType::kINT8;
      CHECK(!supports(plugin, pos, node, wrong));
      if (pos != 0) {  // x itself may be any of them; everything else follows from x or is fixed
        wrong[pos].type = descs[pos].type == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
        CHECK(!supports(plugin, pos, node, wrong));
      }
    }
  }
  node.out.pop_back();
  CHECK(!supports(plugin, 0, node, node.descs()));
}

void check_shapes(Plugin* plugin) {
  Node const good;
  CHECK(configures(plugin, good));
  Node ragged = good;  // [batch * tokens, d_in]
  ragged.in[0] = {20, 64};
  CHECK(configures(plugin, ragged));
  Node empty = good;
  empty.in = {{0, 5, 64}, {0, 2}, {0, 2}, {9, 10}, {9, 10, 2}, {0, 5, 64}, {0, 5, 32}};
  empty.out = {{0, 5, 64}, {0, 5, 32}};
  CHECK(configures(plugin, empty));
  Node unknown = good;
  for (auto* shapes : {&unknown.in, &unknown.out}) {
    for (auto& shape : *shapes) {
      shape[0] = -1;
    }
  }
  CHECK(configures(plugin, unknown));

  struct Case {
    size_t tensor;
    std::vector<int64_t> shape;
    char const* reason;
  };
  for (Case const& bad : std::initializer_list<Case>{{0, {4, 5, 63}, "x must end in an extent of 64"},
                                                     {0, {64}, "x must have rank 2"},
                                                     {0, {4, 6, 64}, "number of tokens"},
                                                     {1, {4}, "adapter_ids must have rank 2"},
                                                     {1, {3, 2}, "differ in shape"},
                                                     {2, {4, 3}, "differ in shape"},
                                                     {3, {9, 11}, "values must end in an extent of 10"},
                                                     {3, {8, 10}, "number of slots"},
                                                     {4, {9, 10, 3}, "indices must end in an extent of 2"},
                                                     {4, {9, 9, 2}, "indices must be"},
                                                     {5, {4, 5, 32}, "y_1 must end in an extent of 64"},
                                                     {6, {5, 5, 32}, "y_2"},
                                                     {7, {4, 5, 32}, "output 0"},
                                                     {8, {5, 4, 32}, "output 1"}}) {
    Node node = good;
    (bad.tensor < 7 ? node.in[bad.tensor] : node.out[bad.tensor - 7]) = bad.shape;
    CHECK_REFUSED(!configures(plugin, node), bad.reason);
  }
  Node node = good;
  node.in[3][0] = node.in[4][0] = 0;
  CHECK_REFUSED(!configures(plugin, node), "no slot");
  node = good;
  node.in[1] = node.in[2] = {3, 2};
  CHECK_REFUSED(!configures(plugin, node), "cannot be split");
  node = good;
  node.in[0] = node.in[5] = node.out[0] = {int64_t{1} << 30, 1 << 30, 1 << 30, 64};
#if NV_TENSORRT_MAJOR >= 10
  node.in[0][0] = node.in[5][0] = node.out[0][0] = int64_t{1} << 40;
  CHECK_REFUSED(!configures(plugin, node), "too large");
#endif
  node = good;
  node.in[3][1] = 11;
  node.in[4][1] = 11;
  CHECK_REFUSED(!configures(plugin, node), "values must end");

  // symbolic extents, as the parser brings them
  std::deque<Expr> store;
  auto const exprs = [&](Shapes const& shapes, bool symbolic) {
    std::vector<nvinfer1::DimsExprs> all;
    for (auto const& shape : shapes) {
      nvinfer1::DimsExprs dims{};
      dims.nbDims = static_cast<int32_t>(shape.size());
      for (size_t i = 0; i < shape.size(); ++i) {
        store.emplace_back(symbolic && i + 1 < shape.size() && shape.size() != 3 ? -1 : shape[i]);
        dims.d[i] = &store.back();
      }
      all.push_back(dims);
    }
    return all;
  };
  nvinfer1::DimsExprs out[2]{};
  for (bool symbolic : {false, true}) {
    auto const in = exprs(good.in, symbolic);
    CHECK(infers(plugin, in.data(), 7, out, 2) && out[0].d[2] == in[5].d[2] && out[1].d[2] == in[6].d[2] &&
          out[1].nbDims == 3);
    CHECK_REFUSED(!infers(plugin, in.data(), 6, out, 2), "7 inputs");
  }
  node = good;
  node.in[0][2] = 65;
  auto const in = exprs(node.in, false);
  CHECK_REFUSED(!infers(plugin, in.data(), 7, out, 2), "x must end");
}

void check_running(Plugin* plugin, bool gpu) {
  void const* in[7] = {};
  void* out[2] = {};
  Node node;
  node.in[0][2] = 63;
  CHECK_REFUSED(enqueue(plugin, node.descs(), in, out) != 0, "x must end");
  Node empty;
  empty.in = {{0, 5, 64}, {0, 2}, {0, 2}, {9, 10}, {9, 10, 2}, {0, 5, 64}, {0, 5, 32}};
  empty.out = {{0, 5, 64}, {0, 5, 32}};
  CHECK(enqueue(plugin, empty.descs(), in, out) == 0);
  if (!gpu) {  // fails and says why, instead of taking the process down
    CHECK_REFUSED(enqueue(plugin, Node().descs(), in, out) != 0, "");
  }
}

// Where the library is linked against the stand-in for the CUDA runtime (ptx/README.md), its launch code and kernels run, too.
struct Cuda {
  explicit Cuda(void* library) {
    find(library, "cudaMalloc", &allocate);
    find(library, "cudaMemcpy", &copy);
    find(library, "cudaFree", &release);
    find(library, "cudaSetDevice", &set_device);
    find(library, "cudaGetDevice", &get_device);
    find(library, "cudaGetLastError", &last_error);
    find(library, "sdct_ptx_refuse_allocation", &refuse_allocation);
  }
  template <typename Function>
  static void find(void* library, char const* name, Function** out) {
    *out = reinterpret_cast<Function*>(dlsym(library, name));
  }
  int (*allocate)(void**, size_t);
  int (*copy)(void*, void const*, size_t, int);
  int (*release)(void*);
  int (*set_device)(int);
  int (*get_device)(int*);
  int (*last_error)();
  void (*refuse_allocation)(int error, int granted);  // null where there is a GPU, or nothing
};

void check_numbers(Plugin* plugin, Cuda const& cuda) {
  expected::Call const call(64, {64, 32}, {7, 3}, 5);
  Node node;
  node.in = {{1, 5, 64}, {1, 2}, {1, 2}, {3, 10}, {3, 10, 2}, {1, 5, 64}, {1, 5, 32}};
  node.out = {{1, 5, 64}, {1, 5, 32}};
  std::vector<void*> owned;
  auto const on_device = [&](void const* host, size_t bytes) {
    void* memory = nullptr;
    CHECK(cuda.allocate(&memory, bytes) == 0 && cuda.copy(memory, host, bytes, 1) == 0);
    owned.push_back(memory);
    return memory;
  };
  void const* in[7] = {on_device(call.x.data(), call.x.size() * 4),           on_device(call.ids.data(), 8),
                       on_device(call.scales.data(), 8),                      on_device(call.values.data(), call.values.size() * 4),
                       on_device(call.indices.data(), call.indices.size() * 4), on_device(call.y[0].data(), call.y[0].size() * 4),
                       on_device(call.y[1].data(), call.y[1].size() * 4)};
  std::vector<std::vector<float>> got(call.y);
  void* out[2] = {on_device(got[0].data(), got[0].size() * 4), on_device(got[1].data(), got[1].size() * 4)};
  for (bool in_place : {false, true}) {
    if (in_place) {
      out[0] = const_cast<void*>(in[5]), out[1] = const_cast<void*>(in[6]);
    }
    CHECK(enqueue(plugin, node.descs(), in, out) == 0);
    for (size_t j = 0; j < 2; ++j) {
      CHECK(cuda.copy(got[j].data(), out[j], got[j].size() * 4, 2) == 0);
      CHECK(call.error(j, got[j]) < 1e-4);
    }
  }
  in[0] = call.x.data();  // memory of the host
  CHECK_REFUSED(enqueue(plugin, node.descs(), in, out) != 0, "outside of device memory");
  CHECK(cuda.last_error() == 0);  // whoever looks next must not meet it
  for (void* memory : owned) {
    cuda.release(memory);
  }
}

// A node whose transforms do not fit on chip, and whose lengths no other node has.
Node long_node(int32_t length) {
  Node node;
  node.d_in = {length};
  node.in[0][2] = length;
  return node;
}

void check_failures(Creator* creator, Cuda const& cuda) {
  void const* in[7] = {};
  void* out[2] = {};
  int place = 0;  // never looked at
  std::fill(std::begin(in), std::end(in), &place);
  std::fill(std::begin(out), std::end(out), &place);
  Node const node = long_node(65536);
  Plugin* plugin = create(creator, node.fields());
  for (auto const& [error, text] : {std::pair<int, char const*>{2, "cannot prepare device 0: out of memory"},
                                    {46, "cannot prepare device 0: a CUDA call failed: CUDA-capable device(s) is/are busy"}}) {
    cuda.refuse_allocation(error, 0);
    CHECK_REFUSED(enqueue(plugin, node.descs(), in, out) != 0, text);
    CHECK(cuda.last_error() == 0);
  }
  CHECK_REFUSED(enqueue(plugin, node.descs(), in, out) != 0,  // and no word of what failed before
                "the kernel was not launched: the device workspace is missing, too small or not aligned to 16 bytes\n");

  setenv("SDCT_PTX_DEVICES", "0", 1);
  CHECK_REFUSED(enqueue(plugin, node.descs(), in, out) != 0, "no CUDA device: no CUDA-capable device is detected");
  CHECK(cuda.last_error() == 0);
  unsetenv("SDCT_PTX_DEVICES");
  destroy(plugin);
}

// An engine keeps the workspace it was built with, and may run on a larger GPU of the same kind.
void check_workspace(Creator* creator) {
  Node node = long_node(65536);
  node.in[0][1] = node.in[5][1] = node.in[6][1] = node.out[0][1] = node.out[1][1] = 1000;
  size_t sizes[2];
  for (int k = 0; k < 2; ++k) {
    setenv("SDCT_PTX_SMS", k ? "160" : "8", 1);
    Plugin* plugin = create(creator, node.fields());
    sizes[k] = workspace(plugin, node);
    destroy(plugin);
  }
  unsetenv("SDCT_PTX_SMS");
  CHECK(sizes[0] > 0 && sizes[0] == sizes[1]);
}

}  // namespace

// What TensorRT exports; the library finds it by name.
extern "C" __attribute__((visibility("default"))) nvinfer1::ILogger* getLogger() noexcept { return &g_logger; }

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: tensorrt_host_test LIBRARY\n");
    return 2;
  }
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  auto const version = reinterpret_cast<int32_t (*)()>(dlsym(library, "sdct_tensorrt_version"));
  auto const entry = reinterpret_cast<Entry>(dlsym(library, kEntry));
  int32_t count = 0;
  Creator* const creator = entry ? as_creator(entry(count)[0]) : nullptr;
  CHECK(version && version() / 10000 == NV_TENSORRT_MAJOR);
  CHECK(creator && count == 1 && std::string(creator->getPluginName()) == "SpectralDelta" &&
        std::string(creator->getPluginVersion()) == "1" && std::string(creator->getPluginNamespace()).empty());
  if (!creator) {
    return 1;
  }
  check_fields(creator);
  Plugin* plugin = create(creator, Node().fields());
  CHECK(plugin != nullptr);
  if (!plugin) {
    return 1;
  }
  CHECK(outputs(plugin) == 2);
  auto* clone = static_cast<Plugin*>(plugin->clone());
  CHECK(clone && clone != plugin && outputs(clone) == 2);
  destroy(clone);
  check_formats(plugin);
  check_shapes(plugin);
  check_interface(creator, plugin, Node());
  check_running(plugin, std::getenv("SDCT_TEST_GPU") != nullptr);
  Cuda const cuda(library);
  if (cuda.refuse_allocation) {
    setenv("SDCT_PTX_DEVICES", "2", 1);
    for (int device : {0, 1, 0}) {  // a context on each, and clones share the kernels
      auto* other = static_cast<Plugin*>(plugin->clone());
      int after = -1;
      CHECK(cuda.set_device(device) == 0);
      check_numbers(other, cuda);
      CHECK(cuda.get_device(&after) == 0 && after == device);
      destroy(other);
    }
    unsetenv("SDCT_PTX_DEVICES");
    check_failures(creator, cuda);
    check_workspace(creator);
  }
  destroy(plugin);
  std::printf("TensorRT %d.%d: %d checks, %d failed\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, g_checks, g_failures);
  return g_failures != 0;
}
