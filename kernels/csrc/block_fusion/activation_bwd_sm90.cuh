// Activations and their slopes in float32. Biases come scaled by `bias_scale` (halved for SiLU).
#pragma once

#include "activation_sm90.cuh"

namespace convfirst::block_fusion::sm90 {

__device__ __forceinline__ float exp2_float(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// h = act(s + bias), d = act'(s + bias); what the caller does not use costs nothing.
template <Activation kActivation>
__device__ __forceinline__ void activate_with_slope(float s, float bias, float& h, float& d) {
  if constexpr (kActivation == Activation::kRelu) {
    const float v = s + bias;
    h = fmaxf(v, 0.f), d = v > 0.f ? 1.f : 0.f;
  } else if constexpr (kActivation == Activation::kSilu) {
    const float half = fmaf(s, 0.5f, bias), t = tanh_float(half);
    h = fmaf(half, t, half);                                   // v sigmoid(v)
    d = fmaf(h, fmaf(t, -0.5f, 0.5f), fmaf(t, 0.5f, 0.5f));    // sigmoid(v) + h (1 - sigmoid(v))
  } else {
    const float v = s + bias, square = v * v, clamped = fminf(square, kGeluLimit);
    const float inner = v * fmaf(clamped, fmaf(clamped, kGeluC, kGeluB), kGeluA);
    const float phi = fmaf(tanh_float(inner), 0.5f, 0.5f);     // of the normal distribution
    h = v * phi;
    d = fmaf(v * 0.398942280f, exp2_float(square * -0.721347520f), phi);
  }
}

}  // namespace convfirst::block_fusion::sm90
