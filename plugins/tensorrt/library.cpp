// How TensorRT finds the plugin: registration at load, and the entry points of IPluginRegistry::loadLibrary.
//
// dlopen alone (ctypes, trtexec --staticPlugins, ONNX Runtime's extra_plugin_lib_paths) must make the plugin known, so the library
// registers itself as it is loaded, like REGISTER_TENSORRT_PLUGIN. loadLibrary (trtexec --dynamicPlugins, engines that carry the
// library) loads it the same way, then asks getCreators and fails where one of them is known already, among them the one just
// registered. So getCreators first takes the plugin out of the global registry. Whoever relies on it there calls
// sdct_tensorrt_register, which puts it back. The library is linked with -z nodelete: what is registered stays valid.
//
// Nothing links against TensorRT: the library uses the one that is loaded, full or lean.
#include "library.h"

#include <dlfcn.h>

#include <atomic>
#include <string>

#include "node.h"

#define SDCT_EXPORT extern "C" __attribute__((visibility("default")))

#if NV_TENSORRT_MAJOR > 8 || (NV_TENSORRT_MAJOR == 8 && NV_TENSORRT_MINOR >= 6)
#define SDCT_LOAD_LIBRARY 1  // IPluginRegistry::loadLibrary exists
#endif

namespace sdct::tensorrt {
namespace {

// A C function of the TensorRT this process has loaded, or null. dlsym over the whole process comes last: the names are common.
template <typename Function>
Function* host_function(char const* name) {
  for (char const* library : {"libnvinfer.so.", "libnvinfer_lean.so."}) {
    std::string const file = library + std::to_string(NV_TENSORRT_MAJOR);
    if (void* handle = dlopen(file.c_str(), RTLD_NOLOAD | RTLD_LAZY)) {
      void* symbol = dlsym(handle, name);
      dlclose(handle);
      if (symbol) {
        return reinterpret_cast<Function*>(symbol);
      }
    }
  }
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

#ifdef SDCT_LOAD_LIBRARY
std::atomic<nvinfer1::ILoggerFinder*> g_logger_finder{nullptr};
#endif

nvinfer1::IPluginRegistry* host_registry() noexcept {
  static auto* const find = host_function<nvinfer1::IPluginRegistry*() noexcept>("getPluginRegistry");
  return find ? find() : nullptr;
}

CreatorInterface* registered(nvinfer1::IPluginRegistry& registry) noexcept {
#if NV_TENSORRT_MAJOR >= 10
  return registry.getCreator(kPluginName, kPluginVersion, kPluginNamespace);
#else
  return registry.getPluginCreator(kPluginName, kPluginVersion, kPluginNamespace);
#endif
}

// Makes the plugin known to the global registry; true where it then is, through this or another copy of the library.
bool register_globally() noexcept {
  return guard("registration", false, [] {
    nvinfer1::IPluginRegistry* const registry = host_registry();
    return registry && (registered(*registry) || registry->registerCreator(creator(), kPluginNamespace));
  });
}

[[maybe_unused]] bool const g_registered_at_load = register_globally();

}  // namespace

nvinfer1::ILogger* host_logger() noexcept {
#ifdef SDCT_LOAD_LIBRARY
  if (nvinfer1::ILoggerFinder* finder = g_logger_finder.load()) {
    if (nvinfer1::ILogger* logger = finder->findLogger()) {
      return logger;
    }
  }
#endif
  static auto* const find = host_function<nvinfer1::ILogger*() noexcept>("getLogger");
  return find ? find() : nullptr;
}

}  // namespace sdct::tensorrt

#ifdef SDCT_LOAD_LIBRARY
SDCT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { sdct::tensorrt::g_logger_finder = finder; }
#endif

#if NV_TENSORRT_MAJOR >= 10
SDCT_EXPORT sdct::tensorrt::CreatorInterface* const* getCreators(int32_t& count) {
#else
SDCT_EXPORT sdct::tensorrt::CreatorInterface* const* getPluginCreators(int32_t& count) {
#endif
  using namespace sdct::tensorrt;
  if (nvinfer1::IPluginRegistry* const registry = host_registry()) {
    if (CreatorInterface* const known = registered(*registry)) {
      registry->deregisterCreator(*known);
    }
  }
  static CreatorInterface* const creators[] = {&creator()};
  count = 1;
  return creators;
}

// Makes the plugin known to the global registry; 1 where it then is, else 0.
SDCT_EXPORT int32_t sdct_tensorrt_register() { return sdct::tensorrt::register_globally() ? 1 : 0; }

// The TensorRT version this library was compiled against, e.g. 101600.
SDCT_EXPORT int32_t sdct_tensorrt_version() {
  return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
}
