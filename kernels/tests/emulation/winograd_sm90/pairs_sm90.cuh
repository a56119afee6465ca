// Stands in for csrc/winograd/pairs_sm90.cuh.
#pragma once

#include "common/ptx.cuh"

namespace convfirst::winograd::sm90 {

template <class Element>
uint32_t pair_fma(uint32_t a, uint32_t b, uint32_t c) {
  const float2 x = ptx::unpack2<Element>(a), y = ptx::unpack2<Element>(b), z = ptx::unpack2<Element>(c);
  return ptx::pack2<Element>(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
template <class Element>
uint32_t pair_add(uint32_t a, uint32_t b) {
  return pair_fma<Element>(a, ptx::pack2<Element>(1.f, 1.f), b);
}
template <class Element>
uint32_t pair_subtract(uint32_t a, uint32_t b) {
  return pair_fma<Element>(b, ptx::pack2<Element>(-1.f, -1.f), a);
}

}  // namespace convfirst::winograd::sm90
