// The hidden layer's activations on packed halves.
#pragma once

#include "half2.cuh"

namespace convfirst::half2 {

// gelu(v) = v (1 + tanh(v (a + s (b + c s)))) / 2 with s = min(v^2, 16): minimax fit to the exact (erf) GELU, |error| < 2.6e-5. Half of
// the instructions of float32; v is rounded to float16 first, as PyTorch rounds a linear layer's result.
__device__ __forceinline__ uint32_t gelu_tanh(uint32_t v) {
  const uint32_t square = smaller(multiply(v, v), both(16.f));
  const uint32_t slope = fma(square, both(-0.000351557558f), both(0.0370058970f));
  return tanh_approx(multiply(v, fma(square, slope, both(0.797507608f))));
}

__device__ __forceinline__ uint32_t gelu(uint32_t v) {
  const uint32_t tanh = gelu_tanh(v);
  v = multiply(v, both(0.5f));
  return fma(v, tanh, v);
}

}  // namespace convfirst::half2
