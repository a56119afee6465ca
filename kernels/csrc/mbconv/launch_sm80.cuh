// Definitions of launch_sm80.h; an instantiation file includes this and instantiates the struct for one width.
#pragma once

#include <type_traits>

#include "../common/launch.cuh"
#include "launch_sm80.h"
#include "mbconv_block_fwd_sm80_mma.cuh"

namespace convfirst::mbconv::sm80 {

template <DType kType>
using Element = std::conditional_t<kType == DType::kHalf, __half, __nv_bfloat16>;

template <DType kType, int kWidth, int kPixels, bool kDepthwise>
const void* Fused<kType, kWidth, kPixels, kDepthwise>::kernel() {
  return reinterpret_cast<const void*>(&mbconv_block_fwd_sm80<Element<kType>, kWidth, kPixels, kDepthwise>);
}

template <DType kType, int kWidth, int kPixels, bool kDepthwise>
int Fused<kType, kWidth, kPixels, kDepthwise>::launch(const BlockParams& p, int grid, int shared_memory, cudaStream_t stream) {
  return start_kernel(mbconv_block_fwd_sm80<Element<kType>, kWidth, kPixels, kDepthwise>, grid, tile(kWidth, kPixels, kDepthwise).threads(),
                      shared_memory, stream, p);
}

}  // namespace convfirst::mbconv::sm80
