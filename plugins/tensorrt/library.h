// The one creator of this library, of the interface its TensorRT version uses.
#ifndef SDCT_TENSORRT_LIBRARY_H_
#define SDCT_TENSORRT_LIBRARY_H_

#include <NvInfer.h>

namespace sdct::tensorrt {

#if NV_TENSORRT_MAJOR >= 10
using CreatorInterface = nvinfer1::IPluginCreatorInterface;
#else
using CreatorInterface = nvinfer1::IPluginCreator;
#endif

CreatorInterface& creator();

}  // namespace sdct::tensorrt

#endif  // SDCT_TENSORRT_LIBRARY_H_
