// The feed-forward half of a block on Hopper, after convolution and norm were written to memory: y = x + scale (act(A W1^T + b1) W2^T + b2).
// For filters whose convolution does not hide under the matrix products (depthwise 7x7): the hidden tensor stays in registers, A
// is read once.
//
//   one block = a producer warpgroup (warp 0: weights, warp 1 + w: A and x of consumer w) + kWarpgroups consumer warpgroups, each with
//   tiles of 64 pixels of its own:
//
//        A tile [64 x C]                W1 chunk [64 hidden x C]      W2 chunk [C x 64 hidden]       x tile [64 x C]
//             |                                |                             |                            |
//             +----- S = A W1^T --------------- -- act --> P --> O += P W2^T -- + bias, scale ----------- + ----> y tile
//
//   what                       where                                               written by          released when
//   A, x tiles                 shared, a warpgroup's ring: A(0) x(0) A(1) x(1) ..   TMA                 A read to registers; y stored
//   W1, W2 chunks              shared, resident if all fit, else two rings          TMA                 product done, per chunk
//   bias and scale vectors     shared, float32                                     prologue            -
//   S, P, O                    32, 2 x 16, C/2 registers                           wgmma, activation   -
//   y tile                     shared, over the x tile; TMA store                  consumer            -
#pragma once

#include "feed_forward_sm90.cuh"
#include "feed_forward_tile_sm90.h"

namespace convfirst::block_fusion::sm90 {

struct FeedForwardParams : WeightRings {
  const void* x;
  void* y;
  const float* expand_bias;
  const float* project_bias;
  const float* layer_scale;
  const float* sample_scale;
  int pixels, image_pixels, channels, hidden, tiles, tile_slots;
};

struct FeedForwardBarriers : WeightBarriers {
  TransactionBarrier* tile_full;  // [warpgroup][slot]
  Barrier* tile_empty;
  template <int kWarpgroups>
  __device__ static FeedForwardBarriers at(char* base) {
    FeedForwardBarriers b;
    b.w1_full = reinterpret_cast<TransactionBarrier*>(base);
    b.w2_full = b.w1_full + kMaxSlots;
    b.tile_full = b.w2_full + kMaxSlots;
    b.w1_empty = reinterpret_cast<Barrier*>(b.tile_full + kWarpgroups * kMaxSlots);
    b.w2_empty = b.w1_empty + kMaxSlots;
    b.tile_empty = b.w2_empty + kMaxSlots;
    return b;
  }
};

template <class Traits>
__device__ void produce_chunks(const FeedForwardParams& p, const CUtensorMap& w1_map, const CUtensorMap& w2_map, char* smem,
                               const FeedForwardLayout& layout, WeightBarriers& bar, int rounds) {
  const bool resident = p.w1_slots == p.chunks && p.w2_slots == p.chunks;
  RingState w1, w2;
  w1.phase = w2.phase = 1;  // the slots start empty
  const int steps = resident ? p.chunks : rounds * p.chunks;
  for (int step = 0, chunk = 0; step < steps; ++step, chunk = chunk + 1 == p.chunks ? 0 : chunk + 1) {
    bar.w1_empty[w1.slot].wait(w1.phase);
    bar.w1_full[w1.slot].arrive_and_expect_tx(Traits::kW1Bytes);
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      tma_load_2d(&w1_map, bar.w1_full + w1.slot, smem + layout.w1 + w1.slot * Traits::kW1Bytes + panel * kHiddenChunk * Traits::kRowBytes,
                  panel * Traits::kPanel, chunk * kHiddenChunk);
    }
    w1.advance(p.w1_slots, false);
    bar.w2_empty[w2.slot].wait(w2.phase);
    bar.w2_full[w2.slot].arrive_and_expect_tx(Traits::kW2Bytes);
    tma_load_2d(&w2_map, bar.w2_full + w2.slot, smem + layout.w2 + w2.slot * Traits::kW2Bytes, chunk * kHiddenChunk, 0);
    w2.advance(p.w2_slots, false);
  }
}

template <class Traits>
__device__ void produce_tiles(const FeedForwardParams& p, const CUtensorMap& a_map, const CUtensorMap& x_map, char* slots,
                              TransactionBarrier* full, Barrier* empty, int first) {
  RingState ring;
  ring.phase = 1;
  const auto load = [&](const CUtensorMap& map, int tile) {
    empty[ring.slot].wait(ring.phase);
    full[ring.slot].arrive_and_expect_tx(Traits::kSlotBytes);
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      tma_load_2d(&map, full + ring.slot, slots + ring.slot * Traits::kSlotBytes + panel * Traits::kAPanelBytes, panel * Traits::kPanel,
                  tile * kTilePixels, kEvictNormal);
    }
    ring.advance(p.tile_slots, false);
  };
  for (int tile = first; tile < p.tiles; tile += gridDim.x * Traits::kWarpgroups) {
    load(a_map, tile);
    if (Traits::kXShared) load(x_map, tile);
  }
}

template <class Traits>
struct FeedForwardConsumer {
  using Element = ElementOf<Traits>;
  static constexpr int kChannels = Traits::kChannels;
  const FeedForwardParams& p;
  uint32_t slots, vectors;
  TransactionBarrier* full;
  Barrier* empty;
  int warpgroup, warp, lane;
  RingState ring;

  __device__ uint32_t wait_slot(int* slot) {
    *slot = ring.slot;
    full[ring.slot].wait(ring.phase);
    const uint32_t address = slots + ring.slot * Traits::kSlotBytes;
    ring.advance(p.tile_slots, false);
    return address;
  }

  __device__ __forceinline__ uint32_t matrix_address(uint32_t slot, int j) const {
    constexpr int kBlocks = Traits::kPanel / 8;
    const int row = warp * 16 + (lane & 15);
    return slot + j / kBlocks * Traits::kAPanelBytes +
           (swizzle<Traits::kRowBytes>(row * Traits::kRowBytes) ^ ((j % kBlocks + (lane >> 4)) << 4));
  }

  __device__ __forceinline__ void load_operand(OperandA<Traits>& a, uint32_t slot) const {
    if constexpr (Traits::kARegisters) {
#pragma unroll
      for (int j = 0; j < kChannels / 8; j += 2) {
        ldmatrix_x4(*reinterpret_cast<uint32_t(*)[4]>(a.fragments + 2 * j), matrix_address(slot, j));
      }
    } else {
      a.descriptor = matrix_descriptor<Traits::kRowBytes>(slot);
    }
  }

  // O <- (O + bias) * layer scale * sample scale.
  __device__ __forceinline__ void scale_output(float (&o)[kChannels / 2], int tile) const {
    float sample[2] = {1.f, 1.f};
    if (p.sample_scale != nullptr) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int pixel = tile * kTilePixels + warp * 16 + lane / 4 + 8 * r;
        if (pixel < p.pixels) sample[r] = __ldg(p.sample_scale + pixel / p.image_pixels);
      }
    }
    const bool scaled = p.layer_scale != nullptr || p.sample_scale != nullptr;
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const uint32_t offset = vectors + (8 * j + 2 * (lane % 4)) * 4;
      const float2 b = load_shared_float2(offset);
      o[4 * j] += b.x, o[4 * j + 1] += b.y, o[4 * j + 2] += b.x, o[4 * j + 3] += b.y;
      if (scaled) {
        const float2 s = load_shared_float2(offset + kChannels * 4);
        o[4 * j] *= s.x * sample[0], o[4 * j + 1] *= s.y * sample[0], o[4 * j + 2] *= s.x * sample[1], o[4 * j + 3] *= s.y * sample[1];
      }
    }
  }

  // y over x in its slot.
  __device__ __forceinline__ void add_residual(const float (&o)[kChannels / 2], uint32_t slot) const {
    constexpr int kBatch = kChannels % 64 == 0 ? 8 : 4;  // 8-channel blocks with their loads in flight together
#pragma unroll
    for (int first = 0; first < kChannels / 8; first += kBatch) {
      uint32_t x[kBatch / 2][4];
#pragma unroll
      for (int i = 0; i < kBatch / 2; ++i) ldmatrix_x4(x[i], matrix_address(slot, first + 2 * i));
#pragma unroll
      for (int i = 0; i < kBatch / 2; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 v = unpack2<Element>(x[i][r]);
          const int k = 4 * (first + 2 * i) + 2 * r;
          x[i][r] = pack2<Element>(o[k] + v.x, o[k + 1] + v.y);
        }
        stmatrix_x4(matrix_address(slot, first + 2 * i), x[i][0], x[i][1], x[i][2], x[i][3]);
      }
    }
  }

  __device__ __forceinline__ void stage_output(const float (&o)[kChannels / 2], uint32_t slot) const {
#pragma unroll
    for (int j = 0; j < kChannels / 8; j += 2) {
      stmatrix_x4(matrix_address(slot, j), pack2<Element>(o[4 * j], o[4 * j + 1]), pack2<Element>(o[4 * j + 2], o[4 * j + 3]),
                  pack2<Element>(o[4 * j + 4], o[4 * j + 5]), pack2<Element>(o[4 * j + 6], o[4 * j + 7]));
    }
  }

  // y = x + staged tile, 16 bytes a thread, a pixel's channels side by side; loads in batches ahead of their use.
  __device__ __forceinline__ void store_with_residual(uint32_t slot, int tile) const {
    constexpr int kBlocks = Traits::kPanel / 8, kVectors = kChannels / 8, kIterations = kTilePixels * kVectors / 128, kBatch = 8;
    static_assert(kIterations % kBatch == 0);
    const int row_vectors = p.channels / 8;
#pragma unroll
    for (int first = 0; first < kIterations; first += kBatch) {
      uint4 x[kBatch];
      int offset[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int index = (first + i) * 128 + warp * 32 + lane, row = index / kVectors, j = index % kVectors;
        const int pixel = tile * kTilePixels + row;
        offset[i] = pixel < p.pixels && j < row_vectors ? pixel * row_vectors + j : -1;
        if (offset[i] >= 0) x[i] = __ldg(static_cast<const uint4*>(p.x) + offset[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int index = (first + i) * 128 + warp * 32 + lane, row = index / kVectors, j = index % kVectors;
        if (offset[i] < 0) continue;
        uint4 v = load_shared_128(slot + j / kBlocks * Traits::kAPanelBytes +
                                  (swizzle<Traits::kRowBytes>(row * Traits::kRowBytes) ^ (j % kBlocks << 4)));
        uint32_t* u = reinterpret_cast<uint32_t*>(&v);
        const uint32_t* w = reinterpret_cast<const uint32_t*>(&x[i]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 s = unpack2<Element>(u[k]), t = unpack2<Element>(w[k]);
          u[k] = pack2<Element>(s.x + t.x, s.y + t.y);
        }
        static_cast<uint4*>(p.y)[offset[i]] = v;
      }
    }
  }

  __device__ void release(int slot) {
    __syncwarp();
    if (lane == 0) empty[slot].arrive();
  }

  __device__ void run(WeightBarriers& bar, uint32_t w1, uint32_t w2, uint32_t expand_bias, const CUtensorMap& y_map, int rounds) {
    FeedForward<Traits> feed_forward{p, bar, w1, w2, expand_bias, lane, {}, {}, {}, {}};
    int stored_slot = -1;  // of the last y tile, while TMA may still read it
    const auto release_stored = [&] {
      if (stored_slot < 0) return;
      if (warp == 0 && lane == 0) cute::tma_store_wait<0>();
      release(stored_slot);
    };
    for (int round = 0; round < rounds; ++round) {
      const int tile = blockIdx.x + (round * Traits::kWarpgroups + warpgroup) * gridDim.x;
      if (tile >= p.tiles) {
        feed_forward.skip(0);
        break;
      }
      int a_slot, x_slot;
      uint32_t slot = wait_slot(&a_slot);
      OperandA<Traits> a;
      float o[kChannels / 2];
      load_operand(a, slot);
      if (Traits::kARegisters) release(a_slot);
      if (Traits::kXShared) release_stored();
      feed_forward.run(o, a);
      scale_output(o, tile);
      if constexpr (Traits::kXShared) {
        if (!Traits::kARegisters) release(a_slot);
        slot = wait_slot(&x_slot);
        add_residual(o, slot);
        fence_async_proxy();
        warpgroup_barrier(1 + warpgroup);
        if (warp == 0 && lane == 0) {
#pragma unroll
          for (int panel = 0; panel < Traits::kPanels; ++panel) {
            cute::SM90_TMA_STORE_2D::copy(&y_map, reinterpret_cast<void*>(__cvta_shared_to_generic(slot + panel * Traits::kAPanelBytes)),
                                          panel * Traits::kPanel, tile * kTilePixels);
          }
          cute::tma_store_arrive();
        }
        stored_slot = x_slot;
      } else {
        warpgroup_barrier(1 + warpgroup);  // every warp's products have read A
        stage_output(o, slot);
        warpgroup_barrier(1 + warpgroup);
        store_with_residual(slot, tile);
        fence_async_proxy();
        release(a_slot);
      }
    }
    if (Traits::kXShared && stored_slot >= 0 && warp == 0 && lane == 0) cute::tma_store_wait<0>();
  }
};

template <class Traits>
__device__ void load_feed_forward_vectors(const FeedForwardParams& p, char* smem, const FeedForwardLayout& layout) {
  float* vectors = reinterpret_cast<float*>(smem + layout.vectors);
  for (int i = threadIdx.x; i < Traits::kChannels; i += Traits::kThreads) {
    vectors[i] = p.project_bias != nullptr && i < p.channels ? p.project_bias[i] : 0.f;
    vectors[Traits::kChannels + i] = p.layer_scale != nullptr && i < p.channels ? p.layer_scale[i] : 1.f;
  }
  for (int i = threadIdx.x; i < p.chunks * kHiddenChunk; i += Traits::kThreads) {
    const float b = (p.expand_bias != nullptr && i < p.hidden ? p.expand_bias[i] : 0.f) * bias_scale<Traits::kActivation>();
    if constexpr (Traits::kHalfActivation) {
      reinterpret_cast<__half*>(smem + layout.expand_bias)[i] = __float2half_rn(b);
    } else {
      reinterpret_cast<float*>(smem + layout.expand_bias)[i] = b;
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    feed_forward_fwd_sm90(const __grid_constant__ FeedForwardParams p, const __grid_constant__ CUtensorMap a_map,
                          const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap y_map,
                          const __grid_constant__ CUtensorMap w1_map, const __grid_constant__ CUtensorMap w2_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  const FeedForwardLayout layout = feed_forward_layout<Traits>({p.w1_slots, p.w2_slots, p.tile_slots}, p.chunks);
  auto bar = FeedForwardBarriers::at<Traits::kWarpgroups>(smem + layout.barriers);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int rounds = (p.tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) * Traits::kWarpgroups - 1) /
                     (static_cast<int>(gridDim.x) * Traits::kWarpgroups);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxSlots; ++i) {
      bar.w1_full[i].init(1), bar.w2_full[i].init(1);
      bar.w1_empty[i].init(4 * Traits::kWarpgroups), bar.w2_empty[i].init(4 * Traits::kWarpgroups);
    }
    for (int i = 0; i < Traits::kWarpgroups * kMaxSlots; ++i) bar.tile_full[i].init(1), bar.tile_empty[i].init(4);
    cutlass::arch::fence_barrier_init();
  }
  load_feed_forward_vectors<Traits>(p, smem, layout);
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) {
        produce_chunks<Traits>(p, w1_map, w2_map, smem, layout, bar, rounds);
      } else if (warp <= Traits::kWarpgroups) {
        const int consumer = warp - 1;
        produce_tiles<Traits>(p, a_map, x_map, smem + layout.slots + consumer * p.tile_slots * Traits::kSlotBytes,
                              bar.tile_full + consumer * kMaxSlots, bar.tile_empty + consumer * kMaxSlots,
                              blockIdx.x + consumer * gridDim.x);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    const int consumer = warp / 4 - 1;
    FeedForwardConsumer<Traits> worker{p,
                                       smem_address(smem + layout.slots) + consumer * p.tile_slots * Traits::kSlotBytes,
                                       smem_address(smem + layout.vectors),
                                       bar.tile_full + consumer * kMaxSlots,
                                       bar.tile_empty + consumer * kMaxSlots,
                                       consumer,
                                       warp % 4,
                                       static_cast<int>(threadIdx.x % 32),
                                       {}};
    worker.run(bar, smem_address(smem + layout.w1), smem_address(smem + layout.w2), smem_address(smem + layout.expand_bias), y_map, rounds);
  }
#endif
}

}  // namespace convfirst::block_fusion::sm90
