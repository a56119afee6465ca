// Arithmetic on two packed halves, `low` in bits 0-15, for sm_80 and newer.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace convfirst::half2 {

namespace detail {

__device__ __forceinline__ __half2 pair(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ __forceinline__ uint32_t bits(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

}  // namespace detail

__device__ __forceinline__ uint32_t both(float value) { return detail::bits(__float2half2_rn(value)); }
__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) { return detail::bits(__hmul2(detail::pair(a), detail::pair(b))); }
__device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) { return detail::bits(__hmin2(detail::pair(a), detail::pair(b))); }

// a b + c, rounded once.
__device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
  return detail::bits(__hfma2(detail::pair(a), detail::pair(b), detail::pair(c)));
}

__device__ __forceinline__ uint32_t tanh_approx(uint32_t a) {
  uint32_t y;
  asm("tanh.approx.f16x2 %0, %1;" : "=r"(y) : "r"(a));
  return y;
}

}  // namespace convfirst::half2
