// wgmma whose shared-memory operands may lie MN-major: rows along k, so that a tile serves one product by its rows and another by its columns.
#pragma once

#include "sm90.cuh"

namespace convfirst::sm90 {

using Major = cute::SM90::GMMA::Major;

// MN-major: panels of kRowBytes along M or N, `panel_bytes` apart; k runs down the rows, eight of them a swizzled group. A step of 16 along k
// adds kRowBytes (in the descriptor's units of 16 bytes).
template <int kRowBytes>
__device__ __forceinline__ uint64_t mn_descriptor(uint32_t address, uint32_t panel_bytes) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kLayout = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kGroup = (kRowBytes * 8) >> 4;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(panel_bytes >> 4) << 16) | (kGroup << 32) | (kLayout << 62);
}

template <class Element, int N, Major kA, Major kB>
struct MajorWgmma;

#define CONVFIRST_MAJOR_WGMMA(N)                                          \
  template <Major kA, Major kB>                                           \
  struct MajorWgmma<__half, N, kA, kB> {                                  \
    using RS = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_RS<kA, kB>;    \
    using SS = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<kA, kB>;    \
  };                                                                      \
  template <Major kA, Major kB>                                           \
  struct MajorWgmma<__nv_bfloat16, N, kA, kB> {                           \
    using RS = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<kA, kB>;  \
    using SS = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<kA, kB>;  \
  };
CONVFIRST_MAJOR_WGMMA(32)
CONVFIRST_MAJOR_WGMMA(64)
CONVFIRST_MAJOR_WGMMA(96)
CONVFIRST_MAJOR_WGMMA(128)
CONVFIRST_MAJOR_WGMMA(192)
CONVFIRST_MAJOR_WGMMA(256)
#undef CONVFIRST_MAJOR_WGMMA

template <class Wgmma, int M, size_t... I>
__device__ __forceinline__ void major_rs_unpacked(float (&d)[M], const uint32_t* a, uint64_t b, bool accumulate, std::index_sequence<I...>) {
  Wgmma::fma(a[0], a[1], a[2], a[3], b, d[I]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

template <class Wgmma, int M, size_t... I>
__device__ __forceinline__ void major_ss_unpacked(float (&d)[M], uint64_t a, uint64_t b, bool accumulate, std::index_sequence<I...>) {
  Wgmma::fma(a, b, d[I]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

// A from registers, B MN-major.
template <class Element, int N>
__device__ __forceinline__ void wgmma_rs_mn(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
  major_rs_unpacked<typename MajorWgmma<Element, N, Major::K, Major::MN>::RS>(d, a, b, accumulate, std::make_index_sequence<N / 2>{});
}

template <class Element, int N, Major kA, Major kB>
__device__ __forceinline__ void wgmma_ss_major(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  major_ss_unpacked<typename MajorWgmma<Element, N, kA, kB>::SS>(d, a, b, accumulate, std::make_index_sequence<N / 2>{});
}

}  // namespace convfirst::sm90
