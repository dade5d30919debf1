// TensorRT 10 and later: IPluginV3.
#include <NvInfer.h>

#if NV_TENSORRT_MAJOR >= 10

#include <memory>
#include <string>
#include <vector>

#include "library.h"
#include "node.h"

namespace sdct::tensorrt {
namespace {

#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
#define SDCT_ALIASED_IO 1
using BuildInterface = nvinfer1::IPluginV3OneBuildV2;
#else
using BuildInterface = nvinfer1::IPluginV3OneBuild;
#endif

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public BuildInterface,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(char const* name, Shape const& shape)
      : name_(name ? name : ""), id_(describe(shape)), kernels_(std::make_shared<Kernels>(shape)) {}
  Plugin(Plugin const& other) : name_(other.name_), id_(other.id_), kernels_(other.kernels_) {}  // clones share the kernels

  // --- identity and life
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<BuildInterface*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override {
    return guard(name_, static_cast<Plugin*>(nullptr), [&] { return new Plugin(*this); });
  }
  char const* getPluginName() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // --- building
  int32_t getNbOutputs() const noexcept override { return kernels_->shape().projections; }
  int32_t getOutputDataTypes(nvinfer1::DataType* out, int32_t outputs, nvinfer1::DataType const* in,
                             int32_t inputs) const noexcept override {
    return guard(name_, 1, [&] {
      if (inputs != kFirstY + outputs) {
        throw Refused("got " + std::to_string(inputs) + " inputs for " + std::to_string(outputs) + " outputs");
      }
      for (int32_t j = 0; j < outputs; ++j) {
        out[j] = in[kFirstY + j];
      }
      return 0;
    });
  }
  int32_t getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t outputs, nvinfer1::IExprBuilder&) noexcept override {
    return guard(name_, 1, [&] {
      std::vector<Extents> found;
      for (int32_t i = 0; i < inputs; ++i) {
        found.push_back(extents(in[i]));
      }
      check_extents(kernels_->shape(), found, {});
      for (int32_t j = 0; j < outputs; ++j) {
        out[j] = in[kFirstY + j];
      }
      return 0;
    });
  }
  bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return supports(kernels_->shape(), pos, tensors[pos].desc, tensors[kX].desc, inputs, outputs);
  }
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                          nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override {
    return check(in, inputs, out, outputs);
  }
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t, nvinfer1::DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    return guard(name_, size_t{0}, [&] { return workspace_bytes(*kernels_, extents(in[kX].max)); });
  }
  char const* getTimingCacheID() noexcept override { return id_.c_str(); }
  char const* getMetadataString() noexcept override { return id_.c_str(); }
#ifdef SDCT_ALIASED_IO
  // In effect only where the builder turns on PreviewFeature::kALIASED_PLUGIN_IO_10_03.
  int32_t getAliasedInput(int32_t output) noexcept override { return kFirstY + output; }
#endif

  // --- running
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const* out,
                        int32_t outputs) noexcept override {
    int32_t const refused = check(in, inputs, out, outputs);
    return refused ? refused : guard(name_, 1, [&] {
      kernels_->device_plan();  // allocates here, so that enqueue can be captured
      return 0;
    });
  }
  int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guard(name_, 1, [&] {
      run(*kernels_, in, out, inputs, outputs, workspace, stream);
      return 0;
    });
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    return guard(name_, static_cast<nvinfer1::PluginFieldCollection const*>(nullptr), [&] {
      fields_ = saved_fields(kernels_->shape());
      collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
      return static_cast<nvinfer1::PluginFieldCollection const*>(&collection_);
    });
  }

 private:
  template <typename Desc>
  int32_t check(Desc const* in, int32_t inputs, Desc const* out, int32_t outputs) noexcept {
    return guard(name_, 1, [&] {
      check_tensors(kernels_->shape(), in, inputs, out, outputs);
      return 0;
    });
  }

  std::string name_;
  std::string id_;
  std::shared_ptr<Kernels> kernels_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  char const* getPluginName() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
  nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    return guard(name ? name : "", static_cast<Plugin*>(nullptr), [&] {
      return new Plugin(name, read_fields(fields, phase == nvinfer1::TensorRTPhase::kRUNTIME));
    });
  }

 private:
  nvinfer1::PluginFieldCollection fields_{static_cast<int32_t>(attribute_fields().size()), attribute_fields().data()};
};

}  // namespace

CreatorInterface& creator() {
  static Creator instance;
  return instance;
}

}  // namespace sdct::tensorrt

#endif  // NV_TENSORRT_MAJOR >= 10
