// Activations and their slopes in float32. Biases come scaled by `bias_scale` (halved for SiLU).
#pragma once

#include "activation_sm90.cuh"

namespace convfirst::block_fusion::sm90 {

__device__ __forceinline__ float exp2_float(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// h = act(v) and slope = 2 act'(v) - 1 with v = s + bias; 2 act'(v) D = slope * D + D is one instruction. What the caller does not use
// costs nothing. GELU's second special-function operation is faster than the slope of its fit,
// four multiply-adds (NOTES.md).
template <Activation kActivation>
__device__ __forceinline__ void activate_with_slope(float s, float bias, float& h, float& slope) {
  if constexpr (kActivation == Activation::kRelu) {
    const float v = s + bias;
    h = fmaxf(v, 0.f), slope = v > 0.f ? 1.f : -1.f;
  } else if constexpr (kActivation == Activation::kSilu) {
    const float z = fmaf(s, 0.5f, bias), t = tanh_float(z);
    h = fmaf(z, t, z);
    slope = fmaf(-h, t, h) + t;  // v z' (1 - t^2) = z (1 + t) (1 - t)
  } else {
    const float v = s + bias, square = v * v, u = fminf(square, kGeluLimit);
    const float t = tanh_float(v * fmaf(u, fmaf(u, kGeluC, kGeluB), kGeluA));
    h = v * fmaf(t, 0.5f, 0.5f);
    slope = fmaf(v * 0.797884561f, exp2_float(square * -0.721347520f), t);  // v times the normal density, twice
  }
}

}  // namespace convfirst::block_fusion::sm90
