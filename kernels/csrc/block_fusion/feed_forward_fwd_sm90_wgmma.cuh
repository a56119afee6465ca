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
//   A, x tiles                 shared, a warpgroup's ring: A(0) x(0) A(1) x(1) ..   TMA                 first product done; y stored
//   W1, W2 chunks              shared, resident if all fit, else two rings          TMA                 product done, per chunk
//   bias and scale vectors     shared, float32                                     prologue            -
//   S, P, O                    32, 2 x 16, C/2 registers                           wgmma, activation   -
//   y tile                     shared, over the x tile; TMA store                  consumer            -
//
//   At 256 channels, where a last round would leave half of the multiprocessors idle, two blocks of a cluster share its tiles: each sums one
//   half of the hidden units, sends the other's half of the output channels over (A's slot, fp32), and finishes its own.
#pragma once

#include "feed_forward_sm90.cuh"
#include "feed_forward_tile_sm90.h"

namespace convfirst::block_fusion::sm90 {

struct FeedForwardParams : Work {
  const void* x;
  void* y;
  const float* expand_bias;
  const float* project_bias;
  const float* layer_scale;
  const float* sample_scale;
  int pixels, image_pixels, channels, hidden, tile_slots;
};

// The barriers lie one after another: full W1 slots, full W2 slots, a warpgroup's full tile slots each, then empty ones in the same order.
template <int kWarpgroups>
struct FeedForwardBarriers {
  uint32_t base;  // address in shared memory
  __device__ __forceinline__ uint32_t at(int group, int slot) const { return base + (group * kMaxSlots + slot) * 8; }
  __device__ __forceinline__ uint32_t w1_full(int slot) const { return at(0, slot); }
  __device__ __forceinline__ uint32_t w2_full(int slot) const { return at(1, slot); }
  __device__ __forceinline__ uint32_t tile_full(int warpgroup, int slot) const { return at(2 + warpgroup, slot); }
  __device__ __forceinline__ uint32_t w1_empty(int slot) const { return at(2 + kWarpgroups, slot); }
  __device__ __forceinline__ uint32_t w2_empty(int slot) const { return at(3 + kWarpgroups, slot); }
  __device__ __forceinline__ uint32_t tile_empty(int warpgroup, int slot) const { return at(4 + kWarpgroups + warpgroup, slot); }
  // The other block's slot may be written; this one's has been.
  __device__ __forceinline__ uint32_t peer_ready(int warpgroup) const { return at(4 + 2 * kWarpgroups, warpgroup); }
  __device__ __forceinline__ uint32_t peer_sent(int warpgroup) const { return at(4 + 2 * kWarpgroups, kWarpgroups + warpgroup); }
};

template <class Traits>
__device__ void produce_chunks(const FeedForwardParams& p, const CUtensorMap& w1_map, const CUtensorMap& w2_map, char* smem,
                               const FeedForwardLayout& layout, FeedForwardBarriers<Traits::kWarpgroups> bar, int rounds) {
  const bool resident = p.w1_slots == p.chunks && p.w2_slots == p.chunks;
  RingState<Traits::kFixedSlots> w1, w2;
  for (int round = 0; round < (resident ? 1 : rounds); ++round) {
    const Round work = round_of<Traits>(p, round, 0);
    for (int chunk = work.first; chunk < work.first + work.count; ++chunk) {
      wait_barrier(bar.w1_empty(w1.slot()), w1.phase() ^ 1);  // the slots start empty
      TransactionBarrier* w1_full = transaction_barrier(bar.w1_full(w1.slot()));
      w1_full->arrive_and_expect_tx(Traits::kW1Bytes);
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel) {
        tma_load_2d(&w1_map, w1_full, smem + layout.w1 + w1.slot() * Traits::kW1Bytes + panel * kHiddenChunk * Traits::kRowBytes,
                    panel * Traits::kPanel, chunk * kHiddenChunk);
      }
      w1.advance(p.w1_slots, false);
      wait_barrier(bar.w2_empty(w2.slot()), w2.phase() ^ 1);  // the slots start empty
      load_w2<Traits>(w2_map, transaction_barrier(bar.w2_full(w2.slot())), smem + layout.w2 + w2.slot() * Traits::kW2Bytes, chunk,
                      work.shared && blockIdx.x % 2 == 1);
      w2.advance(p.w2_slots, false);
    }
  }
}

template <class Traits>
__device__ void produce_tiles(const FeedForwardParams& p, const CUtensorMap& a_map, const CUtensorMap& x_map, char* slots,
                              FeedForwardBarriers<Traits::kWarpgroups> bar, int warpgroup, int rounds) {
  RingState<0> ring;
  const auto load = [&](const CUtensorMap& map, int tile) {
    wait_barrier(bar.tile_empty(warpgroup, ring.slot()), ring.phase() ^ 1);  // the slots start empty
    TransactionBarrier* full = transaction_barrier(bar.tile_full(warpgroup, ring.slot()));
    full->arrive_and_expect_tx(Traits::kSlotBytes);
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      tma_load_2d(&map, full, slots + ring.slot() * Traits::kSlotBytes + panel * Traits::kAPanelBytes, panel * Traits::kPanel,
                  tile * kTilePixels, kEvictNormal);
    }
    ring.advance(p.tile_slots, false);
  };
  for (int round = 0; round < rounds; ++round) {
    const int tile = round_of<Traits>(p, round, warpgroup).tile;
    if (tile >= p.tiles) return;
    load(a_map, tile);
    if (Traits::kXShared) load(x_map, tile);
  }
}

template <class Traits>
struct FeedForwardConsumer {
  using Element = ElementOf<Traits>;
  static constexpr int kChannels = Traits::kChannels;
  const FeedForwardParams& p;
  const FeedForwardBarriers<Traits::kWarpgroups> bar;
  uint32_t slots, vectors;
  int warpgroup, warp, lane;
  RingState<Traits::kFixedSlots == 0 ? 0 : Traits::kLeastSlots> ring;

  __device__ __forceinline__ uint32_t wait_slot(int* slot) {
    *slot = ring.slot();
    wait_barrier(bar.tile_full(warpgroup, ring.slot()), ring.phase());
    const uint32_t address = slots + ring.slot() * Traits::kSlotBytes;
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

  // O <- (O + bias) * layer scale * sample scale, for kCount channels from `channel` on.
  template <int kCount = kChannels>
  __device__ __forceinline__ void scale_output(float (&o)[kChannels / 2], int tile, int channel = 0) const {
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
    for (int j = 0; j < kCount / 8; ++j) {
      const uint32_t offset = vectors + (channel + 8 * j + 2 * (lane % 4)) * 4;
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

  template <int kCount = kChannels>
  __device__ __forceinline__ void stage_output(const float (&o)[kChannels / 2], uint32_t slot) const {
#pragma unroll
    for (int j = 0; j < kCount / 8; j += 2) {
      stmatrix_x4(matrix_address(slot, j), pack2<Element>(o[4 * j], o[4 * j + 1]), pack2<Element>(o[4 * j + 2], o[4 * j + 3]),
                  pack2<Element>(o[4 * j + 4], o[4 * j + 5]), pack2<Element>(o[4 * j + 6], o[4 * j + 7]));
    }
  }

  // y = x + staged tile, 16 bytes a thread, a pixel's channels side by side; loads in batches ahead of their use.
  template <int kCount = kChannels>
  __device__ __forceinline__ void store_with_residual(uint32_t slot, int tile, int channel = 0) const {
    constexpr int kBlocks = Traits::kPanel / 8, kVectors = kCount / 8, kIterations = kTilePixels * kVectors / 128, kBatch = 8;
    static_assert(kIterations % kBatch == 0);
    const int row_vectors = p.channels / 8, first_vector = channel / 8;
#pragma unroll
    for (int first = 0; first < kIterations; first += kBatch) {
      uint4 x[kBatch];
      int offset[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int index = (first + i) * 128 + warp * 32 + lane, row = index / kVectors, j = index % kVectors;
        const int pixel = tile * kTilePixels + row;
        offset[i] = pixel < p.pixels && first_vector + j < row_vectors ? pixel * row_vectors + first_vector + j : -1;
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
    if (lane == 0) arrive_barrier(bar.tile_empty(warpgroup, slot));
  }

  // From A's slot, where x has none: through registers, `kCount` channels from `channel` on.
  template <int kCount>
  __device__ __forceinline__ void finish_tile(float (&o)[kChannels / 2], uint32_t slot, int tile, int channel) const {
    scale_output<kCount>(o, tile, channel);
    warpgroup_barrier(1 + warpgroup);  // every warp's products have read A
    stage_output<kCount>(o, slot);
    warpgroup_barrier(1 + warpgroup);
    store_with_residual<kCount>(slot, tile, channel);
    fence_async_proxy();
  }

  __device__ void run(uint32_t w1, uint32_t w2, uint32_t expand_bias, const CUtensorMap& y_map, int rounds) {
    FeedForward<Traits, FeedForwardBarriers<Traits::kWarpgroups>> feed_forward{p, bar, w1, w2, expand_bias, lane, 0, p.chunks, {}, {}, {}, {}};
    int stored_slot = -1;  // of the last y tile, while TMA may still read it
    const auto release_stored = [&] {
      if (stored_slot < 0) return;
      if (warp == 0 && lane == 0) cute::tma_store_wait<0>();
      release(stored_slot);
    };
    for (int round = 0; round < rounds; ++round) {
      const Round work = round_of<Traits>(p, round, warpgroup);
      const int tile = work.tile;
      if constexpr (Traits::kSharesTail) feed_forward.first = work.first, feed_forward.count = work.count;
      if (tile >= p.tiles) {
        feed_forward.skip();
        break;
      }
      int a_slot, x_slot;
      uint32_t slot = wait_slot(&a_slot);
      OperandA<Traits> a;
      float o[kChannels / 2];
      load_operand(a, slot);
      if (Traits::kXShared) release_stored();
      feed_forward.run(o, a, [&] {
        if (Traits::kARegisters) release(a_slot);
      });
      if constexpr (Traits::kXShared) {
        scale_output(o, tile);
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
      } else if (Traits::kSharesTail && work.shared) {
        const int rank = static_cast<int>(blockIdx.x) % 2;
        exchange_halves<kChannels>(o, slot, bar.peer_ready(warpgroup), bar.peer_sent(warpgroup), rank, warp * 32 + lane);
        finish_tile<kChannels / 2>(o, slot, tile, rank * (kChannels / 2));
      } else {
        finish_tile<kChannels>(o, slot, tile, 0);
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
  constexpr int kFixed = Traits::kFixedSlots;
  const FeedForwardLayout layout = feed_forward_layout<Traits>(
      kFixed > 0 ? FeedForwardRings{kFixed, kFixed, Traits::kLeastSlots} : FeedForwardRings{p.w1_slots, p.w2_slots, p.tile_slots}, p.chunks);
  const FeedForwardBarriers<Traits::kWarpgroups> bar{smem_address(smem + layout.barriers)};
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int rounds = rounds_of_block<Traits>(p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kBarriers; ++i) {
      const int group = i / kMaxSlots;
      const bool full = group < 2 + Traits::kWarpgroups, weights = group < 4 + Traits::kWarpgroups, peer = group == 4 + 2 * Traits::kWarpgroups;
      const int arrivals = full ? 1 : weights ? 4 * Traits::kWarpgroups : !peer || i % kMaxSlots < Traits::kWarpgroups ? 4 : 128;
      transaction_barrier(bar.at(group, i % kMaxSlots))->init(arrivals);
    }
    cutlass::arch::fence_barrier_init();
  }
  load_feed_forward_vectors<Traits>(p, smem, layout);
  __syncthreads();
  if (Traits::kSharesTail && p.shared) grid::cluster_barrier();  // the other block's barriers exist
  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) {
        produce_chunks<Traits>(p, w1_map, w2_map, smem, layout, bar, rounds);
      } else if (warp <= Traits::kWarpgroups) {
        const int consumer = warp - 1;
        produce_tiles<Traits>(p, a_map, x_map, smem + layout.slots + consumer * p.tile_slots * Traits::kSlotBytes, bar, consumer, rounds);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    const int consumer = warp / 4 - 1;
    const int tile_slots = kFixed > 0 ? Traits::kLeastSlots : p.tile_slots;
    FeedForwardConsumer<Traits> worker{p,
                                       bar,
                                       smem_address(smem + layout.slots) + consumer * tile_slots * Traits::kSlotBytes,
                                       smem_address(smem + layout.vectors),
                                       consumer,
                                       warp % 4,
                                       static_cast<int>(threadIdx.x % 32),
                                       {}};
    worker.run(smem_address(smem + layout.w1), smem_address(smem + layout.w2), smem_address(smem + layout.expand_bias), y_map, rounds);
  }
#endif
}

}  // namespace convfirst::block_fusion::sm90
