// The hidden layer's activations on fp32 registers, two elements at a time.
//
// silu(x) = x s(x) and gelu(x) = x s(x p(x^2)) share one sigmoid s(z) = 1 / (1 + 2^(-z log2 e)). Two sigmoids share one
// reciprocal, 1/a = b / (ab), so an element costs 1.5 special-function operations. p is a minimax fit of the logit of the
// normal distribution: |gelu - x Phi(x)| < 3.1e-6 everywhere, below the fp16 quantum of every result above 0.004.
#pragma once

#include "ptx.cuh"

namespace convfirst {

namespace detail {

// Multiplies x and y by the sigmoids whose exponents (to base 2, negated) are u and v.
__device__ __forceinline__ void gate_pair(float& x, float& y, float u, float v) {
  const float a = 1.f + ptx::exp2_approx(fminf(u, 60.f));
  const float b = 1.f + ptx::exp2_approx(fminf(v, 60.f));
  const float r = ptx::reciprocal_approx(a * b);
  x *= r * b;
  y *= r * a;
}

__device__ __forceinline__ float gelu_exponent(float x) {
  constexpr float kLog2e = 1.4426950408889634f;
  const float u = fminf(x * x, 25.f);
  float p = -2.23820178e-06f * kLog2e;
  p = fmaf(p, u, 6.11626275e-05f * kLog2e);
  p = fmaf(p, u, 2.49720385e-04f * kLog2e);
  p = fmaf(p, u, -7.29375780e-02f * kLog2e);
  p = fmaf(p, u, -1.59565627e+00f * kLog2e);
  return x * p;
}

}  // namespace detail

__device__ __forceinline__ void relu_pair(float& x, float& y) {
  x = x < 0.f ? 0.f : x;  // keeps a NaN
  y = y < 0.f ? 0.f : y;
}

__device__ __forceinline__ void silu_pair(float& x, float& y) {
  constexpr float kLog2e = 1.4426950408889634f;
  detail::gate_pair(x, y, -kLog2e * x, -kLog2e * y);
}

__device__ __forceinline__ void gelu_pair(float& x, float& y) {
  detail::gate_pair(x, y, detail::gelu_exponent(x), detail::gelu_exponent(y));
}

}  // namespace convfirst
