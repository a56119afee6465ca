// The hidden layer's activations on fp32 registers.
//
// silu(x) = x s(x) and gelu(x) = x s(x p(x^2)) share one sigmoid, s(z) = (1 + tanh(z / 2)) / 2: one special-function operation an
// element. p is a minimax fit of the logit of the normal distribution, |x s(x p(x^2)) - x Phi(x)| < 3.1e-6 everywhere. The
// hardware's tanh is good to 2^-11 of its value, so an activation is off by at most |x| 2^-12, half of what rounding its result
// to fp16 costs near |x|, and a sixteenth of that for bf16.
#pragma once

#include "ptx.cuh"

namespace convfirst {

namespace detail {

// x (1 + tanh(half)) / 2
__device__ __forceinline__ float gate(float x, float half) {
  const float h = 0.5f * x;
  return fmaf(h, ptx::tanh_approx(half), h);
}

// Half the logit of Phi(x).
__device__ __forceinline__ float half_logit(float x) {
  const float u = fminf(x * x, 25.f);
  float p = 1.11910089e-06f;
  p = fmaf(p, u, -3.05813138e-05f);
  p = fmaf(p, u, -1.24860193e-04f);
  p = fmaf(p, u, 3.64687890e-02f);
  p = fmaf(p, u, 7.97828135e-01f);
  return x * p;
}

}  // namespace detail

__device__ __forceinline__ float relu(float x) { return x < 0.f ? 0.f : x; }  // keeps a NaN
__device__ __forceinline__ float silu(float x) { return detail::gate(x, 0.5f * x); }
__device__ __forceinline__ float gelu(float x) { return detail::gate(x, detail::half_logit(x)); }

}  // namespace convfirst
