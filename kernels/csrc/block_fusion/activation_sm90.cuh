// Activations of two neighbouring hidden units, on packed 16-bit numbers or in float32. Biases come scaled by `bias_scale` (halved for SiLU).
#pragma once

#include "../common/sm90.cuh"
#include "tile_sm90.h"

namespace convfirst::block_fusion::sm90 {

using namespace convfirst::sm90;

template <class Traits>
using ElementOf = std::conditional_t<Traits::kDType == DType::kHalf, __half, __nv_bfloat16>;

__device__ __forceinline__ __half2 tanh_half2(__half2 v) {
  uint32_t r, u = *reinterpret_cast<uint32_t*>(&v);
  asm("tanh.approx.f16x2 %0, %1;" : "=r"(r) : "r"(u));
  return *reinterpret_cast<__half2*>(&r);
}

__device__ __forceinline__ __nv_bfloat162 tanh_bfloat162(__nv_bfloat162 v) {
  uint32_t r, u = *reinterpret_cast<uint32_t*>(&v);
  asm("tanh.approx.bf16x2 %0, %1;" : "=r"(r) : "r"(u));
  return *reinterpret_cast<__nv_bfloat162*>(&r);
}

__device__ __forceinline__ float tanh_float(float v) {
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// gelu(v) = v Phi(v), Phi(v) = (1 + tanh(v (a + s (b + c s)))) / 2 with s = min(v^2, 16): minimax fit to the exact (erf) GELU,
// |error| < 2.6e-5 against 4.7e-4 of the usual two-term form.
constexpr float kGeluA = 0.797507608f, kGeluB = 0.0370058970f, kGeluC = -0.000351557558f, kGeluLimit = 16.f;

template <Activation kActivation>
__device__ __forceinline__ float bias_scale() {
  return kActivation == Activation::kSilu ? 0.5f : 1.f;
}

// tanh(|u|) without the special-function unit: a polynomial in min(|u| / 4, 1) - 1/2, fitted to tanh on [0, 4] under the condition
// that it is exactly 1 from 4 on; in half precision its largest error is 1.2e-3.
__device__ __forceinline__ __half2 tanh_magnitude_half2(__half2 u) {
  constexpr float kTerms[] = {0.963867188f, 0.281982422f, -1.04589844f, 2.72070312f, -5.85546875f, 4.88671875f, 10.453125f, -17.09375f};
  const __half2 z = __hsub2(__hmul2_sat(__habs2(u), __float2half2_rn(0.25f)), __float2half2_rn(0.5f));
  __half2 t = __float2half2_rn(kTerms[7]);
#pragma unroll
  for (int i = 6; i >= 0; --i) t = __hfma2(t, z, __float2half2_rn(kTerms[i]));
  return t;
}

// silu(v) = u + |u| tanh(|u|), u = v / 2.
__device__ __forceinline__ uint32_t silu_half_polynomial(float s0, float s1, uint32_t bias_bits) {
  const __half2 bias = *reinterpret_cast<__half2*>(&bias_bits);
  const __half2 u = __hfma2(__floats2half2_rn(s0, s1), __float2half2_rn(0.5f), bias);
  const __half2 h = __hfma2(__habs2(u), tanh_magnitude_half2(u), u);
  return *reinterpret_cast<const uint32_t*>(&h);
}

template <Activation kActivation>
__device__ __forceinline__ uint32_t activate_half(float s0, float s1, uint32_t bias_bits) {
  __half2 v = __floats2half2_rn(s0, s1);
  const __half2 bias = *reinterpret_cast<__half2*>(&bias_bits);
  __half2 h;
  if constexpr (kActivation == Activation::kRelu) {
    h = __hmax2(__hadd2(v, bias), __float2half2_rn(0.f));
  } else if constexpr (kActivation == Activation::kSilu) {
    v = __hfma2(v, __float2half2_rn(0.5f), bias);
    h = __hfma2(v, tanh_half2(v), v);
  } else {
    v = __hadd2(v, bias);
    const __half2 square = __hmin2(__hmul2(v, v), __float2half2_rn(kGeluLimit));
    const __half2 slope = __hfma2(square, __float2half2_rn(kGeluC), __float2half2_rn(kGeluB));
    const __half2 inner = __hmul2(v, __hfma2(square, slope, __float2half2_rn(kGeluA)));
    v = __hmul2(v, __float2half2_rn(0.5f));
    h = __hfma2(v, tanh_half2(inner), v);
  }
  return *reinterpret_cast<uint32_t*>(&h);
}

// SiLU alone: its argument is rounded to 8 bits as PyTorch's is, but a polynomial's steps would each lose as much again.
__device__ __forceinline__ uint32_t silu_bfloat16(float s0, float s1, uint32_t bias_bits) {
  const __nv_bfloat162 bias = *reinterpret_cast<__nv_bfloat162*>(&bias_bits);
  const __nv_bfloat162 v = __hfma2(__floats2bfloat162_rn(s0, s1), __float2bfloat162_rn(0.5f), bias);
  const __nv_bfloat162 h = __hfma2(v, tanh_bfloat162(v), v);
  return *reinterpret_cast<const uint32_t*>(&h);
}

template <Activation kActivation>
__device__ __forceinline__ float activate_float(float v, float bias) {
  if constexpr (kActivation == Activation::kRelu) {
    return fmaxf(v + bias, 0.f);
  } else if constexpr (kActivation == Activation::kSilu) {
    v = fmaf(v, 0.5f, bias);
    return fmaf(v, tanh_float(v), v);
  } else {
    v += bias;
    const float square = fminf(v * v, kGeluLimit);
    const float inner = v * fmaf(square, fmaf(square, kGeluC, kGeluB), kGeluA);
    v *= 0.5f;
    return fmaf(v, tanh_float(inner), v);
  }
}

}  // namespace convfirst::block_fusion::sm90
