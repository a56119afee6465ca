// Host face of the portable MBConv kernel: what an instantiation file defines and variants_sm80.cpp calls. No CUDA types.
#pragma once

#include "tile_sm80.h"

namespace convfirst::mbconv::sm80 {

template <DType kType, int kWidth, int kPixels, bool kDepthwise>
struct Fused {
  static const void* kernel();
  static int launch(const BlockParams&, int grid, int shared_memory, cudaStream_t);  // cudaError_t
};

}  // namespace convfirst::mbconv::sm80
