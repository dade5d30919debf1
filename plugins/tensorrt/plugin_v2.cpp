// TensorRT 8.5 to 9: IPluginV2DynamicExt.
#include <NvInfer.h>

#if NV_TENSORRT_MAJOR < 10

#include <cstring>
#include <memory>
#include <string>

#include "library.h"
#include "node.h"

namespace sdct::tensorrt {
namespace {

class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  Plugin(char const* name, Shape const& shape) : name_(name ? name : ""), kernels_(std::make_shared<Kernels>(shape)) {}
  Plugin(Plugin const&) = default;  // clones share the kernels

  // --- identity and life
  char const* getPluginType() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  void setPluginNamespace(char const* value) noexcept override {
    guard(name_, 0, [&] {
      namespace_ = value ? value : "";
      return 0;
    });
  }
  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    return guard(name_, static_cast<Plugin*>(nullptr), [&] { return new Plugin(*this); });
  }
  void destroy() noexcept override { delete this; }
  int32_t initialize() noexcept override {
    return guard(name_, 1, [&] {
      kernels_->device_plan();
      return 0;
    });
  }
  void terminate() noexcept override {}  // the tables go with the last clone

  // --- serialisation
  size_t getSerializationSize() const noexcept override {
    return guard(name_, size_t{0}, [&] { return write_bytes(kernels_->shape()).size(); });
  }
  void serialize(void* buffer) const noexcept override {
    guard(name_, 0, [&] {
      auto const bytes = write_bytes(kernels_->shape());
      std::memcpy(buffer, bytes.data(), bytes.size());
      return 0;
    });
  }

  // --- building
  int32_t getNbOutputs() const noexcept override { return kernels_->shape().projections; }
  nvinfer1::DataType getOutputDataType(int32_t index, nvinfer1::DataType const* inputs, int32_t) const noexcept override {
    return inputs[kFirstY + index];
  }
  nvinfer1::DimsExprs getOutputDimensions(int32_t index, nvinfer1::DimsExprs const* in, int32_t inputs,
                                          nvinfer1::IExprBuilder&) noexcept override {
    nvinfer1::DimsExprs failure{};
    failure.nbDims = -1;
    return guard(name_, failure, [&] {
      std::vector<Extents> found;
      for (int32_t i = 0; i < inputs; ++i) {
        found.push_back(extents(in[i]));
      }
      check_extents(kernels_->shape(), found, {});
      return in[kFirstY + index];
    });
  }
  bool supportsFormatCombination(int32_t pos, nvinfer1::PluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return supports(kernels_->shape(), pos, tensors[pos], tensors[kX], inputs, outputs);
  }
  // The interface has no way to say no here: the reason is logged, and enqueue refuses the same tensors again.
  void configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                       nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override {
    guard(name_, 0, [&] {
      check_tensors(kernels_->shape(), in, inputs, out, outputs);
      return 0;
    });
  }
  size_t getWorkspaceSize(nvinfer1::PluginTensorDesc const* in, int32_t, nvinfer1::PluginTensorDesc const*,
                          int32_t) const noexcept override {
    return guard(name_, size_t{0}, [&] { return workspace_bytes(*kernels_, extents(in[kX].dims)); });
  }

  // --- running
  int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guard(name_, 1, [&] {
      run(*kernels_, in, out, inputs, outputs, workspace, stream);
      return 0;
    });
  }

 private:
  std::string name_;
  std::string namespace_ = kPluginNamespace;
  std::shared_ptr<Kernels> kernels_;
};

class Creator final : public nvinfer1::IPluginCreator {
 public:
  char const* getPluginName() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  void setPluginNamespace(char const* value) noexcept override {
    guard("creator", 0, [&] {
      namespace_ = value ? value : "";
      return 0;
    });
  }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
  nvinfer1::IPluginV2DynamicExt* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields) noexcept override {
    return make(name, [&] { return read_fields(fields, false); });
  }
  nvinfer1::IPluginV2DynamicExt* deserializePlugin(char const* name, void const* data, size_t size) noexcept override {
    return make(name, [&] { return read_bytes(data, size); });
  }

 private:
  template <typename Read>
  Plugin* make(char const* name, Read read) noexcept {
    return guard(name ? name : "", static_cast<Plugin*>(nullptr), [&] {
      auto plugin = std::make_unique<Plugin>(name, read());
      plugin->setPluginNamespace(namespace_.c_str());
      return plugin.release();
    });
  }

  std::string namespace_ = kPluginNamespace;
  nvinfer1::PluginFieldCollection fields_{static_cast<int32_t>(attribute_fields().size()), attribute_fields().data()};
};

}  // namespace

CreatorInterface& creator() {
  static Creator instance;
  return instance;
}

}  // namespace sdct::tensorrt

#endif  // NV_TENSORRT_MAJOR < 10
