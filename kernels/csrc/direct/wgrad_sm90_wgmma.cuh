// The weight gradient on Hopper: dw[k, (r, s, c)] = sum over output pixels of dy[pixel, k] x[pixel's window, c].
//
//          pixels                       panels of 64 channels, each of a tap
//        +--------+                  +-------------------+   warpgroup 0
//  dy^T  | slices |   x, im2col      |    64 filters     |   warpgroup 1 ...
//        | of 64  |  ------------->  |    each           |
//        +--------+                  +-------------------+
//
//   Both operands lie with pixels as rows, as they come from memory: wgmma transposes them (MN-major). x's windows are gathered by TMA's
//   im2col mode, one copy a panel. one block = a producer warpgroup (one thread at work) + consumer warpgroups, persistent.
//
//   what               where                                          written by       released when
//   dy, x slices       shared, ring of slots, panels of 64 x 64       producer (TMA)   products done, per warp
//   sums               registers, kColumns / 2 a thread               wgmma            -
//   partial sums       global, two tiles a block, float32             consumer         the second launch
//   dw                 global                                         either launch    -
//
//   The slices of all tiles are shared out evenly. The second launch adds the parts of split tiles in the order of the pixels, so results
//   repeat to the bit.
#pragma once

#include "common/launch.cuh"
#include "common/sm90.cuh"
#include "tensor_map_sm90.h"
#include "wgrad_sm90.h"

namespace convfirst::direct::sm90 {

using namespace convfirst::sm90;

struct WgradParams {
  void* dw;
  float* partials;
  int64_t units;
  int steps, tiles_n, panels_a_tap;
  int filters, channels, kernel_w, taps;
  int out_w, out_hw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

template <DType kDType>
using WgradElement = std::conditional_t<kDType == DType::kHalf, __half, __nv_bfloat16>;

template <class Element, int N>
struct TransposedWgmma;
#define CONVFIRST_TRANSPOSED_WGMMA(N)                                                                                            \
  template <>                                                                                                                    \
  struct TransposedWgmma<__half, N>                                                                                              \
      : cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<cute::SM90::GMMA::Major::MN, cute::SM90::GMMA::Major::MN> {};             \
  template <>                                                                                                                    \
  struct TransposedWgmma<__nv_bfloat16, N>                                                                                       \
      : cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::MN, cute::SM90::GMMA::Major::MN> {};
CONVFIRST_TRANSPOSED_WGMMA(128)
CONVFIRST_TRANSPOSED_WGMMA(256)
#undef CONVFIRST_TRANSPOSED_WGMMA

template <class Element, int N, size_t... I>
__device__ __forceinline__ void transposed_wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, std::index_sequence<I...>) {
  TransposedWgmma<Element, N>::fma(a, b, d[I]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

// A block's share: pieces of tiles, each of some steps.
struct WgradPiece {
  int tile, first, steps;
};

template <class Function>
__device__ __forceinline__ void for_each_piece(const WgradParams& p, Function function) {
  const int64_t begin = wgrad_share(p.units, gridDim.x, blockIdx.x);
  int left = static_cast<int>(wgrad_share(p.units, gridDim.x, blockIdx.x + 1) - begin);
  WgradPiece piece{static_cast<int>(begin / p.steps), static_cast<int>(begin % p.steps), 0};
#pragma unroll 1
  while (left > 0) {
    piece.steps = min(left, p.steps - piece.first);
    function(piece);
    left -= piece.steps;
    piece.first = 0, ++piece.tile;
  }
}

template <class Traits>
__device__ void produce_wgrad(const WgradParams& p, const CUtensorMap& y_map, const CUtensorMap& x_map, char* smem, TransactionBarrier* full,
                              Barrier* empty) {
  int slot = 0;
  uint32_t phase = 1;
  for_each_piece(p, [&](const WgradPiece& piece) {
    const int tile_m = piece.tile / p.tiles_n, first_panel = (piece.tile - tile_m * p.tiles_n) * Traits::kPanels;
#pragma unroll 1
    for (int step = piece.first; step < piece.first + piece.steps; ++step) {
      const int pixel = step * kWgradPixels, n = pixel / p.out_hw, pq = pixel - n * p.out_hw, out_p = pq / p.out_w, out_q = pq - out_p * p.out_w;
      const int h = out_p * p.stride_h - p.pad_h, w = out_q * p.stride_w - p.pad_w;
      empty[slot].wait(phase);
      full[slot].arrive_and_expect_tx(Traits::kSlotBytes);
      char* to = smem + slot * Traits::kSlotBytes;
#pragma unroll 1
      for (int i = 0; i < Traits::kWarpgroups; ++i, to += kWgradPanelBytes) {
        cute::SM90_TMA_LOAD_2D::copy(&y_map, barrier_pointer(full + slot), kEvictNormal, to, tile_m * Traits::kRows + 64 * i, pixel);
      }
#pragma unroll 1
      for (int i = 0; i < Traits::kPanels; ++i, to += kWgradPanelBytes) {
        const int panel = first_panel + i, tap = panel / p.panels_a_tap, r = tap / p.kernel_w, s = tap - r * p.kernel_w;
        const bool valid = tap < p.taps;  // past the last tap: zeros, as past the last channel
        cute::SM90_TMA_LOAD_IM2COL_4D::copy(&x_map, barrier_pointer(full + slot), to, valid ? (panel - tap * p.panels_a_tap) * 64 : p.channels, w, h,
                                            n, static_cast<uint16_t>(valid ? s * p.dilation_w : 0), static_cast<uint16_t>(valid ? r * p.dilation_h : 0));
      }
      if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
    }
  });
}

// Of output pixels in order, 64 at a time: the window of the first.
struct WgradWindow {
  int n, out_p, out_q;
  __device__ __forceinline__ WgradWindow(const WgradParams& p, int step) {
    const int pixel = step * kWgradPixels, pq = pixel % p.out_hw;
    n = pixel / p.out_hw, out_p = pq / p.out_w, out_q = pq % p.out_w;
  }
  __device__ __forceinline__ void advance(const WgradParams& p, int out_h) {
    for (out_q += kWgradPixels; out_q >= p.out_w;) {
      out_q -= p.out_w;
      if (++out_p == out_h) out_p = 0, ++n;
    }
  }
};

template <class Traits>
__device__ void produce_wgrad_ahead(const WgradParams& p, const CUtensorMap& y_map, const CUtensorMap& x_map, char* smem, TransactionBarrier* full,
                              Barrier* empty) {
  int slot = 0;
  uint32_t phase = 1;
  const int out_h = p.out_hw / p.out_w;
  for_each_piece(p, [&](const WgradPiece& piece) {
    const int tile_m = piece.tile / p.tiles_n, first_panel = (piece.tile - tile_m * p.tiles_n) * Traits::kPanels;
    int channel[Traits::kPanels];
    uint32_t offset[Traits::kPanels];  // of the tap: column, row << 16
#pragma unroll
    for (int i = 0; i < Traits::kPanels; ++i) {
      const int panel = first_panel + i, tap = panel / p.panels_a_tap, r = tap / p.kernel_w, s = tap - r * p.kernel_w;
      const bool valid = tap < p.taps;  // past the last tap: zeros, as past the last channel
      channel[i] = valid ? (panel - tap * p.panels_a_tap) * 64 : p.channels;
      offset[i] = valid ? s * p.dilation_w | r * p.dilation_h << 16 : 0;
    }
    WgradWindow window(p, piece.first);
#pragma unroll 1
    for (int step = piece.first; step < piece.first + piece.steps; ++step, window.advance(p, out_h)) {
      const int h = window.out_p * p.stride_h - p.pad_h, w = window.out_q * p.stride_w - p.pad_w;
      empty[slot].wait(phase);
      full[slot].arrive_and_expect_tx(Traits::kSlotBytes);
      char* to = smem + slot * Traits::kSlotBytes;
#pragma unroll
      for (int i = 0; i < Traits::kWarpgroups; ++i, to += kWgradPanelBytes) {
        cute::SM90_TMA_LOAD_2D::copy(&y_map, barrier_pointer(full + slot), kEvictNormal, to, tile_m * Traits::kRows + 64 * i, step * kWgradPixels);
      }
#pragma unroll
      for (int i = 0; i < Traits::kPanels; ++i, to += kWgradPanelBytes) {
        cute::SM90_TMA_LOAD_IM2COL_4D::copy(&x_map, barrier_pointer(full + slot), to, channel[i], w, h, window.n,
                                            static_cast<uint16_t>(offset[i] & 0xffff), static_cast<uint16_t>(offset[i] >> 16));
      }
      if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
    }
  });
}

template <class Traits>
struct WgradConsumer {
  using Element = WgradElement<Traits::kDType>;
  using Sums = float[Traits::kColumns / 2];
  const WgradParams& p;
  char* smem;
  TransactionBarrier* full;
  Barrier* empty;
  int warpgroup, warp, lane;
  int slot = 0, held = -1;
  uint32_t phase = 0;

  __device__ __forceinline__ void release_held() {
    if (held >= 0 && lane == 0) empty[held].arrive();
    held = -1;
  }

  __device__ __forceinline__ void step(Sums& sums, bool accumulate) {
    // Rows of 128 bytes, eight of them a swizzled group; panels of 64 columns follow one another.
    constexpr uint64_t kHigh = (uint64_t(kWgradPanelBytes >> 4) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
    full[slot].wait(phase);
    const uint32_t address = smem_address(smem) + slot * Traits::kSlotBytes;
    const uint64_t a = kHigh | (((address + warpgroup * kWgradPanelBytes) & 0x3FFFF) >> 4);
    const uint64_t b = kHigh | (((address + Traits::kWarpgroups * kWgradPanelBytes) & 0x3FFFF) >> 4);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kWgradPixels / 16; ++k) {
      transposed_wgmma<Element, Traits::kColumns>(sums, a + 128 * k, b + 128 * k, accumulate || k > 0, std::make_index_sequence<Traits::kColumns / 2>{});
    }
    cute::warpgroup_commit_batch();
    const int issued = slot;
    if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
    cute::warpgroup_wait<1>();
    release_held();
    held = issued;
  }

  // This thread has columns 8 j + 2 (lane % 4) + i of two rows r, at 4 j + 2 r + i.
  __device__ __forceinline__ void store_partial(const Sums& sums, float* tile) const {
    float* to = tile + (warpgroup * 64 + warp * 16 + lane / 4) * Traits::kColumns + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < Traits::kColumns / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        *reinterpret_cast<float2*>(to + r * 8 * Traits::kColumns + 8 * j) = make_float2(sums[4 * j + 2 * r], sums[4 * j + 2 * r + 1]);
      }
    }
  }

  __device__ __forceinline__ void store(const Sums& sums, int tile) const {
    const int tile_m = tile / p.tiles_n, first_panel = (tile - tile_m * p.tiles_n) * Traits::kPanels;
    const int row = tile_m * Traits::kRows + warpgroup * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      const int tap = (first_panel + panel) / p.panels_a_tap, first_c = (first_panel + panel - tap * p.panels_a_tap) * 64 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int i = 4 * (8 * panel + j) + 2 * r, c = first_c + 8 * j;
          if (tap >= p.taps || c >= p.channels || row + 8 * r >= p.filters) continue;
          *reinterpret_cast<uint32_t*>(static_cast<Element*>(p.dw) + (static_cast<int64_t>(row + 8 * r) * p.taps + tap) * p.channels + c) =
              pack2<Element>(sums[i], sums[i + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    int part = 2 * blockIdx.x;
    for_each_piece(p, [&](const WgradPiece& piece) {
      Sums sums;
#pragma unroll 1
      for (int i = 0; i < piece.steps; ++i) step(sums, i > 0);
      cute::warpgroup_wait<0>();
      fence_operands(sums);
      release_held();
      if (piece.steps == p.steps) {
        store(sums, piece.tile);
      } else {
        store_partial(sums, p.partials + static_cast<int64_t>(part) * Traits::kRows * Traits::kColumns);
      }
      part = 2 * blockIdx.x + 1;
    });
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    wgrad_sm90(const __grid_constant__ WgradParams p, const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  TransactionBarrier* full = reinterpret_cast<TransactionBarrier*>(smem + Traits::kBarrierOffset);
  Barrier* empty = reinterpret_cast<Barrier*>(full + Traits::kSlots);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kSlots; ++i) full[i].init(1), empty[i].init(4 * Traits::kWarpgroups);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) {
      if constexpr (Traits::kAhead) {
        produce_wgrad_ahead<Traits>(p, y_map, x_map, smem, full, empty);
      } else {
        produce_wgrad<Traits>(p, y_map, x_map, smem, full, empty);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    WgradConsumer<Traits>{p, smem, full, empty, warp / 4 - 1, warp % 4, lane}.run();
  }
#endif
}

// Blocks (b, *) add up the tile that share b + 1 begins within, unless an earlier share does too; a thread has two neighbours.
template <class Traits>
__global__ void __launch_bounds__(256) add_wgrad_sm90(const __grid_constant__ WgradParams p, int blocks) {
  wait_for_previous_launch();
  allow_next_launch();
  constexpr int kTile = Traits::kRows * Traits::kColumns;
  const int64_t begin = wgrad_share(p.units, blocks, blockIdx.x + 1), tile = begin / p.steps, first = tile * p.steps;
  if (begin == first || begin >= p.units || wgrad_share(p.units, blocks, blockIdx.x) > first) return;
  const int at = (blockIdx.y * 256 + threadIdx.x) * 2, row = at / Traits::kColumns, column = at - row * Traits::kColumns;
  float2 sum{0.f, 0.f};
  for (int block = blockIdx.x; block < blocks; ++block) {
    const int64_t share = wgrad_share(p.units, blocks, block);
    if (share >= first + p.steps) break;
    const float2 v = __ldcg(reinterpret_cast<const float2*>(p.partials + (2 * static_cast<int64_t>(block) + (share < first)) * kTile + at));
    sum.x += v.x, sum.y += v.y;
  }
  const int tile_m = static_cast<int>(tile / p.tiles_n), panel = static_cast<int>(tile - static_cast<int64_t>(tile_m) * p.tiles_n) * Traits::kPanels + column / 64;
  const int tap = panel / p.panels_a_tap, c = (panel - tap * p.panels_a_tap) * 64 + column % 64, k = tile_m * Traits::kRows + row;
  if (tap >= p.taps || c >= p.channels || k >= p.filters) return;
  using Element = WgradElement<Traits::kDType>;
  *reinterpret_cast<uint32_t*>(static_cast<Element*>(p.dw) + (static_cast<int64_t>(k) * p.taps + tap) * p.channels + c) = pack2<Element>(sum.x, sum.y);
}

template <class Traits>
int launch_wgrad_tile(const Problem& q, const Tensors& t, const WgradPlan& plan, void* workspace, cudaStream_t stream) {
  GemmProblem g{};
  g.batch = q.batch, g.height = q.height, g.width = q.width, g.channels = q.channels, g.out_h = q.out_h(), g.out_w = q.out_w();
  g.stride_h = q.stride_h, g.stride_w = q.stride_w, g.pad_h = q.pad_h, g.pad_w = q.pad_w, g.dtype = q.dtype;
  CUtensorMap x_map, y_map;
  if (!encode_im2col_map(&x_map, g, t.x, kWgradPixels, 64) ||
      !encode_tiled_map<2>(&y_map, q.dtype, t.y, {q.filters, q.out_pixels()}, {q.filters}, {64, kWgradPixels}, CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  WgradParams p{};
  p.dw = t.result, p.partials = static_cast<float*>(workspace), p.units = plan.units;
  p.steps = plan.steps, p.tiles_n = plan.tiles_n, p.panels_a_tap = plan.panels_a_tap;
  p.filters = q.filters, p.channels = q.channels, p.kernel_w = q.kernel_w, p.taps = q.taps();
  p.out_w = q.out_w(), p.out_hw = q.out_h() * q.out_w(), p.stride_h = q.stride_h, p.stride_w = q.stride_w, p.pad_h = q.pad_h, p.pad_w = q.pad_w;
  p.dilation_h = q.dilation_h, p.dilation_w = q.dilation_w;
  if (const int error = start_dependent_kernel(&wgrad_sm90<Traits>, plan.grid, Traits::kThreads, Traits::kTile.shared_bytes(), stream, p, y_map, x_map)) {
    return error;
  }
  if (plan.grid == 1) return 0;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid - 1, Traits::kRows * Traits::kColumns / 512), config.blockDim = 256, config.stream = stream;
  config.attrs = &overlap, config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, &add_wgrad_sm90<WgradTraits<Traits::kDType, Traits::kTileIndex>>, p, plan.grid));
}

template <DType kDType, bool kAhead>
int launch_wgrad_dtype(const Problem& q, const Tensors& t, const WgradPlan& plan, void* workspace, cudaStream_t stream) {
  static_assert(kWgradTileCount == 2);
  return plan.tile == 0 ? launch_wgrad_tile<WgradTraits<kDType, 0, kAhead>>(q, t, plan, workspace, stream)
                        : launch_wgrad_tile<WgradTraits<kDType, 1, kAhead>>(q, t, plan, workspace, stream);
}

template <DType kDType, bool kAhead>
const void* wgrad_kernel_dtype(int tile) {
  return tile == 0 ? reinterpret_cast<const void*>(&wgrad_sm90<WgradTraits<kDType, 0, kAhead>>)
                   : reinterpret_cast<const void*>(&wgrad_sm90<WgradTraits<kDType, 1, kAhead>>);
}

}  // namespace convfirst::direct::sm90
