// The gradients of both matrices of the feed-forward half on Hopper, summed over pixels: dW1 = dS^T A and, before layer scale, dW2^T = H^T dy.
//
//   one block = 64 or 128 hidden units, a range of pixel tiles; a producer warpgroup (warp 0: TMA, warp 1: column sums of dy) + two consumer
//   warpgroups. A consumer's 64 hidden units are the rows of its products, a tile's 64 pixels first their columns, then what they sum over:
//
//     W1 chunk   [64 hidden x C] -- S^T = W1 A^T --+-- act  --> H^T  [64 x 64] -- dW2^T += H^T dy
//     W2 chunk^T [64 hidden x C] -- D^T = W2^T dy^T +-- act' --> dS^T [64 x 64] -- dW1   += dS^T A
//
//   what                       where                                               written by          released when
//   W1, W2 chunks              shared, for good; 64 channels: registers            TMA                 -
//   A, dy tiles                shared, ring of stages: rows of both products       TMA                 sums done, per tile
//   S^T, D^T, H^T, dS^T        32, 32, 16, 16 registers                            wgmma, activation   -
//   dW1, dW2^T                 C/2 registers each; beyond 128 channels one a       wgmma               -
//                              warpgroup, which then compute S^T both
//   partial sums               global, float32, one set a range of pixels          consumer            launch_backward_reduce
#pragma once

#include "../common/grid_sm90.cuh"
#include "../common/sm90_mn_major.cuh"
#include "activation_bwd_sm90.cuh"
#include "feed_forward_bwd_data_sm90_wgmma.cuh"
#include "feed_forward_bwd_tile_sm90.h"

namespace convfirst::block_fusion::sm90 {

struct BackwardWeightsParams {
  const float *bias, *pixel_scale;
  float *d_expand_weight, *d_project_weight;  // [splits, hidden, channels]
  float *d_expand_bias;                       // [splits, hidden]
  float *d_project_bias;                      // [splits * groups, channels]
  int channels, hidden, tiles, groups, splits;
};

template <class Traits>
struct BackwardWeightsBarriers {
  static constexpr int kWeights = 0, kFull = 1, kEmpty = kFull + kMaxSlots, kCount = kEmpty + kMaxSlots;
  uint32_t base;  // address in shared memory
  __device__ __forceinline__ uint32_t weights() const { return base; }
  __device__ __forceinline__ uint32_t full(int slot) const { return base + (kFull + slot) * 8; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return base + (kEmpty + slot) * 8; }
};

struct BackwardShare {
  int group, split, first, end;  // tiles
};

__device__ __forceinline__ BackwardShare backward_share(const BackwardWeightsParams& p) {
  const int group = blockIdx.x % p.groups, split = blockIdx.x / p.groups;
  return {group, split, static_cast<int>(static_cast<int64_t>(p.tiles) * split / p.splits),
          static_cast<int>(static_cast<int64_t>(p.tiles) * (split + 1) / p.splits)};
}

template <class Traits>
__device__ void produce_backward_stages(const BackwardWeightsParams& p, const BackwardShare& share, const CUtensorMap& a_map,
                                        const CUtensorMap& dy_map, const CUtensorMap& w1_map, const CUtensorMap& w2_map, char* smem,
                                        BackwardWeightsBarriers<Traits> bar) {
  TransactionBarrier* weights = transaction_barrier(bar.weights());
  weights->arrive_and_expect_tx(Traits::kWeightBytes);
  for (int g = 0; g < Traits::kHiddenGroups; ++g) {
    char* to = smem + g * 2 * Traits::kTileBytes;
    const int hidden = (share.group * Traits::kHiddenGroups + g) * 64;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      tma_load_2d(&w1_map, weights, to + panel * Traits::kPanelBytes, panel * Traits::kPanel, hidden);
    }
    tma_load_2d(&w2_map, weights, to + Traits::kTileBytes, hidden, 0);
  }
  BackwardRing<Traits::kStages> ring;
  for (int tile = share.first; tile < share.end; ++tile) {
    wait_barrier(bar.empty(ring.slot), ring.phase ^ 1);  // the slots start empty
    TransactionBarrier* full = transaction_barrier(bar.full(ring.slot));
    full->arrive_and_expect_tx(Traits::kStageBytes + (p.pixel_scale != nullptr ? Traits::kScaleBytes : 0));
    char* to = smem + Traits::kStagesOffset + ring.slot * Traits::kStageBytes;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      const int offset = panel * Traits::kPanelBytes;
      tma_load_2d(&a_map, full, to + offset, panel * Traits::kPanel, tile * kTilePixels, kEvictNormal);
      tma_load_2d(&dy_map, full, to + Traits::kTileBytes + offset, panel * Traits::kPanel, tile * kTilePixels, kEvictNormal);
    }
    if (p.pixel_scale != nullptr) {
      bulk_load(p.pixel_scale + tile * kTilePixels, full, smem + Traits::kScaleOffset + ring.slot * Traits::kScaleBytes, Traits::kScaleBytes);
    }
    ring.advance();
  }
}

// Column sums of dy: each block of a range of pixels has every groups-th tile. One warp.
template <class Traits>
__device__ void sum_columns(const BackwardWeightsParams& p, const BackwardShare& share, char* smem, BackwardWeightsBarriers<Traits> bar, int lane) {
  using Element = ElementOf<Traits>;
  constexpr int kPairs = Traits::kPanel / 2, kRows = 32 / kPairs;  // of a panel; rows that the warp has at once
  float2 sums[Traits::kPanels];
#pragma unroll
  for (int panel = 0; panel < Traits::kPanels; ++panel) sums[panel] = make_float2(0.f, 0.f);
  const int pair = lane % kPairs;
  BackwardRing<Traits::kStages> ring;
  int turn = share.group;  // tiles until the next of this block
#pragma unroll 1
  for (int tile = share.first; tile < share.end; ++tile, ring.advance()) {
    wait_barrier(bar.full(ring.slot), ring.phase);
    if (turn-- == 0) {
      turn = p.groups - 1;
      const uint32_t dy = bar.base - Traits::kBarrierOffset + Traits::kStagesOffset + ring.slot * Traits::kStageBytes + Traits::kTileBytes;
      const uint32_t scales = bar.base - Traits::kBarrierOffset + Traits::kScaleOffset + ring.slot * Traits::kScaleBytes;
#pragma unroll 2
      for (int row = lane / kPairs; row < 64; row += kRows) {
        const float scale = p.pixel_scale != nullptr ? __uint_as_float(load_shared_32(scales + row * 4)) : 1.f;
        const uint32_t offset = swizzle<Traits::kRowBytes>(row * Traits::kRowBytes + pair * 4);
#pragma unroll
        for (int panel = 0; panel < Traits::kPanels; ++panel) {
          const float2 v = unpack2<Element>(load_shared_32(dy + panel * Traits::kPanelBytes + offset));
          sums[panel].x = fmaf(v.x, scale, sums[panel].x), sums[panel].y = fmaf(v.y, scale, sums[panel].y);
        }
      }
    }
    __syncwarp();
    if (lane == 0) arrive_barrier(bar.empty(ring.slot));
  }
#pragma unroll
  for (int panel = 0; panel < Traits::kPanels; ++panel) {
    if (kRows == 2) {
      sums[panel].x += __shfl_xor_sync(0xffffffffu, sums[panel].x, 16);
      sums[panel].y += __shfl_xor_sync(0xffffffffu, sums[panel].y, 16);
    }
    const int channel = panel * Traits::kPanel + 2 * pair;
    if (lane < kPairs && channel < p.channels) {
      *reinterpret_cast<float2*>(p.d_project_bias + static_cast<int64_t>(blockIdx.x) * p.channels + channel) = sums[panel];
    }
  }
}

// kExpand: sums dW1 and db1; kProject: sums dW2^T.
template <class Traits, bool kExpand, bool kProject>
struct BackwardWeightsConsumer {
  using Element = ElementOf<Traits>;
  using Sums = float[32];
  using Operand = uint32_t[16];
  using Output = float[Traits::kChannels / 2];
  static constexpr int kStepsPerPanel = Traits::kPanel / 16;
  const BackwardWeightsParams& p;
  const BackwardWeightsBarriers<Traits> bar;
  uint32_t weights, stages, scales;  // addresses
  int warp, lane;
  BackwardRing<Traits::kStages> ring;  // next to wait for
  uint32_t w1_fragments[Traits::kOperandRegisters ? Traits::kChannels / 4 : 1];
  uint32_t w2_fragments[Traits::kOperandRegisters ? Traits::kChannels / 4 : 1];

  __device__ __forceinline__ void load_operands() {
    if constexpr (Traits::kOperandRegisters) {
#pragma unroll
      for (int k = 0; k < Traits::kChannels / 16; ++k) {
        constexpr int kBlocks = Traits::kPanel / 8;
        const int row = warp * 16 + (lane & 15), j = 2 * k;
        ldmatrix_x4(*reinterpret_cast<uint32_t(*)[4]>(w1_fragments + 4 * k),
                    weights + j / kBlocks * Traits::kPanelBytes +
                        (swizzle<Traits::kRowBytes>(row * Traits::kRowBytes) ^ ((j % kBlocks + (lane >> 4)) << 4)));
        const int channel = 16 * k + (lane >> 4) * 8 + lane % 8, hidden = warp * 16 + (lane >> 3) % 2 * 8;
        grid::ldmatrix_x4_transposed(*reinterpret_cast<uint32_t(*)[4]>(w2_fragments + 4 * k),
                                     weights + Traits::kTileBytes + swizzle<128>(channel * 128 + hidden * 2));
      }
    }
  }

  __device__ __forceinline__ void issue_first(Sums& s, Sums& d, uint32_t stage) {
    uint32_t chunk = weights;
    asm volatile("" : "+r"(chunk));  // else every k's descriptor is computed ahead of the loop, and spilled
    const uint64_t w1 = matrix_descriptor<Traits::kRowBytes>(chunk), x = matrix_descriptor<Traits::kRowBytes>(stage);
    const uint64_t w2 = mn_descriptor<128>(chunk + Traits::kTileBytes, Traits::kTileBytes);
    const uint64_t dy = matrix_descriptor<Traits::kRowBytes>(stage + Traits::kTileBytes);
    fence_operands(s);
    if constexpr (kExpand) fence_operands(d);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < Traits::kChannels / 16; ++k) {
      const int offset = k / kStepsPerPanel * (Traits::kPanelBytes / 16) + k % kStepsPerPanel * 2;
      if constexpr (Traits::kOperandRegisters) {
        wgmma_rs<Element, 64>(s, w1_fragments + 4 * k, x + offset, k > 0);
      } else {
        wgmma_ss<Element, 64>(s, w1 + offset, x + offset, k > 0);
      }
    }
    if constexpr (kExpand) {
#pragma unroll
      for (int k = 0; k < Traits::kChannels / 16; ++k) {
        const int offset = k / kStepsPerPanel * (Traits::kPanelBytes / 16) + k % kStepsPerPanel * 2;
        if constexpr (Traits::kOperandRegisters) {
          wgmma_rs<Element, 64>(d, w2_fragments + 4 * k, dy + offset, k > 0);
        } else {
          wgmma_ss_major<Element, 64, Major::MN, Major::K>(d, w2 + k * 128, dy + offset, k > 0);
        }
      }
    }
    cute::warpgroup_commit_batch();
  }

  // The sums over pixels 16 k of a tile, for the k of part `part`.
  __device__ __forceinline__ void issue_sums(Output& expand, Output& project, const Operand& ds, const Operand& h, uint32_t stage,
                                             int part) const {
    constexpr int kSteps = 4 / Traits::kParts;
    cute::warpgroup_arrive();
    if constexpr (kExpand) {
      const uint64_t x = mn_descriptor<Traits::kRowBytes>(stage, Traits::kPanelBytes);
#pragma unroll
      for (int k = kSteps * part; k < kSteps * (part + 1); ++k) {
        wgmma_rs_mn<Element, Traits::kChannels>(expand, ds + 4 * k, x + k * Traits::kRowBytes, true);
      }
    }
    if constexpr (kProject) {
      const uint64_t dy = mn_descriptor<Traits::kRowBytes>(stage + Traits::kTileBytes, Traits::kPanelBytes);
#pragma unroll
      for (int k = kSteps * part; k < kSteps * (part + 1); ++k) {
        wgmma_rs_mn<Element, Traits::kChannels>(project, h + 4 * k, dy + k * Traits::kRowBytes, true);
      }
    }
    cute::warpgroup_commit_batch();
  }

  // h = act(s + bias), ds = 2 act'(s + bias) d, both times the pixels' sample scale; ds is summed up too.
  __device__ __forceinline__ void activate(const Sums& s, const Sums& d, Operand& h, Operand& ds, const float (&bias)[2], float (&bias_sum)[2],
                                           int slot, int part) const {
    constexpr int kCount = 32 / Traits::kParts;
    float hidden[kCount], gradient[kCount];
    const int first = kCount * part;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float slope;
      activate_with_slope<Traits::kActivation>(s[first + i], bias[i / 2 % 2], hidden[i], slope);
      if constexpr (kExpand) gradient[i] = fmaf(slope, d[first + i], d[first + i]);
    }
    if (p.pixel_scale != nullptr) {
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        const float2 scale = load_shared_float2(scales + slot * Traits::kScaleBytes + (8 * (first / 4 + j) + 2 * (lane % 4)) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          hidden[4 * j + i] *= i % 2 ? scale.y : scale.x;
          if constexpr (kExpand) gradient[4 * j + i] *= i % 2 ? scale.y : scale.x;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      if constexpr (kExpand) {
        bias_sum[i / 2 % 2] += gradient[i] + gradient[i + 1];
        ds[(first + i) / 2] = pack2<Element>(gradient[i], gradient[i + 1]);
      }
      if constexpr (kProject) h[(first + i) / 2] = pack2<Element>(hidden[i], hidden[i + 1]);
    }
  }

  __device__ __forceinline__ void store(const Output& sums, float* part, int row) const {
    const int left = p.channels - 2 * (lane % 4);
    float2* to = reinterpret_cast<float2*>(part + static_cast<int64_t>(row) * p.channels + 2 * (lane % 4));
#pragma unroll
    for (int r = 0; r < 2; ++r, to += 4 * p.channels) {
#pragma unroll
      for (int j = 0; j < Traits::kChannels / 8; ++j) {
        if (8 * j < left) to[4 * j] = make_float2(sums[4 * j + 2 * r], sums[4 * j + 2 * r + 1]);
      }
    }
  }

  __device__ __forceinline__ void release(int slot) const {
    if (lane == 0) arrive_barrier(bar.empty(slot));
  }

  // Hidden units past the last: the block's other consumer still counts on this one's releases.
  __device__ void skip(int tiles) {
    for (; tiles > 0; --tiles, ring.advance()) {
      wait_barrier(bar.full(ring.slot), ring.phase);
      release(ring.slot);
    }
  }

  // `tiles` of them; `hidden`: the first of this warpgroup's units.
  __device__ __forceinline__ void run(int tiles, int hidden) {
    if (hidden >= p.hidden) return skip(tiles);
    float bias[2], bias_sum[2] = {0.f, 0.f};
#pragma unroll
    for (int r = 0; r < 2; ++r) bias[r] = __ldg(p.bias + hidden + warp * 16 + lane / 4 + 8 * r);
    Output expand, project;  // cleared: a first product that overwrites them would cost a register to tell it from the others
#pragma unroll
    for (int i = 0; i < Traits::kChannels / 2; ++i) expand[i] = 0.f, project[i] = 0.f;
    Sums s, d;
    Operand h, ds;
    if constexpr (kExpand) fence_operands(expand);
    if constexpr (kProject) fence_operands(project);
    const auto first = [&] {
      wait_barrier(bar.full(ring.slot), ring.phase);
      issue_first(s, d, stages + ring.slot * Traits::kStageBytes);
    };
    const auto sums = [&] {
      cute::warpgroup_wait<0>();
      fence_operands(s);
      if constexpr (kExpand) fence_operands(d), fence_operands(ds);
      if constexpr (kProject) fence_operands(h);
#pragma unroll
      for (int part = 0; part < Traits::kParts; ++part) {
        activate(s, d, h, ds, bias, bias_sum, ring.slot, part);
        issue_sums(expand, project, ds, h, stages + ring.slot * Traits::kStageBytes, part);
      }
    };
    wait_barrier(bar.weights(), 0);
    load_operands();
    first();
#pragma unroll 1
    while (--tiles > 0) {
      sums();
      if constexpr (Traits::ahead(kExpand, kProject)) {
        ring.advance();
        first();
        cute::warpgroup_wait<1>();  // sums done, the next tile's first products in flight
        release(ring.before());
      } else {
        cute::warpgroup_wait<0>();
        release(ring.slot);
        ring.advance();
        first();
      }
    }
    sums();
    cute::warpgroup_wait<0>();
    if constexpr (kExpand) fence_operands(expand);
    if constexpr (kProject) fence_operands(project);
    const int row = hidden + warp * 16 + lane / 4;
    const int64_t part = static_cast<int64_t>(backward_share(p).split) * p.hidden;
    if constexpr (kExpand) {
      store(expand, p.d_expand_weight + part * p.channels, row);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        bias_sum[r] += __shfl_xor_sync(0xffffffffu, bias_sum[r], 1);
        bias_sum[r] += __shfl_xor_sync(0xffffffffu, bias_sum[r], 2);
        if (lane % 4 == 0) p.d_expand_bias[part + row + 8 * r] = bias_sum[r];
      }
    }
    if constexpr (kProject) store(project, p.d_project_weight + part * p.channels, row);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    feed_forward_bwd_weights_sm90(const __grid_constant__ BackwardWeightsParams p, const __grid_constant__ CUtensorMap a_map,
                                  const __grid_constant__ CUtensorMap dy_map, const __grid_constant__ CUtensorMap w1_map,
                                  const __grid_constant__ CUtensorMap w2_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  using Barriers = BackwardWeightsBarriers<Traits>;
  const Barriers bar{smem_address(smem + Traits::kBarrierOffset)};
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const BackwardShare share = backward_share(p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Barriers::kCount; ++i) {
      transaction_barrier(bar.base + i * 8)->init(i >= Barriers::kEmpty ? 4 * Traits::kWarpgroups + 1 : 1);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) produce_backward_stages<Traits>(p, share, a_map, dy_map, w1_map, w2_map, smem, bar);
    if (warp == 1) sum_columns<Traits>(p, share, smem, bar, lane);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    const int consumer = warp / 4 - 1;
    const uint32_t base = smem_address(smem), stages = base + Traits::kStagesOffset, scales = base + Traits::kScaleOffset;
    const int tiles = share.end - share.first;
    if constexpr (Traits::kSplit) {
      if (consumer == 0) {
        BackwardWeightsConsumer<Traits, true, false>{p, bar, base, stages, scales, warp % 4, lane, {}, {}, {}}.run(tiles, share.group * 64);
      } else {
        BackwardWeightsConsumer<Traits, false, true>{p, bar, base, stages, scales, warp % 4, lane, {}, {}, {}}.run(tiles, share.group * 64);
      }
    } else {
      const uint32_t weights = base + consumer * 2 * Traits::kTileBytes;
      BackwardWeightsConsumer<Traits, true, true>{p, bar, weights, stages, scales, warp % 4, lane, {}, {}, {}}.run(
          tiles, share.group * 128 + consumer * 64);
    }
  }
#endif
}

}  // namespace convfirst::block_fusion::sm90
