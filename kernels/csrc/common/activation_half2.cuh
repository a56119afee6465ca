// The hidden layer's activations on packed halves.
#pragma once

#include "half2.cuh"

namespace convfirst::half2 {

// gelu(2 h) = h (1 + tanh(h (a + s (b + c s)))) with s = min(h^2, 4): minimax fit to the exact (erf) GELU, |error| < 2.6e-5. Half of the
// instructions of float32; h is rounded to float16 first, as PyTorch rounds a linear layer's result.
__device__ __forceinline__ uint32_t gelu_tanh(uint32_t h) {
  const uint32_t square = smaller(multiply(h, h), both(4.f));
  const uint32_t slope = fma(square, both(-0.0112498418f), both(0.296047176f));
  return tanh_approx(multiply(h, fma(square, slope, both(1.59501522f))));
}

__device__ __forceinline__ uint32_t gelu(uint32_t v) {
  const uint32_t h = multiply(v, both(0.5f));
  return fma(h, gelu_tanh(h), h);
}

}  // namespace convfirst::half2
