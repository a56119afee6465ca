// Sums of two packed 16-bit elements, each rounded once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace convfirst::winograd::sm90 {

template <class Element>
using PairOf = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;

template <class Element>
__device__ __forceinline__ PairOf<Element> pair_of(uint32_t bits) {
  return *reinterpret_cast<const PairOf<Element>*>(&bits);
}

template <class Pair>
__device__ __forceinline__ uint32_t pair_bits(Pair pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class Element>
__device__ __forceinline__ uint32_t pair_add(uint32_t a, uint32_t b) {
  return pair_bits(__hadd2(pair_of<Element>(a), pair_of<Element>(b)));
}

template <class Element>
__device__ __forceinline__ uint32_t pair_subtract(uint32_t a, uint32_t b) {
  return pair_bits(__hsub2(pair_of<Element>(a), pair_of<Element>(b)));
}

// a b + c; with b = 1 or -1 a sum whose sign is known at run time.
template <class Element>
__device__ __forceinline__ uint32_t pair_fma(uint32_t a, uint32_t b, uint32_t c) {
  return pair_bits(__hfma2(pair_of<Element>(a), pair_of<Element>(b), pair_of<Element>(c)));
}

}  // namespace convfirst::winograd::sm90
