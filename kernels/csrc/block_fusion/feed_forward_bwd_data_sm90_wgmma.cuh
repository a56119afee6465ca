// The gradient of A of the feed-forward half on Hopper, with LayerNorm's backward behind it:
// dA = (act'(A W1^T + b1) * (dy W2)) W1, da = rstd (dA - mean(dA) - A mean(dA A)). W2 comes scaled by layer scale and a power of two.
//
//   one block = a producer warpgroup (warp 0: weights, warp 1 + w: A and dy of consumer w) + kWarpgroups consumer warpgroups, each with
//   tiles of 64 pixels of its own:
//
//     dy tile [64 x C] -- D = dy W2 --+                       W1 chunk, the same bytes
//                                     * act' --> P [64 x 64] --- O += P W1 ------------ norm's backward --> da tile
//     A tile  [64 x C] -- S = A W1^T -+
//
//   what                       where                                               written by          released when
//   A, dy tiles                shared, a warpgroup's slots                         TMA                 da stored
//   W2, W1 chunks              shared, one ring: W2(0) W1(0) W2(1) W1(1) ..         TMA                 product done, per chunk
//   b1                         device memory; L1 has it after the first tile       -                   -
//   S, D, P, O                 32, 32, 16, C/2 registers                           wgmma, activation   -
//   da tile                    shared, over the A tile; TMA store                  consumer            -
//
//   Neither matrix is transposed: as operand of D and of O they lie MN-major.
#pragma once

#include "../common/sm90_mn_major.cuh"
#include "activation_bwd_sm90.cuh"
#include "feed_forward_bwd_tile_sm90.h"

namespace convfirst::block_fusion::sm90 {

struct BackwardDataParams {
  const float *bias, *pixel_scale, *scalars, *rstd;
  int pixels, channels, chunks, tiles;
};

// A position in a ring of slots.
template <int kSlots>
struct BackwardRing {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) slot = 0, phase ^= 1;
  }
  __device__ __forceinline__ int before(int steps = 1) const { return slot < steps ? slot + kSlots - steps : slot - steps; }
};

template <class Traits>
struct BackwardDataBarriers {
  static constexpr int kFull = 0, kEmpty = kMaxSlots, kTileFull = 2 * kMaxSlots, kTileEmpty = kTileFull + 2 * Traits::kWarpgroups;
  static constexpr int kCount = kTileEmpty + 2 * Traits::kWarpgroups;
  uint32_t base;  // address in shared memory
  __device__ __forceinline__ uint32_t full(int slot) const { return base + (kFull + slot) * 8; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return base + (kEmpty + slot) * 8; }
  __device__ __forceinline__ uint32_t tile_full(int warpgroup, int slot) const { return base + (kTileFull + 2 * warpgroup + slot) * 8; }
  __device__ __forceinline__ uint32_t tile_empty(int warpgroup, int slot) const { return base + (kTileEmpty + 2 * warpgroup + slot) * 8; }
};

template <class Traits>
__device__ __forceinline__ int backward_tile(int round, int warpgroup) {
  return blockIdx.x + (round * Traits::kWarpgroups + warpgroup) * gridDim.x;
}

template <class Traits>
__device__ void produce_backward_chunks(const BackwardDataParams& p, const CUtensorMap& w1_map, const CUtensorMap& w2_map, char* smem,
                                        BackwardDataBarriers<Traits> bar) {
  BackwardRing<Traits::kChunkSlots> ring;
  const auto next = [&](int bytes) {
    wait_barrier(bar.empty(ring.slot), ring.phase ^ 1);  // the slots start empty
    TransactionBarrier* full = transaction_barrier(bar.full(ring.slot));
    full->arrive_and_expect_tx(bytes);
    return full;
  };
  for (int round = 0; backward_tile<Traits>(round, 0) < p.tiles; ++round) {
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      TransactionBarrier* full = next(Traits::kTileBytes);
      tma_load_2d(&w2_map, full, smem + ring.slot * Traits::kTileBytes, chunk * kHiddenChunk, 0);
      ring.advance();
      full = next(Traits::kTileBytes);
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel) {
        tma_load_2d(&w1_map, full, smem + ring.slot * Traits::kTileBytes + panel * Traits::kPanelBytes, panel * Traits::kPanel, chunk * kHiddenChunk);
      }
      ring.advance();
    }
  }
}

template <class Traits>
__device__ void produce_backward_tiles(const BackwardDataParams& p, const CUtensorMap& a_map, const CUtensorMap& dy_map, char* slots,
                                       BackwardDataBarriers<Traits> bar, int warpgroup) {
  BackwardRing<Traits::kTileSlots> ring;
  for (int round = 0;; ++round) {
    const int tile = backward_tile<Traits>(round, warpgroup);
    if (tile >= p.tiles) return;
    wait_barrier(bar.tile_empty(warpgroup, ring.slot), ring.phase ^ 1);  // the slots start empty
    TransactionBarrier* full = transaction_barrier(bar.tile_full(warpgroup, ring.slot));
    full->arrive_and_expect_tx(Traits::kSlotBytes);
    char* to = slots + ring.slot * Traits::kSlotBytes;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      const int offset = panel * Traits::kPanelBytes;
      tma_load_2d(&dy_map, full, to + Traits::kTileBytes + offset, panel * Traits::kPanel, tile * kTilePixels, kEvictNormal);
      tma_load_2d(&a_map, full, to + offset, panel * Traits::kPanel, tile * kTilePixels, kEvictNormal);
    }
    ring.advance();
  }
}

template <class Traits>
struct BackwardDataConsumer {
  using Element = ElementOf<Traits>;
  using Sums = float[kHiddenChunk / 2];
  using Output = float[Traits::kChannels / 2];
  using Operand = uint32_t[kHiddenChunk / 4];
  static constexpr int kStepsPerPanel = Traits::kPanel / 16;
  const BackwardDataParams& p;
  const BackwardDataBarriers<Traits> bar;
  uint32_t chunks, slots;  // addresses
  int warpgroup, warp, lane;
  BackwardRing<Traits::kChunkSlots> ring;      // next to wait for
  BackwardRing<Traits::kTileSlots> tile_ring;

  // The address of the next chunk, once it is there.
  __device__ __forceinline__ uint32_t wait_chunk() {
    wait_barrier(bar.full(ring.slot), ring.phase);
    ring.advance();
    return chunk_address(ring.before());
  }
  __device__ __forceinline__ uint32_t chunk_address(int slot) const { return chunks + slot * Traits::kTileBytes; }
  __device__ __forceinline__ void release_chunk(int slot) const {
    if (lane == 0) arrive_barrier(bar.empty(slot));
  }

  // D = dy W2, S = A W1^T of the next chunk.
  __device__ __forceinline__ void issue_first(Sums& s, Sums& d, uint32_t tile) {
    const uint64_t dy = matrix_descriptor<Traits::kRowBytes>(tile + Traits::kTileBytes), x = matrix_descriptor<Traits::kRowBytes>(tile);
    const uint64_t w2 = mn_descriptor<128>(wait_chunk(), Traits::kTileBytes);
    const uint64_t b = matrix_descriptor<Traits::kRowBytes>(wait_chunk());
    fence_operands(s);
    fence_operands(d);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < Traits::kChannels / 16; ++k) {
      const uint64_t a = dy + k / kStepsPerPanel * (Traits::kPanelBytes / 16) + k % kStepsPerPanel * 2;
      wgmma_ss_major<Element, kHiddenChunk, Major::K, Major::MN>(d, a, w2 + k * 128, k > 0);
    }
#pragma unroll
    for (int k = 0; k < Traits::kChannels / 16; ++k) {
      const int offset = k / kStepsPerPanel * (Traits::kPanelBytes / 16) + k % kStepsPerPanel * 2;
      wgmma_ss<Element, kHiddenChunk>(s, x + offset, b + offset, k > 0);
    }
    cute::warpgroup_commit_batch();
  }

  // The product of hidden units 16 k of the chunk, for the k of part `part`.
  __device__ __forceinline__ void issue_output(Output& o, const Operand& h, uint32_t weights, int part) {
    constexpr int kSteps = kHiddenChunk / 16 / Traits::kParts;
    const uint64_t b = mn_descriptor<Traits::kRowBytes>(weights, Traits::kPanelBytes);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = kSteps * part; k < kSteps * (part + 1); ++k) {
      wgmma_rs_mn<Element, Traits::kChannels>(o, h + 4 * k, b + k * Traits::kRowBytes, true);
    }
    cute::warpgroup_commit_batch();
  }

  __device__ __forceinline__ void differentiate(const Sums& s, const Sums& d, Operand& h, int chunk, int part) const {
    constexpr int kCount = kHiddenChunk / 8 / Traits::kParts;
    int unit = chunk * kHiddenChunk + lane % 4 * 2;  // the lane's first
    asm volatile("" : "+r"(unit));                   // addresses are computed again, not kept in registers
    const float* bias = p.bias + unit;
#pragma unroll
    for (int j = kCount * part; j < kCount * (part + 1); ++j) {
      const float2 b = __ldg(reinterpret_cast<const float2*>(bias + 8 * j));
      float v[4], unused;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float slope;
        activate_with_slope<Traits::kActivation>(s[4 * j + i], i % 2 ? b.y : b.x, unused, slope);
        v[i] = fmaf(slope, d[4 * j + i], d[4 * j + i]);
      }
      h[2 * j] = pack2<Element>(v[0], v[1]), h[2 * j + 1] = pack2<Element>(v[2], v[3]);
    }
  }

  __device__ __forceinline__ uint32_t matrix_address(uint32_t slot, int j) const {
    constexpr int kBlocks = Traits::kPanel / 8;
    const int row = warp * 16 + (lane & 15);
    return slot + j / kBlocks * Traits::kPanelBytes + (swizzle<Traits::kRowBytes>(row * Traits::kRowBytes) ^ ((j % kBlocks + (lane >> 4)) << 4));
  }

  // da = rstd (v - mean(v) - A mean(v A)) with v = o * scales, over the A tile; without a norm da = v.
  __device__ __forceinline__ void finish(const Output& o, uint32_t slot, int tile, const CUtensorMap& da_map) const {
    const float scale = __ldg(p.scalars);
    float factor[2] = {scale, scale}, sum[2] = {0.f, 0.f}, dot[2] = {0.f, 0.f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int pixel = tile * kTilePixels + warp * 16 + lane / 4 + 8 * r;
      if (p.pixel_scale != nullptr) factor[r] *= __ldg(p.pixel_scale + pixel);
      if (p.rstd != nullptr && pixel < p.pixels) factor[r] *= __ldg(p.rstd + pixel);
    }
#pragma unroll
    for (int j = 0; j < Traits::kChannels / 8; j += 2) {
      uint32_t x[4];
      ldmatrix_x4(x, matrix_address(slot, j));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = unpack2<Element>(x[i]);
        const int k = 4 * j + 2 * i;
        sum[i % 2] += o[k] + o[k + 1];
        dot[i % 2] = fmaf(o[k], a.x, fmaf(o[k + 1], a.y, dot[i % 2]));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float share = p.rstd != nullptr ? factor[r] / static_cast<float>(p.channels) : 0.f;
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], step);
        dot[r] += __shfl_xor_sync(0xffffffffu, dot[r], step);
      }
      sum[r] *= share, dot[r] *= share;
    }
    warpgroup_barrier(1 + warpgroup);     // every warp's products have read A
    asm volatile("" : "+r"(slot));         // addresses are computed again, not kept in registers
#pragma unroll
    for (int j = 0; j < Traits::kChannels / 8; j += 2) {
      uint32_t x[4];
      ldmatrix_x4(x, matrix_address(slot, j));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = unpack2<Element>(x[i]);
        const int k = 4 * j + 2 * i, r = i % 2;
        x[i] = pack2<Element>(fmaf(o[k], factor[r], -fmaf(a.x, dot[r], sum[r])), fmaf(o[k + 1], factor[r], -fmaf(a.y, dot[r], sum[r])));
      }
      stmatrix_x4(matrix_address(slot, j), x[0], x[1], x[2], x[3]);
    }
    fence_async_proxy();
    warpgroup_barrier(1 + warpgroup);
    if (warp == 0 && lane == 0) {
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel) {
        cute::SM90_TMA_STORE_2D::copy(&da_map, reinterpret_cast<void*>(__cvta_shared_to_generic(slot + panel * Traits::kPanelBytes)),
                                      panel * Traits::kPanel, tile * kTilePixels);
      }
      cute::tma_store_arrive();
    }
  }

  // `under_first` runs under the first products.
  template <class Function>
  __device__ __forceinline__ void run_tile(Output& o, uint32_t tile, Function under_first) {
    Sums s, d;
    Operand h;
    issue_first(s, d, tile);
    under_first();
    const auto finish_chunk = [&](int chunk) {
      cute::warpgroup_wait<0>();
      fence_operands(s);
      fence_operands(d);
      fence_operands(h);
      fence_operands(o);
      release_chunk(ring.before(2));                 // W2's
      if (chunk > 0) release_chunk(ring.before(3));  // the chunk of W1 whose product was in flight
#pragma unroll
      for (int part = 0; part < Traits::kParts; ++part) {
        differentiate(s, d, h, chunk, part);
        issue_output(o, h, chunk_address(ring.before()), part);
      }
    };
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks - 1; ++chunk) {
      finish_chunk(chunk);
      issue_first(s, d, tile);
    }
    finish_chunk(p.chunks - 1);
    cute::warpgroup_wait<0>();
    fence_operands(o);
    release_chunk(ring.before());
  }

  // A warpgroup without a tile in the last round still turns the ring for the others.
  __device__ void skip() {
    for (int i = 0; i < 2 * p.chunks; ++i) {
      wait_chunk();
      release_chunk(ring.before());
    }
  }

  __device__ void run(const CUtensorMap& da_map) {
    int stored = -1;  // slot of the last da tile, while TMA may still read it
    const auto release_stored = [&] {
      if (stored >= 0 && warp == 0 && lane == 0) {
        cute::tma_store_wait<0>();
        arrive_barrier(bar.tile_empty(warpgroup, stored));
      }
      stored = -1;
    };
    for (int round = 0; backward_tile<Traits>(round, 0) < p.tiles; ++round) {
      const int tile = backward_tile<Traits>(round, warpgroup);
      if (tile >= p.tiles) {
        skip();
        break;
      }
      if (Traits::kTileSlots == 1) release_stored();
      wait_barrier(bar.tile_full(warpgroup, tile_ring.slot), tile_ring.phase);
      const uint32_t slot = slots + tile_ring.slot * Traits::kSlotBytes;
      Output o;  // cleared: left undefined, ptxas would serialise the products (C7515)
#pragma unroll
      for (int i = 0; i < Traits::kChannels / 2; ++i) o[i] = 0.f;
      fence_operands(o);
      run_tile(o, slot, [&] {
        if (Traits::kTileSlots > 1) release_stored();
      });
      finish(o, slot, tile, da_map);
      stored = tile_ring.slot;
      tile_ring.advance();
    }
    if (warp == 0 && lane == 0) cute::tma_store_wait<0>();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    feed_forward_bwd_data_sm90(const __grid_constant__ BackwardDataParams p, const __grid_constant__ CUtensorMap a_map,
                               const __grid_constant__ CUtensorMap dy_map, const __grid_constant__ CUtensorMap da_map,
                               const __grid_constant__ CUtensorMap w1_map, const __grid_constant__ CUtensorMap w2_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  using Barriers = BackwardDataBarriers<Traits>;
  const Barriers bar{smem_address(smem + Traits::kBarrierOffset)};
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Barriers::kCount; ++i) {
      transaction_barrier(bar.base + i * 8)->init(i >= Barriers::kEmpty && i < Barriers::kTileFull ? 4 * Traits::kWarpgroups : 1);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) {
        produce_backward_chunks<Traits>(p, w1_map, w2_map, smem, bar);
      } else if (warp <= Traits::kWarpgroups) {
        const int consumer = warp - 1;
        produce_backward_tiles<Traits>(p, a_map, dy_map, smem + Traits::kTilesOffset + consumer * Traits::kTileSlots * Traits::kSlotBytes, bar,
                                       consumer);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    const int consumer = warp / 4 - 1;
    const uint32_t base = smem_address(smem);
    BackwardDataConsumer<Traits> worker{p,    bar,      base, base + Traits::kTilesOffset + consumer * Traits::kTileSlots * Traits::kSlotBytes,
                                        consumer, warp % 4, static_cast<int>(threadIdx.x % 32)};
    worker.run(da_map);
  }
#endif
}

}  // namespace convfirst::block_fusion::sm90
