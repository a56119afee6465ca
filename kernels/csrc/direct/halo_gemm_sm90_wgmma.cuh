// Direct convolution with 3x3 filters of stride 1 on Hopper, each tile of x loaded once for all nine taps; its depth may be shared by a cluster.
//
//   a tile of x in shared memory: 64 channels, 2^shift pixels a row, two of them halo       A of a tap: 128 rows of that memory, one after another
//   +--+--+--+-- .. --+--+--+                                                               from pixel (r, s) of the tile on; rows of A whose pixel
//   |r0|  |              |  |     pixel i lies at 128 i bytes, swizzled by address,         is one of the two last of a row are computed in vain:
//   |r1|  |              |  |     so the 128 pixels of tap (r, s) begin                     1/8 of the products at 16 pixels a row and 8 rows, as
//   |..|  |              |  |     (r 2^shift + s) 128 bytes further on                      at 32 and 4 where the map has 28
//   +--+--+--+-- .. --+--+--+
//
//   A nine times from L2, as im2col brings it, is more than L2 gives when all multiprocessors ask (7 to 8 TB/s, H200): with tiles of 128 x 128 a slice is
//   32 KB for 512 clocks of products. Here it is 18 KB.
//
//   one block = a producer thread + 2 consumer warpgroups of 64 rows, for one tile; slices of channels are shared out to the blocks of a cluster, whose
//   sums are added as split_gemm_sm90_wgmma.cuh describes.
//
//   what                     where                                                  written by        released when
//   tile of x, 64 channels   shared, kHaloSlots, swizzled                           producer (TMA)    products of nine taps done, per warp
//   W, slices of 64          shared, ring of slots, swizzled                        producer (TMA)    products done, per warp
//   sums                     registers, kColumns / 2                                wgmma             -
//   pieces of this rank      shared, [piece][rank][half][thread][4], float32        every rank        -
//   bias                     shared                                                 producer          -
//   output                   global, 16 bytes a thread                              consumer          -
#pragma once

#include "halo_gemm_sm90.h"
#include "split_gemm_sm90_wgmma.cuh"

namespace convfirst::direct::sm90 {

constexpr int kHaloTaps = 9;

struct HaloParams {
  GemmParams gemm;
  int split, share_shift;
  int slices, pitch_shift;
  int tiles_p, tiles_q, out_h;
};

struct HaloTile {
  int n, h, w, column;
  __device__ __forceinline__ HaloTile(const HaloParams& p, int index, int columns) {
    const int pixels = index / p.gemm.tiles_n, width = (1 << p.pitch_shift) - 2, height = 128 >> p.pitch_shift;
    column = (index - pixels * p.gemm.tiles_n) * columns;
    const int row = pixels / p.tiles_q;
    n = row / p.tiles_p;
    w = (pixels - row * p.tiles_q) * width, h = (row - n * p.tiles_p) * height;
  }
};

template <class Traits>
struct HaloProducer {
  const HaloParams& p;
  const CUtensorMap& x_map;
  const CUtensorMap& w_map;
  char* smem;
  GemmBarriers &filters, &pixels;
  const HaloTile& tile;

  __device__ __forceinline__ void load_pixels(int slice, int index) const {
    const int slot = index % kHaloSlots;
    pixels.empty[slot].wait((index / kHaloSlots & 1) ^ 1);
    const int rows = (128 >> p.pitch_shift) + 2, bias = index == 0 && p.gemm.bias != nullptr ? min(Traits::kColumns, p.gemm.filters - tile.column) * 4 : 0;
    TransactionBarrier* full = pixels.full + slot;
    full->arrive_and_expect_tx((rows << p.pitch_shift) * 128 + bias);
    tma_load_4d(&x_map, full, smem + slot * kHaloTileBytes, slice * 64, tile.w - p.gemm.pad_w, tile.h - p.gemm.pad_h, tile.n);
    if (bias > 0) bulk_load(p.gemm.bias + tile.column, full, smem + Traits::kBiasOffset, bias);
  }

  __device__ __forceinline__ void run(int first, int last) const {
    int slot = 0;
    uint32_t phase = 1;  // the slots start empty
    load_pixels(first, 0);
#pragma unroll 1
    for (int slice = first; slice < last; ++slice) {
#pragma unroll 1
      for (int tap = 0; tap < kHaloTaps; ++tap) {
        filters.empty[slot].wait(phase);
        TransactionBarrier* full = filters.full + slot;
        full->arrive_and_expect_tx(Traits::kSlotBytes);
        cute::SM90_TMA_LOAD_5D::copy(&w_map, barrier_pointer(full), kEvictLast, smem + Traits::kFilterOffset + slot * Traits::kSlotBytes,
                                     tap * p.gemm.channels + slice * 64, 0, 0, 0, tile.column / 32);
        if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
        // Late enough that the tile before the last is no longer read when the filters' ring runs this far ahead.
        if (tap == Traits::kSlots && slice + 1 < last) load_pixels(slice + 1, slice + 1 - first);
      }
    }
  }
  static_assert(Traits::kSlots < kHaloTaps);
};

template <class Traits>
struct HaloConsumer {
  SplitConsumer<Traits> split;
  GemmBarriers &filters, &pixels;
  int pitch_shift;

  __device__ __forceinline__ void multiply(float (&sums)[Traits::kColumns / 2], int slices) {
    const GemmConsumer<Traits>& gemm = split.gemm;
    int slot = 0, held = -1;
    uint32_t phase = 0;
#pragma unroll 1
    for (int i = 0; i < slices; ++i) {
      const int buffer = i % kHaloSlots;
      pixels.full[buffer].wait(i / kHaloSlots & 1);
      const uint64_t tile = matrix_descriptor<128>(smem_address(gemm.smem) + buffer * kHaloTileBytes) + gemm.warpgroup * (64 * 128 >> 4);
#pragma unroll 1
      for (int tap = 0; tap < kHaloTaps; ++tap) {
        const int r = tap / 3, s = tap - 3 * r;
        const uint64_t a = tile + ((r << pitch_shift) + s) * (128 >> 4);
        filters.full[slot].wait(phase);
        const uint64_t w = matrix_descriptor<128>(smem_address(gemm.smem) + Traits::kFilterOffset + slot * Traits::kSlotBytes);
        cute::warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) wgmma_ss<ElementOf<Traits>, Traits::kColumns>(sums, a + 2 * k, w + 2 * k, i + tap + k > 0);
        cute::warpgroup_commit_batch();
        const int issued = slot;
        if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
        cute::warpgroup_wait<1>();
        if (gemm.lane == 0) {
          if (held >= 0) filters.empty[held].arrive();
          if (tap == 0 && i > 0) pixels.empty[buffer ^ 1].arrive();
        }
        held = issued;
      }
    }
    cute::warpgroup_wait<0>();
    fence_operands(sums);
  }

  __device__ __forceinline__ void run(const HaloParams& p, const HaloTile& tile, int slices) {
    float sums[Traits::kColumns / 2];
    multiply(sums, slices);
    grid::cluster_wait();  // every block has begun, so its shared memory may be written
    split.send(sums);
    grid::cluster_barrier();
    const int width = (1 << pitch_shift) - 2;
    split.finish(tile.column, [&](int pixel) {
      const int h = tile.h + (pixel >> pitch_shift), column = pixel & ((1 << pitch_shift) - 1), w = tile.w + column;
      if (column >= width || w >= p.gemm.out_w || h >= p.out_h) return -1;
      return tile.n * p.gemm.y_stride_n + h * p.gemm.y_stride_p + w * p.gemm.y_stride_q;
    });
  }
  static_assert(kHaloSlots == 2);
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    halo_gemm_sm90(const __grid_constant__ HaloParams p, const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  GemmBarriers filters(smem + Traits::kBarrierOffset, Traits::kSlots), pixels(smem + Traits::kBarrierOffset + 2 * Traits::kSlots * 8, kHaloSlots);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int index = blockIdx.x / p.split, rank = blockIdx.x - index * p.split;
  const HaloTile tile(p, index, Traits::kColumns);
  const int first = p.slices * rank / p.split, last = p.slices * (rank + 1) / p.split;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&w_map));
    for (int i = 0; i < Traits::kSlots; ++i) filters.full[i].init(1), filters.empty[i].init(4 * Traits::kWarpgroups);
    for (int i = 0; i < kHaloSlots; ++i) pixels.full[i].init(1), pixels.empty[i].init(4 * Traits::kWarpgroups);
    cutlass::arch::fence_barrier_init();
  }
  if (p.gemm.bias == nullptr) {
    float* bias = reinterpret_cast<float*>(smem + Traits::kBiasOffset);
    for (int i = threadIdx.x; i < Traits::kColumns; i += Traits::kThreads) bias[i] = 0.f;
  }
  __syncthreads();
  grid::cluster_arrive();
  wait_for_previous_launch();
  allow_next_launch();
  if (warp < 4) {
    if (threadIdx.x == 0) HaloProducer<Traits>{p, x_map, w_map, smem, filters, pixels, tile}.run(first, last);
    grid::cluster_wait();
    grid::cluster_arrive();
  } else {
    const GemmConsumer<Traits> gemm{p.gemm, OperandLayout(64, Traits::kRows, Traits::kColumns), smem, filters, warp / 4 - 1, warp % 4, lane};
    const uint32_t receive = smem_address(smem) + Traits::kReceiveOffset;
    HaloConsumer<Traits>{{gemm, p.split, p.share_shift, rank, receive, static_cast<int>(threadIdx.x % 128)}, filters, pixels, p.pitch_shift}.run(
        p, tile, last - first);
  }
#endif
}

}  // namespace convfirst::direct::sm90
