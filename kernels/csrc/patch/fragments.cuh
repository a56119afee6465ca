// What the four threads of a quad, which share a row of an accumulator, do with their channels of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace convfirst::patch::sm80 {

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// `kWords` words in a row, 2 or 4, at once.
template <int kWords>
__device__ __forceinline__ void store_words(void* to, const uint32_t* words) {
  if constexpr (kWords == 4) {
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    static_assert(kWords == 2);
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  }
}

// `kCount` floats in a row, 4 or 8, in 16-byte loads.
template <int kCount>
__device__ __forceinline__ void load_floats(float (&to)[kCount], const float* from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
  }
}

}  // namespace convfirst::patch::sm80
