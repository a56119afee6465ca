// Definitions of launch_sm80.h; an instantiation file includes this and instantiates one struct of each type it is for.
#pragma once

#include <type_traits>

#include "../common/launch.cuh"
#include "conv_first_block_fwd_sm80_mma.cuh"
#include "conv_norm_fwd_sm80.cuh"
#include "launch_sm80.h"
#include "linear_fwd_sm80_mma.cuh"
#include "linear_persistent_fwd_sm80_mma.cuh"

namespace convfirst::block_fusion::sm80 {

namespace detail {

template <DType kType>
struct Element {
  using type = __half;
};
template <>
struct Element<DType::kBFloat16> {
  using type = __nv_bfloat16;
};

}  // namespace detail

template <DType kType, int kWidth, bool kDepthwise>
const void* Fused<kType, kWidth, kDepthwise>::kernel() {
  return reinterpret_cast<const void*>(&conv_first_block_fwd_sm80<typename detail::Element<kType>::type, kWidth, kDepthwise>);
}

template <DType kType, int kWidth, bool kDepthwise>
int Fused<kType, kWidth, kDepthwise>::launch(const BlockParams& p, int grid, int shared_memory, cudaStream_t stream) {
  return start_kernel(conv_first_block_fwd_sm80<typename detail::Element<kType>::type, kWidth, kDepthwise>, grid,
                       fused_tile(kWidth, kDepthwise).threads(), shared_memory, stream, p);
}

template <DType kType, bool kDepthwise>
const void* ConvNorm<kType, kDepthwise>::kernel() {
  return reinterpret_cast<const void*>(&conv_norm_fwd_sm80<typename detail::Element<kType>::type, kDepthwise>);
}

template <DType kType, bool kDepthwise>
int ConvNorm<kType, kDepthwise>::launch(const BlockParams& p, void* output, int grid, int shared_memory, cudaStream_t stream) {
  using T = typename detail::Element<kType>::type;
  return start_kernel(conv_norm_fwd_sm80<T, kDepthwise>, grid, conv_tile(kDepthwise).threads, shared_memory, stream, p,
                       static_cast<T*>(output));
}

template <DType kType, int kTile, bool kProject>
int Linear<kType, kTile, kProject>::launch(const LinearParams& p, cudaStream_t stream) {
  constexpr LinearTile tile = linear_tile(kTile);
  const int grid = (p.rows + tile.m - 1) / tile.m * ((p.columns + tile.n - 1) / tile.n);
  return start_kernel(linear_fwd_sm80<typename detail::Element<kType>::type, kTile, kProject>, grid, tile.threads(),
                       tile.shared_bytes(), stream, p);
}

template <DType kType, int kTile, bool kProject>
int PersistentLinear<kType, kTile, kProject>::launch(const LinearParams& p, cudaStream_t stream) {
  constexpr PersistentTile tile = persistent_tile(kTile);
  constexpr bool kDefers = tile.defers();
  using T = typename detail::Element<kType>::type;
  const auto start = [&](auto word, auto stays) {
    return start_kernel(linear_persistent_fwd_sm80<T, kTile, kProject, decltype(word), decltype(stays)::value>, p.grid, tile.threads(),
                        tile.shared_bytes(kProject), stream, p);
  };
  if constexpr (!kProject && tile.overlaps()) {
    const auto words = [&](auto word) {
      if constexpr (kDefers) {
        const bool stays = (p.depth + tile.depth - 1) / tile.depth == tile.stages && p.grid % ((p.columns + tile.n - 1) / tile.n) == 0;
        if (stays) return start(word, std::true_type{});
      }
      return start(word, std::false_type{});
    };
    constexpr bool kHalf = kType == DType::kHalf;
    using Silu = std::conditional_t<kHalf, HalfWord<Activation::kSilu>, FloatWord<Activation::kSilu>>;
    using Gelu = std::conditional_t<kHalf, HalfWord<Activation::kGelu>, FloatWord<Activation::kGelu>>;
    if (p.activation == static_cast<int>(Activation::kSilu)) return words(Silu{});
    if constexpr (kHalf || kDefers) {
      if (p.activation == static_cast<int>(Activation::kGelu)) return words(Gelu{});
    }
  }
  return start(NoWord{}, std::false_type{});
}

}  // namespace convfirst::block_fusion::sm80
