// Two channels' activation in two parts: the tanh between them is under way while the warp does other things.
#pragma once

#include "../common/activation.cuh"
#include "../common/activation_half2.cuh"
#include "params.h"

namespace convfirst::block_fusion::sm80 {

// In float32. begin() takes the sums, or half of them once rounded (halves), as PyTorch rounds a linear layer's result.
template <Activation kActivation>
struct FloatWord {
  static constexpr bool kGelu = kActivation == Activation::kGelu;
  float low, high, tanh_low, tanh_high;

  template <typename T>
  __device__ __forceinline__ static uint32_t halves(float low, float high) {
    return ptx::pack2<T>(0.5f * low, 0.5f * high);
  }

  template <typename T>
  __device__ __forceinline__ void begin(uint32_t v) {
    const float2 half = ptx::unpack2<T>(v);
    low = half.x, high = half.y;
    tanh_low = ptx::tanh_approx(kGelu ? detail::half_logit(2.f * low) : low);
    tanh_high = ptx::tanh_approx(kGelu ? detail::half_logit(2.f * high) : high);
  }

  template <typename T>
  __device__ __forceinline__ void begin(float sum_low, float sum_high) {
    low = 0.5f * sum_low, high = 0.5f * sum_high;
    tanh_low = ptx::tanh_approx(kGelu ? detail::half_logit(sum_low) : low);
    tanh_high = ptx::tanh_approx(kGelu ? detail::half_logit(sum_high) : high);
  }

  template <typename T>
  __device__ __forceinline__ uint32_t value() const {
    return ptx::pack2<T>(fmaf(low, tanh_low, low), fmaf(high, tanh_high, high));
  }
};

// The same in float16, rounded first.
template <Activation kActivation>
struct HalfWord {
  uint32_t half, tanh;

  template <typename T>
  __device__ __forceinline__ static uint32_t halves(float low, float high) {
    return half2::multiply(ptx::pack2<T>(low, high), half2::both(0.5f));
  }

  template <typename T>
  __device__ __forceinline__ void begin(uint32_t v) {
    half = v;
    tanh = kActivation == Activation::kGelu ? half2::gelu_tanh(v) : half2::tanh_approx(v);
  }

  template <typename T>
  __device__ __forceinline__ void begin(float low, float high) {
    begin<T>(halves<T>(low, high));
  }

  template <typename T>
  __device__ __forceinline__ uint32_t value() const {
    return half2::fma(half, tanh, half);
  }
};

// ReLU, of sums alone.
struct ReluWord {
  float low, high;

  template <typename T>
  __device__ __forceinline__ void begin(float sum_low, float sum_high) {
    low = sum_low, high = sum_high;
  }

  template <typename T>
  __device__ __forceinline__ uint32_t value() const {
    return ptx::pack2<T>(relu(low), relu(high));
  }
};

}  // namespace convfirst::block_fusion::sm80
