// LayerNorm and the 2x2 convolution of stride 2 after it as one matrix product on Hopper, for layers whose matrix no block can keep:
// direct/implicit_gemm_sm90_wgmma.cuh with the norm taken out of the product, tap by tap.
//
//   y[m] = bias + sum over taps t of (x_t[m] W_t^T - mean_t[m] s_t) / deviation_t[m],   s_t = sum of W_t over channels
//
//          depth = 4 taps x C                  columns
//          +-----+-----+-----+-----+       +-------------+  warpgroup 0     after each tap
//   pixels | x_0 | x_1 | x_2 | x_3 |  W^T  | 64 x 128    |  warpgroup 1     tile += (tap - mean s) / deviation
//          |     |     |     |     | ----> | each        |  warpgroup 2     after the last: + bias, NHWC
//          +-----+-----+-----+-----+       +-------------+
//
//   one block = a producer warpgroup (one thread at work) + consumer warpgroups, persistent over tiles; x by TMA's im2col mode, W by a
//   tiled map that permutes its rows, so that a thread's sums are 8 neighbouring columns. While the tensor cores multiply a slice, each
//   warp reads the slice's 16 rows that its own sums belong to (two lanes a row) and adds up sums and sums of squares: nothing is
//   exchanged but by shuffles, and x is never rounded again. Tensor cores work for another warpgroup while one adds its tap.
//
//   what                     where                                       written by       released when
//   x, W slices of 64        shared, ring of slots, swizzled             producer (TMA)   products done and rows read, per warp
//   sums of the tap          registers, 64                               wgmma            -
//   sums of the tile         registers, 64                               consumer         -
//   moments                  registers, of half a row                    consumer         -
//   bias, s_t                shared, of the last tiles, float32          producer         no warp can still be in that tile
//   output                   global, 16 bytes a thread                   consumer         -
//
// Squares are of differences to the row's first value: the mean of squares less the square of the mean would cancel where a mean is large.
// That value is at most sqrt(C) deviations from the mean, so what cancels here is bounded by the width alone.
#pragma once

#include "direct/implicit_gemm_sm90_wgmma.cuh"
#include "downsample_gemm_sm90.h"

namespace convfirst::patch::sm90 {

using namespace convfirst::sm90;
using direct::sm90::ElementOf, direct::sm90::GemmBarriers, direct::sm90::GemmConsumer, direct::sm90::GemmParams, direct::sm90::kBiasBuffers,
    direct::sm90::kDepth, direct::sm90::OperandLayout;

struct DownsampleGemmParams {
  GemmParams gemm;
  const float* vectors;  // [1 + taps, columns]: bias, sums of the taps' weights
  int slices;            // of a tap
  float inverse_channels, eps;
  bool has_norm;
};

template <class Traits>
struct DownsampleProducer {
  const DownsampleGemmParams& p;
  const CUtensorMap& x_map;
  const CUtensorMap& w_map;
  char* smem;
  GemmBarriers& bar;

  // What does not come from the launch before: weights, and at a tile's beginning its vectors.
  __device__ __forceinline__ void load_weights(int slot, int step, int column, int buffer) const {
    TransactionBarrier* full = bar.full + slot;
    full->arrive_and_expect_tx(Traits::kSlotBytes + (step == 0 ? kTapVectors * Traits::kColumns * 4 : 0));
    cute::SM90_TMA_LOAD_5D::copy(&w_map, barrier_pointer(full), kEvictLast, smem + slot * Traits::kSlotBytes + Traits::kABytes,
                                 step * kDepth, 0, 0, 0, column / 32);
    if (step > 0) return;
    float* to = reinterpret_cast<float*>(smem + Traits::kBiasOffset) + buffer * kTapVectors * Traits::kColumns;
#pragma unroll 1
    for (int i = 0; i < kTapVectors; ++i)
      bulk_load(p.vectors + i * p.gemm.filters + column, full, to + i * Traits::kColumns, Traits::kColumns * 4);
  }

  __device__ void run() const {
    const GemmParams& q = p.gemm;
    const int first_column = static_cast<int>(blockIdx.x) % q.tiles_n * Traits::kColumns, early = min(q.steps, Traits::kSlots);
#pragma unroll 1
    for (int step = 0; step < early; ++step) load_weights(step, step, first_column, 0);
    wait_for_previous_launch();
    allow_next_launch();
    int slot = 0, buffer = 0, begun = early;  // slots whose weights are under way
    uint32_t phase = 1;                       // the slots start empty
    for (int tile = blockIdx.x; tile < q.tiles; tile += gridDim.x) {
      const int tile_row = tile / q.tiles_n, column = (tile - tile_row * q.tiles_n) * Traits::kColumns, row = tile_row * Traits::kRows;
      const int n = row / q.out_hw, pq = row - n * q.out_hw, out_p = pq / q.out_w, out_q = pq - out_p * q.out_w;
      int step = 0;
#pragma unroll 1
      for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll 1
        for (int slice = 0; slice < p.slices; ++slice, ++step) {
          bar.empty[slot].wait(phase);
          if (begun > 0) {
            --begun;
          } else {
            load_weights(slot, step, column, buffer);
          }
          cute::SM90_TMA_LOAD_IM2COL_4D::copy(&x_map, barrier_pointer(bar.full + slot), smem + slot * Traits::kSlotBytes, slice * kDepth,
                                              2 * out_q, 2 * out_p, n, static_cast<uint16_t>(tap % 2), static_cast<uint16_t>(tap / 2));
          if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
        }
      }
      buffer = (buffer + 1) % kBiasBuffers;
    }
  }
};

// Of half a row's values in the slices so far: the first value of the row, and sums of the differences to it and of their squares.
struct Moments {
  float first = 0.f, sum = 0.f, squares = 0.f;
};

// Of the two rows whose sums a thread has.
struct RowNorms {
  float mean[2] = {0.f, 0.f}, inverse[2] = {1.f, 1.f};
};

template <class Traits>
struct DownsampleConsumer : GemmConsumer<Traits> {
  using Base = GemmConsumer<Traits>;
  using typename Base::Element, typename Base::Result, typename Base::Sums;
  using Base::lane, Base::slot, Base::smem, Base::warp, Base::warpgroup;
  const DownsampleGemmParams& d;

  // Lane l has chunks l / 16 x 4 to + 3 of row l % 16 of the warp's; eight rows' chunks lie in eight different groups of banks.
  __device__ __forceinline__ void add_moments(Moments& m, uint32_t slice, bool begins) const {
    const uint32_t row = slice + (warpgroup * 64 + warp * 16 + lane % 16) * (kDepth * 2), swizzle = lane % 8;
    if (begins) m.first = unpack2<Element>(load_shared_32(row + swizzle * 16)).x;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint4 chunk = load_shared_128(row + ((lane / 16 * 4 + i) ^ swizzle) * 16);
#pragma unroll
      for (const uint32_t pair : {chunk.x, chunk.y, chunk.z, chunk.w}) {
        const float2 v = unpack2<Element>(pair);
        const float a = v.x - m.first, b = v.y - m.first;
        m.sum += a + b, m.squares = fmaf(b, b, fmaf(a, a, m.squares));
      }
    }
  }

  __device__ __forceinline__ RowNorms norms_of(Moments m) const {
    RowNorms norms;
    if (!d.has_norm) return norms;
    const float sum = m.sum + __shfl_xor_sync(0xffffffffu, m.sum, 16), squares = m.squares + __shfl_xor_sync(0xffffffffu, m.squares, 16);
    const float offset = sum * d.inverse_channels, variance = fmaxf(fmaf(-offset, offset, squares * d.inverse_channels), 0.f);
    const float mean = m.first + offset, inverse = rsqrtf(variance + d.eps);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      norms.mean[r] = __shfl_sync(0xffffffffu, mean, lane / 4 + 8 * r);
      norms.inverse[r] = __shfl_sync(0xffffffffu, inverse, lane / 4 + 8 * r);
    }
    return norms;
  }

  __device__ __forceinline__ void add_tap(Sums& tile, const Sums& tap, const RowNorms& norms, int vector) const {
#pragma unroll
    for (int block = 0; block < Traits::kBlocks; ++block) {
      float weights[8];
      this->load_bias(weights, vector, block);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int r = i / 2 % 2, column = i / 4 * 2 + i % 2, at = 16 * block + i;
        tile[0][at] = fmaf(norms.inverse[r], fmaf(-norms.mean[r], weights[column], tap[0][at]), tile[0][at]);
      }
    }
  }

  __device__ __forceinline__ void multiply_tap(Sums& tile, int vector) {
    Sums tap;
    Moments moments;
#pragma unroll 1
    for (int i = 0; i < d.slices; ++i) {
      const uint32_t slice = smem_address(smem) + slot * Traits::kSlotBytes;
      this->step(tap, i > 0);
      if (d.has_norm) add_moments(moments, slice, i == 0);
    }
    const RowNorms norms = norms_of(moments);
    this->complete(tap);
    add_tap(tile, tap, norms, vector);
  }

  __device__ __forceinline__ void run() {
    int index = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < d.gemm.tiles; tile += gridDim.x, ++index) {
      const int vectors = index % kBiasBuffers * kTapVectors;
      Sums sums = {};
#pragma unroll 1
      for (int tap = 0; tap < kTaps; ++tap) multiply_tap(sums, vectors + 1 + tap);
      Result result = this->result_of(tile, index);
      result.buffer = vectors;
      __builtin_assume(d.gemm.activation == direct::Activation::kNone);  // or every value meets four branches
#pragma unroll
      for (int block = 0; block < Traits::kBlocks; ++block) this->store_block(sums[0], result, 0, block);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    downsample_gemm_sm90(const __grid_constant__ DownsampleGemmParams p, const __grid_constant__ CUtensorMap x_map,
                         const __grid_constant__ CUtensorMap w_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char smem[];
  char* const base = reinterpret_cast<char*>(smem);
  GemmBarriers bar(base + Traits::kBarrierOffset, Traits::kSlots);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&w_map));
    for (int i = 0; i < Traits::kSlots; ++i) bar.full[i].init(1), bar.empty[i].init(4 * Traits::kWarpgroups);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) DownsampleProducer<Traits>{p, x_map, w_map, base, bar}.run();
  } else {
    // What they store follows what the producer loaded after the launches before had ended, so only that thread waits for them.
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    DownsampleConsumer<Traits>{{p.gemm, OperandLayout(kDepth, Traits::kRows, Traits::kColumns), base, bar, warp / 4 - 1, warp % 4, lane}, p}.run();
  }
#endif
}

}  // namespace convfirst::patch::sm90
