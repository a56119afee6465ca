// Stands in for csrc/common/half2.cuh.
#pragma once

#include "ptx.cuh"

namespace convfirst::half2 {

template <typename Function>
uint32_t each(uint32_t a, uint32_t b, uint32_t c, Function function) {
  const float2 x = ptx::unpack2<__half>(a), y = ptx::unpack2<__half>(b), z = ptx::unpack2<__half>(c);
  return ptx::pack2<__half>(function(x.x, y.x, z.x), function(x.y, y.y, z.y));
}

inline uint32_t both(float value) { return ptx::pack2<__half>(value, value); }
inline uint32_t multiply(uint32_t a, uint32_t b) {
  return each(a, b, 0u, [](float x, float y, float) { return x * y; });
}
inline uint32_t smaller(uint32_t a, uint32_t b) {
  return each(a, b, 0u, [](float x, float y, float) { return x < y ? x : y; });
}
inline uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
  return each(a, b, c, [](float x, float y, float z) { return std::fma(x, y, z); });
}
inline uint32_t tanh_approx(uint32_t a) {
  return each(a, 0u, 0u, [](float x, float, float) { return std::tanh(x); });
}

}  // namespace convfirst::half2
