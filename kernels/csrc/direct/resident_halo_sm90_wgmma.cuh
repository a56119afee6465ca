// Direct convolution with 3x3 filters of stride 1 on 64 channels on Hopper: filters in shared memory for good, each tile of x loaded once.
//
//   a tile of x: 10 rows of 16 pixels, 8 x 14 of them without the halo; the rows of A of a tap are 128 pixels of it one after another, as
//   halo_gemm_sm90_wgmma.cuh describes
//
//      tiles  0  1  2 | 3  4 ..     a producer thread loads one after another; each warpgroup computes every third one by
//             |  |  |   |           itself, so that one's stores go under the others' products
//           wg 0  1  2  0
//
//   im2col brings x nine times: at 64 channels and 224 x 224 pixels that takes longer than the products, 490 of 515 us at N = 64 (H200).
//
//   what                 where                              written by        released when
//   filters, nine taps   shared, swizzled, for good         producer (TMA)    -
//   tiles of x           shared, ring of slots, swizzled    producer (TMA)    products done, per warp
//   sums                 registers, 2 x kColumns / 2        wgmma             -
//   output               global, 16 bytes a thread          consumer          -
#pragma once

#include "implicit_gemm_sm90_wgmma.cuh"
#include "resident_halo_sm90.h"

namespace convfirst::direct::sm90 {

struct ResidentParams {
  void* y;
  const float* bias;
  int filters, groups, tiles, tiles_p, tiles_q;
  int out_h, out_w, pad_h, pad_w;
  int y_stride_n, y_stride_p, y_stride_q;
  Activation activation;
};

struct ResidentTile {
  int n, h, w;
  __device__ __forceinline__ ResidentTile(const ResidentParams& p, int index) {
    const int row = index / p.tiles_q;
    n = row / p.tiles_p;
    w = (index - row * p.tiles_q) * kResidentWidth, h = (row - n * p.tiles_p) * kResidentHeight;
  }
};

template <class Traits>
struct ResidentBarriers {
  TransactionBarrier *filters, *full;
  Barrier* empty;
  __device__ ResidentBarriers(char* base)
      : filters(reinterpret_cast<TransactionBarrier*>(base)), full(filters + kResidentTaps), empty(reinterpret_cast<Barrier*>(full + Traits::kSlots)) {}
};

template <class Traits>
struct ResidentConsumer {
  using Element = ElementOf<Traits>;
  using Sums = float[2][Traits::kColumns / 2];
  const ResidentParams& p;
  const ResidentBarriers<Traits>& bar;
  uint32_t filters, tiles;  // shared-memory addresses
  int warp, lane, column;

  __device__ __forceinline__ float activate(float v) const {
    if (p.activation == Activation::kNone) return v;
    if (p.activation == Activation::kRelu) return relu(v);
    return p.activation == Activation::kSilu ? silu(v) : gelu(v);
  }

  __device__ __forceinline__ void multiply(Sums& sums, int slot, bool first) const {
    const uint64_t tile = matrix_descriptor<128>(tiles + slot * kResidentTileBytes), weights = matrix_descriptor<128>(filters);
#pragma unroll 1
    for (int tap = 0; tap < kResidentTaps; ++tap) {
      if (first) bar.filters[tap].wait(0);
      const int r = tap / 3, s = tap - 3 * r;
      const uint64_t a = tile + (r * kResidentPitch + s) * (128 >> 4), w = weights + tap * (Traits::kTapBytes >> 4);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kResidentChannels / 16; ++k) {
#pragma unroll
        for (int band = 0; band < 2; ++band) wgmma_ss<Element, Traits::kColumns>(sums[band], a + band * (64 * 128 >> 4) + 2 * k, w + 2 * k, tap + k > 0);
      }
      cute::warpgroup_commit_batch();
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int band = 0; band < 2; ++band) fence_operands(sums[band]);
    if (lane == 0) bar.empty[slot].arrive();
  }

  // This thread has sums of 8 neighbouring filters of two pixels in each block of 32 columns.
  __device__ __forceinline__ void store(const Sums& sums, const ResidentTile& tile) const {
    int offset[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pixel = i / 2 * 64 + warp * 16 + lane / 4 + i % 2 * 8, h = tile.h + pixel / kResidentPitch, w = pixel % kResidentPitch;
      const bool exists = w < kResidentWidth && tile.w + w < p.out_w && h < p.out_h;
      offset[i / 2][i % 2] = exists ? tile.n * p.y_stride_n + h * p.y_stride_p + (tile.w + w) * p.y_stride_q : -1;
    }
#pragma unroll
    for (int block = 0; block < Traits::kBlocks; ++block) {
      const int filter = column + 32 * block + lane % 4 * 8;
      if (filter >= p.filters) continue;
      float bias[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) bias[i] = p.bias == nullptr ? 0.f : __ldg(p.bias + filter + i);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* s = sums[i / 2] + 16 * block + i % 2 * 2;
        uint32_t v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = pack2<Element>(activate(s[4 * j] + bias[2 * j]), activate(s[4 * j + 1] + bias[2 * j + 1]));
        if (offset[i / 2][i % 2] < 0) continue;
        *reinterpret_cast<uint4*>(static_cast<Element*>(p.y) + offset[i / 2][i % 2] + filter) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }

  __device__ __forceinline__ void run(int warpgroup, int first, int step) const {
#pragma unroll 1
    for (int i = warpgroup; first + i * step < p.tiles; i += Traits::kWarpgroups) {
      const int round = i / Traits::kSlots, slot = i - round * Traits::kSlots;
      bar.full[slot].wait(round & 1);
      Sums sums;
      multiply(sums, slot, i == warpgroup);
      store(sums, ResidentTile(p, first + i * step));
    }
  }
};

template <class Traits>
__device__ __forceinline__ void load_resident(const ResidentParams& p, const CUtensorMap& x_map, const CUtensorMap& w_map, char* smem,
                                              const ResidentBarriers<Traits>& bar, int column, int first, int step) {
  const auto load_tile = [&](int i) {
    const int round = i / Traits::kSlots, slot = i - round * Traits::kSlots;
    const ResidentTile tile(p, first + i * step);
    bar.empty[slot].wait((round & 1) ^ 1);
    bar.full[slot].arrive_and_expect_tx((kResidentHeight + 2) * kResidentPitch * 128);
    tma_load_4d(&x_map, bar.full + slot, smem + Traits::kFilterBytes + slot * kResidentTileBytes, 0, tile.w - p.pad_w, tile.h - p.pad_h, tile.n);
  };
  load_tile(0);
  for (int tap = 0; tap < kResidentTaps; ++tap) {
    bar.filters[tap].arrive_and_expect_tx(Traits::kTapBytes);
    cute::SM90_TMA_LOAD_5D::copy(&w_map, barrier_pointer(bar.filters + tap), kEvictLast, smem + tap * Traits::kTapBytes, tap * kResidentChannels, 0, 0, 0,
                                 column / 32);
  }
#pragma unroll 1
  for (int i = 1; first + i * step < p.tiles; ++i) load_tile(i);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    resident_halo_sm90(const __grid_constant__ ResidentParams p, const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  const ResidentBarriers<Traits> bar(smem + Traits::kBarrierOffset);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int column = blockIdx.x % p.groups * Traits::kColumns, first = blockIdx.x / p.groups, step = gridDim.x / p.groups;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&w_map));
    for (int i = 0; i < kResidentTaps; ++i) bar.filters[i].init(1);
    for (int i = 0; i < Traits::kSlots; ++i) bar.full[i].init(1), bar.empty[i].init(4);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();
  if (warp == 4 * Traits::kWarpgroups) {
    if (lane == 0) load_resident<Traits>(p, x_map, w_map, smem, bar, column, first, step);
  } else {
    const uint32_t address = smem_address(smem);
    ResidentConsumer<Traits>{p, bar, address, address + Traits::kFilterBytes, warp % 4, lane, column}.run(warp / 4, first, step);
  }
#endif
}

}  // namespace convfirst::direct::sm90
