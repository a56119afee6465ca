// Direct convolution of few pixels on Hopper: the implicit matrix product with its depth shared by the blocks of a cluster.
//
//                depth = taps x channels                     sums of 128 x kColumns, float32, in pieces
//          +-------+-------+-------+-------+                +---+---+---+---+
//   pixels | rank  | rank  | rank  | rank  |   W as there   | 0 | 0 | 1 | 1 |   every rank stores the pieces of rank i in the shared
//   (128)  |   0   |   1   |   2   |   3   |  ----------->  +---+---+---+---+   memory of rank i, which adds them in the order of ranks
//          +-------+-------+-------+-------+                | 2 | 2 | 3 | 3 |   and stores y = act(sum + bias)
//                                                           +---+---+---+---+
//
//   one block = a producer thread + 2 consumer warpgroups of 64 pixels, for one tile; operands, ring and products are those of
//   implicit_gemm_sm90_wgmma.cuh. A few tiles of a long depth fill a GPU so: 784 pixels x 512 filters are 28 tiles, 72 slices deep.
//
//   what                     where                                                  written by        read when
//   A, W slices of 64        shared, ring of slots                                  producer (TMA)    products
//   sums                     registers, kColumns / 2                                wgmma             -
//   pieces of this rank      shared, [piece][rank][half][thread][4], float32        every rank        all ranks have passed the barrier
//   bias                     shared                                                 producer          the same
//   output                   global, 16 bytes a thread                              consumer          -
//
//   A piece is what a warpgroup's 128 threads have of 32 columns in one of their two rows: 8 neighbouring columns each. The pieces' memory is
//   apart from the ring, which may still be in use when the first of them arrive; so one barrier suffices, and nobody reads a block that has ended.
#pragma once

#include "common/grid_sm90.cuh"
#include "implicit_gemm_sm90_wgmma.cuh"
#include "split_gemm_sm90.h"

namespace convfirst::direct::sm90 {

struct SplitParams {
  GemmParams gemm;
  int split;
  int share_shift;  // log2 of the pieces of a rank
};

template <class Traits>
struct SplitProducer {
  GemmProducer<Traits> load;

  static __device__ __forceinline__ Panel panel_at(const GemmParams& p, int index) {
    const int panels_a_tap = (p.channels + p.panel - 1) / p.panel;
    Panel at;
    at.tap = index / panels_a_tap, at.c = (index - at.tap * panels_a_tap) * p.panel;
    at.r = at.tap / p.kernel_w, at.s = at.tap - at.r * p.kernel_w;
    return at;
  }

  // Filters of the first slices on their way into L2 while the launch before still runs: what that may be writing is read from there again.
  __device__ __forceinline__ void prefetch_filters(int column, int first, int last) const {
    const GemmParams& p = load.p;
    if (!p.merged) return;
    const int panels = kDepth / p.panel, end = min(last, first + Traits::kSlots);
    for (int i = first * panels; i < end * panels; ++i) {
      const Panel at = panel_at(p, i);
      if (at.tap < p.taps) cute::SM90_TMA_LOAD_5D::PREFETCH::copy(&load.w_map, at.tap * p.channels + at.c, 0, 0, 0, column / 32);
    }
  }

  __device__ __forceinline__ void run(int row, int column, int first, int last) const {
    const GemmParams& p = load.p;
    const int n = row / p.out_hw, pq = row - n * p.out_hw, out_p = pq / p.out_w, out_q = pq - out_p * p.out_w;
    const int h = out_p * p.stride_h - p.pad_h, w = out_q * p.stride_w - p.pad_w, panels = kDepth / p.panel;
    Panel at = panel_at(p, first * panels);
    int slot = 0;
    uint32_t phase = 1;  // the slots start empty
#pragma unroll 1
    for (int step = first; step < last; ++step) {
      load.bar.empty[slot].wait(phase);
      TransactionBarrier* full = load.bar.full + slot;
      const int bytes = step == first && p.bias != nullptr ? min(Traits::kColumns, p.filters - column) * 4 : 0;
      full->arrive_and_expect_tx(Traits::kSlotBytes + bytes);
#pragma unroll 1
      for (int i = 0; i < panels; ++i) {
        load.load_panel(full, load.smem + slot * Traits::kSlotBytes, i, at, n, h, w, column);
        at.advance(p);
      }
      if (bytes > 0) bulk_load(p.bias + column, full, load.smem + Traits::kBiasOffset, bytes);
      if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
    }
  }
};

template <class Traits>
struct SplitConsumer {
  static constexpr int kHalfBytes = kPieceBytes / 2;
  using Element = ElementOf<Traits>;
  GemmConsumer<Traits> gemm;
  int split, share_shift, rank;
  uint32_t receive;  // address of the pieces
  int thread;        // of the warpgroup

  // The pieces of this block's sums, each to the rank that adds it.
  __device__ __forceinline__ void send(const float (&sums)[Traits::kColumns / 2]) const {
#pragma unroll
    for (int block = 0; block < Traits::kBlocks; ++block) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int piece = (gemm.warpgroup * Traits::kBlocks + block) * 2 + r, owner = piece >> share_shift, local = piece - (owner << share_shift);
        const uint32_t there = grid::peer_address(receive + (local * split + rank) * kPieceBytes + thread * 16, owner);
        const float* s = sums + 16 * block + 2 * r;
        const float low[4] = {s[0], s[1], s[4], s[5]}, high[4] = {s[8], s[9], s[12], s[13]};
        grid::store_peer(there, low);
        grid::store_peer(there + kHalfBytes, high);
      }
    }
  }

  __device__ __forceinline__ void add(float (&v)[8], int local) const {
    const uint32_t from = receive + local * split * kPieceBytes + thread * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0.f;
#pragma unroll 2
    for (int source = 0; source < split; ++source) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 loaded = load_shared_128(from + source * kPieceBytes + half * kHalfBytes);
        v[4 * half] += __uint_as_float(loaded.x), v[4 * half + 1] += __uint_as_float(loaded.y);
        v[4 * half + 2] += __uint_as_float(loaded.z), v[4 * half + 3] += __uint_as_float(loaded.w);
      }
    }
  }

  // The pieces of this rank, each by one warpgroup; offset_of(pixel of the tile) is an element offset in y, negative where there is none.
  template <class Offset>
  __device__ __forceinline__ void finish(int column, Offset offset_of) const {
    const GemmParams& p = gemm.p;
#pragma unroll 1
    for (int local = gemm.warpgroup; local < 1 << share_shift; local += Traits::kWarpgroups) {
      const int piece = (rank << share_shift) + local, r = piece & 1, block = (piece >> 1) % Traits::kBlocks, part = (piece >> 1) / Traits::kBlocks;
      float v[8], bias[8];
      add(v, local);
      gemm.load_bias(bias, 0, block);
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) packed[i] = pack2<Element>(gemm.activate(v[2 * i] + bias[2 * i]), gemm.activate(v[2 * i + 1] + bias[2 * i + 1]));
      const int offset = offset_of(part * 64 + gemm.warp * 16 + gemm.lane / 4 + 8 * r), first = column + block * 32 + gemm.lane % 4 * 8;
      if (offset < 0 || first >= p.filters) continue;
      *reinterpret_cast<uint4*>(static_cast<Element*>(p.y) + offset + first) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }

  __device__ __forceinline__ void run(int row, int column, int steps) {
    float sums[1][Traits::kColumns / 2];
#pragma unroll 1
    for (int i = 0; i < steps; ++i) gemm.step(sums, i > 0);
    gemm.complete(sums);
    grid::cluster_wait();  // every block has begun, so its shared memory may be written
    send(sums[0]);
    grid::cluster_barrier();
    finish(column, [&](int pixel) { return gemm.offset_of(row + pixel); });
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    split_gemm_sm90(const __grid_constant__ SplitParams params, const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  const GemmParams& p = params.gemm;
  GemmBarriers bar(smem + Traits::kBarrierOffset, Traits::kSlots);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int tile = blockIdx.x / params.split, rank = blockIdx.x - tile * params.split;
  const int tile_row = tile / p.tiles_n, row = tile_row * Traits::kRows, column = (tile - tile_row * p.tiles_n) * Traits::kColumns;
  const int first = p.steps * rank / params.split, last = p.steps * (rank + 1) / params.split;
  const SplitProducer<Traits> producer{{p, x_map, w_map, smem, bar}};
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&w_map));
    for (int i = 0; i < Traits::kSlots; ++i) bar.full[i].init(1), bar.empty[i].init(4 * Traits::kWarpgroups);
    cutlass::arch::fence_barrier_init();
    producer.prefetch_filters(column, first, last);
  }
  if (p.bias == nullptr) {
    float* bias = reinterpret_cast<float*>(smem + Traits::kBiasOffset);
    for (int i = threadIdx.x; i < Traits::kColumns; i += Traits::kThreads) bias[i] = 0.f;
  }
  __syncthreads();
  grid::cluster_arrive();
  wait_for_previous_launch();
  allow_next_launch();
  if (warp < 4) {
    if (threadIdx.x == 0) producer.run(row, column, first, last);
    grid::cluster_wait();
    grid::cluster_arrive();
  } else {
    SplitConsumer<Traits>{{p, OperandLayout(p.panel, Traits::kRows, Traits::kColumns), smem, bar, warp / 4 - 1, warp % 4, lane},
                          params.split,
                          params.share_shift,
                          rank,
                          smem_address(smem) + Traits::kReceiveOffset,
                          static_cast<int>(threadIdx.x % 128)}
        .run(row, column, last - first);
  }
#endif
}

}  // namespace convfirst::direct::sm90
