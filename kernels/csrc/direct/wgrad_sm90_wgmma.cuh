// The weight gradient on Hopper: dw[k, (r, s, c)] = sum over output pixels of dy[pixel, k] x[pixel's window, c].
//
//          pixels                       panels of 64 or 32 channels, each of a tap
//        +--------+                  +-------------------+   warpgroup 0
//  dy^T  | slices |   x, im2col      |  64 or 128        |   warpgroup 1 ...
//        | of 64  |  ------------->  |  filters each     |
//        +--------+                  +-------------------+
//
//   Both operands lie with pixels as rows, as they come from memory: wgmma transposes them (MN-major). x's windows are gathered by TMA's
//   im2col mode, one copy a panel. one block = a producer warpgroup (one thread at work) + consumer warpgroups, persistent.
//
//   what               where                                          written by       released when
//   dy, x slices       shared, ring of slots, swizzled panels         producer (TMA)   products done, per warp
//   sums               registers, kBands x kColumns / 2 a thread      wgmma            -
//   partial sums       global, two tiles a block, float32             consumer         the second launch
//   dw                 global                                         either launch    -
//
//   Whole rounds of tiles are made by one block each, all at the same pixels at the same time, so that these are in L2. The slices of the
//   tiles that are left are shared out evenly; the second launch adds the parts in the order of the pixels, so results repeat to the bit.
#pragma once

#include "common/launch.cuh"
#include "common/sm90_mn_major.cuh"
#include "tensor_map_sm90.h"
#include "wgrad_sm90.h"

namespace convfirst::direct::sm90 {

using namespace convfirst::sm90;

struct WgradParams {
  void* dw;
  float* partials;
  int64_t units;
  int sharers, splits, whole;
  int steps, tiles_n, panels_a_tap;
  int filters, channels, kernel_h, kernel_w, taps;
  int out_w, out_h, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

template <DType kDType>
using WgradElement = std::conditional_t<kDType == DType::kHalf, __half, __nv_bfloat16>;

// Some steps of a tile.
struct WgradPiece {
  int tile, first, steps;
};

// This block's number among the sharers. Where all tiles have as many parts, neighbours are at the same pixels of different tiles.
__device__ __forceinline__ int wgrad_sharer(const WgradParams& p) {
  const int block = blockIdx.x;
  if (p.splits == 0 || block >= p.sharers) return block;
  const int tiles = p.sharers / p.splits, split = block / tiles;
  return (block - split * tiles) * p.splits + split;
}

// function(piece) of a block's whole tiles and then of its share of the others.
template <class Function>
__device__ __forceinline__ void for_each_piece(const WgradParams& p, Function function) {
  WgradPiece piece{static_cast<int>(blockIdx.x), 0, p.steps};
  int left = -1;  // of the share; not begun
#pragma unroll 1
  while (true) {
    if (left < 0 && piece.tile >= p.whole) {
      const int sharer = wgrad_sharer(p);
      if (sharer >= p.sharers) return;
      const int64_t begin = wgrad_share(p.units, p.sharers, sharer);
      left = static_cast<int>(wgrad_share(p.units, p.sharers, sharer + 1) - begin);
      piece.tile = p.whole + static_cast<int>(begin / p.steps), piece.first = static_cast<int>(begin % p.steps);
    }
    if (left >= 0) {
      if (left == 0) return;
      piece.steps = min(left, p.steps - piece.first);
      left -= piece.steps;
    }
    function(piece);
    piece.first = 0, piece.tile += left < 0 ? gridDim.x : 1;
  }
}

// Where a sharer's part of a tile lies, the tile's first step counted among the shared ones: a share has at most one that began before it.
__device__ __forceinline__ int wgrad_part(const WgradParams& p, int sharer, int64_t tile_first) {
  return 2 * sharer + (wgrad_share(p.units, p.sharers, sharer) < tile_first);
}

// The first filter and panel of a tile.
template <class Traits>
struct WgradPlace {
  int filter, panel;
  __device__ __forceinline__ WgradPlace(const WgradParams& p, int tile) {
    const int tile_m = tile / p.tiles_n;
    filter = tile_m * Traits::kRows, panel = (tile - tile_m * p.tiles_n) * Traits::kPanels;
  }
};

// Of output pixels in order, 64 at a time: the window of the first.
struct WgradWindow {
  int n, out_p, out_q;
  __device__ __forceinline__ WgradWindow(const WgradParams& p, int step) {
    const int pixel = step * kWgradPixels, row = pixel / p.out_w;
    n = row / p.out_h, out_p = row - n * p.out_h, out_q = pixel - row * p.out_w;
  }
  __device__ __forceinline__ void advance(const WgradParams& p) {
    for (out_q += kWgradPixels; out_q >= p.out_w;) {
      out_q -= p.out_w;
      if (++out_p == p.out_h) out_p = 0, ++n;
    }
  }
};

// Taps and channels are found once a piece: fourteen divisions in every step took longer than its products.
template <class Traits>
__device__ void produce_wgrad(const WgradParams& p, const CUtensorMap& y_map, const CUtensorMap& x_map, char* smem, TransactionBarrier* full,
                              Barrier* empty) {
  int slot = 0;
  uint32_t phase = 1;  // the slots start empty
  for_each_piece(p, [&](const WgradPiece& piece) {
    const WgradPlace<Traits> place(p, piece.tile);
    uint32_t source[Traits::kPanels];  // the tap's column, its row << 8, the panel of its channels << 16
    int tap = place.panel / p.panels_a_tap, panel = place.panel - tap * p.panels_a_tap, r = tap / p.kernel_w, s = tap - r * p.kernel_w;
#pragma unroll
    for (int i = 0; i < Traits::kPanels; ++i) {
      // Past the last tap: zeros, as past the last channel.
      source[i] = r < p.kernel_h ? s * p.dilation_w | r * p.dilation_h << 8 | panel << 16 : p.panels_a_tap << 16;
      if (++panel < p.panels_a_tap) continue;
      panel = 0;
      if (++s == p.kernel_w) s = 0, ++r;
    }
    WgradWindow window(p, piece.first);
#pragma unroll 1
    for (int step = piece.first; step < piece.first + piece.steps; ++step, window.advance(p)) {
      const int h = window.out_p * p.stride_h - p.pad_h, w = window.out_q * p.stride_w - p.pad_w;
      empty[slot].wait(phase);
      full[slot].arrive_and_expect_tx(Traits::kSlotBytes);
      char* to = smem + slot * Traits::kSlotBytes;
#pragma unroll
      for (int i = 0; i < Traits::kRows / 64; ++i, to += kWgradPanelBytes) {
        cute::SM90_TMA_LOAD_2D::copy(&y_map, barrier_pointer(full + slot), kEvictNormal, to, place.filter + 64 * i, step * kWgradPixels);
      }
#pragma unroll
      for (int i = 0; i < Traits::kPanels; ++i, to += Traits::kXPanelBytes) {
        cute::SM90_TMA_LOAD_IM2COL_4D::copy(&x_map, barrier_pointer(full + slot), to, static_cast<int>(source[i] >> 16) * Traits::kPanel,
                                            w, h, window.n, static_cast<uint16_t>(source[i] & 0xff), static_cast<uint16_t>(source[i] >> 8 & 0xff));
      }
      if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
    }
  });
}

// Where column 0 of a panel goes in dw's rows, and how many channels from there on exist.
template <class Traits>
struct WgradColumns {
  int offset, left;
  __device__ __forceinline__ WgradColumns(const WgradParams& p, int panel) {
    const int tap = panel / p.panels_a_tap, c = (panel - tap * p.panels_a_tap) * Traits::kPanel;
    offset = tap * p.channels + c, left = tap < p.taps ? p.channels - c : 0;
  }
  __device__ __forceinline__ void advance(const WgradParams& p) {
    const int end = p.taps * p.channels;
    offset += min(left, Traits::kPanel), left -= Traits::kPanel;
    if (left <= 0) left = offset < end ? p.channels : 0;
  }
};

template <class Traits>
__device__ __forceinline__ void store_wgrad(const WgradParams& p, const WgradColumns<Traits>& columns, int k, int c, float low, float high) {
  using Element = WgradElement<Traits::kDType>;
  if (c >= columns.left || k >= p.filters) return;
  *reinterpret_cast<uint32_t*>(static_cast<Element*>(p.dw) + static_cast<int64_t>(k) * (p.taps * p.channels) + columns.offset + c) =
      pack2<Element>(low, high);
}

// Where a consumer thread's sums lie: quad q holds columns c, c + 1 of rows r and r + 8.
template <class Traits>
struct WgradQuad {
  int row, column;
  __device__ __forceinline__ WgradQuad(int thread, int quad)
      : row((thread / 128 * Traits::kBands + quad / (Traits::kColumns / 8)) * 64 + thread % 128 / 32 * 16 + thread % 32 / 4),
        column(quad % (Traits::kColumns / 8) * 8 + thread % 4 * 2) {}
};

template <class Traits>
struct WgradConsumer {
  using Element = WgradElement<Traits::kDType>;
  using Sums = float[Traits::kBands][Traits::kColumns / 2];
  const WgradParams& p;
  char* smem;
  TransactionBarrier* full;
  Barrier* empty;
  int thread;  // of the consumers
  int slot = 0, held = -1;  // next to wait for; read by the products in flight
  uint32_t phase = 0;

  __device__ __forceinline__ void release_held() {
    if (held >= 0 && thread % 32 == 0) empty[held].arrive();
    held = -1;
  }

  // Queues the next slice's products, waits until they are all that is in flight and releases the slice before.
  __device__ __forceinline__ void step(Sums& sums, bool accumulate) {
    constexpr int kRow = kWgradPixels / 4 * 2;  // a product of 16 pixels further, in bytes a channel
    full[slot].wait(phase);
    const uint32_t address = smem_address(smem) + slot * Traits::kSlotBytes;
    const uint64_t a = mn_descriptor<128>(address + __shfl_sync(0xffffffffu, thread / 128, 0) * Traits::kBands * kWgradPanelBytes, kWgradPanelBytes);
    const uint64_t b = mn_descriptor<2 * Traits::kPanel>(address + Traits::kXOffset, Traits::kXPanelBytes);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kWgradPixels / 16; ++k) {
#pragma unroll
      for (int i = 0; i < Traits::kBands; ++i) {
        wgmma_ss_major<Element, Traits::kColumns, Major::MN, Major::MN>(sums[i], a + ((i * kWgradPanelBytes + k * kRow * 64) >> 4),
                                                                        b + (k * kRow * Traits::kPanel >> 4), accumulate || k > 0);
      }
    }
    cute::warpgroup_commit_batch();
    const int issued = slot;
    if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
    cute::warpgroup_wait<1>();
    release_held();
    held = issued;
  }

  // Each thread's quads, so that a warp writes 512 bytes in a row.
  __device__ __forceinline__ void store_partial(const Sums& sums, int part) const {
    float4* to = reinterpret_cast<float4*>(p.partials) + static_cast<int64_t>(part) * (Traits::kQuads * Traits::kConsumers) + thread;
#pragma unroll
    for (int i = 0; i < Traits::kBands; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kColumns / 8; ++j, to += Traits::kConsumers) {
        __stcg(to, make_float4(sums[i][4 * j], sums[i][4 * j + 1], sums[i][4 * j + 2], sums[i][4 * j + 3]));
      }
    }
  }

  __device__ __forceinline__ void store(const Sums& sums, int tile) const {
    const WgradPlace<Traits> place(p, tile);
    int again;  // what follows from the thread's number is not kept in registers, of which the sums leave few
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(again));
    const WgradQuad<Traits> first(again - 128, 0);
#pragma unroll
    for (int i = 0; i < Traits::kBands; ++i) {
      WgradColumns<Traits> columns(p, place.panel);
      const int k = place.filter + 64 * i + first.row;
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel, columns.advance(p)) {
#pragma unroll
        for (int j = 0; j < Traits::kPanel / 8; ++j) {
          const float* quad = sums[i] + 4 * (panel * Traits::kPanel / 8 + j);
          store_wgrad(p, columns, k, first.column + 8 * j, quad[0], quad[1]);
          store_wgrad(p, columns, k + 8, first.column + 8 * j, quad[2], quad[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    for_each_piece(p, [&](const WgradPiece& piece) {
      Sums sums;
#pragma unroll 1
      for (int i = 0; i < piece.steps; ++i) step(sums, i > 0);
      cute::warpgroup_wait<0>();
#pragma unroll
      for (int i = 0; i < Traits::kBands; ++i) fence_operands(sums[i]);
      release_held();
      if (piece.steps == p.steps) {
        store(sums, piece.tile);
      } else {
        store_partial(sums, wgrad_part(p, wgrad_sharer(p), static_cast<int64_t>(piece.tile - p.whole) * p.steps));
      }
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
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kSlots; ++i) full[i].init(1), empty[i].init(4 * Traits::kWarpgroups);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();
  if (__shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) produce_wgrad<Traits>(p, y_map, x_map, smem, full, empty);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    WgradConsumer<Traits>{p, smem, full, empty, static_cast<int>(threadIdx.x) - 128}.run();
  }
#endif
}

// Blocks (tile, *) add up the parts of a shared tile in the order of the pixels, a thread its quad of each.
template <class Traits>
__global__ void __launch_bounds__(256) add_wgrad_sm90(const __grid_constant__ WgradParams p) {
  allow_next_launch();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.steps;
  const auto share = [&](int sharer) { return wgrad_share(p.units, p.sharers, sharer); };
  int sharer = static_cast<int>(first * p.sharers / p.units);  // the first that has a part
  while (share(sharer + 1) <= first) ++sharer;
  int last = min(static_cast<int>((first + p.steps) * p.sharers / p.units), p.sharers - 1);
  while (share(last) >= first + p.steps) --last;
  wait_for_previous_launch();
  if (sharer == last) return;  // made whole
  constexpr int kQuads = Traits::kQuads * Traits::kConsumers;
  const int index = blockIdx.y * 256 + threadIdx.x;
  const float4* parts = reinterpret_cast<const float4*>(p.partials) + index;
  float4 sum = __ldcg(parts + static_cast<int64_t>(wgrad_part(p, sharer, first)) * kQuads);
#pragma unroll 4
  while (++sharer <= last) {
    const float4 v = __ldcg(parts + static_cast<int64_t>(2 * sharer) * kQuads);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  const WgradQuad<Traits> at(index % Traits::kConsumers, index / Traits::kConsumers);
  const WgradPlace<Traits> place(p, p.whole + blockIdx.x);
  const WgradColumns<Traits> columns(p, place.panel + at.column / Traits::kPanel);
  store_wgrad(p, columns, place.filter + at.row, at.column % Traits::kPanel, sum.x, sum.y);
  store_wgrad(p, columns, place.filter + at.row + 8, at.column % Traits::kPanel, sum.z, sum.w);
}

template <class Traits>
int launch_wgrad_tile(const Problem& q, const Tensors& t, const WgradPlan& plan, void* workspace, cudaStream_t stream) {
  GemmProblem g{};
  g.batch = q.batch, g.height = q.height, g.width = q.width, g.channels = q.channels, g.out_h = q.out_h(), g.out_w = q.out_w();
  g.stride_h = q.stride_h, g.stride_w = q.stride_w, g.pad_h = q.pad_h, g.pad_w = q.pad_w, g.dtype = q.dtype;
  CUtensorMap x_map, y_map;
  if (!encode_im2col_map(&x_map, g, t.x, kWgradPixels, Traits::kPanel) ||
      !encode_tiled_map<2>(&y_map, q.dtype, t.y, {q.filters, q.out_pixels()}, {q.filters}, {64, kWgradPixels}, CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  WgradParams p{};
  p.dw = t.result, p.partials = static_cast<float*>(workspace), p.units = plan.units, p.sharers = plan.sharers, p.splits = plan.splits, p.whole = plan.whole;
  p.steps = plan.steps, p.tiles_n = plan.tiles_n, p.panels_a_tap = plan.panels_a_tap;
  p.filters = q.filters, p.channels = q.channels, p.kernel_h = q.kernel_h, p.kernel_w = q.kernel_w, p.taps = q.taps();
  p.out_w = q.out_w(), p.out_h = q.out_h(), p.stride_h = q.stride_h, p.stride_w = q.stride_w, p.pad_h = q.pad_h, p.pad_w = q.pad_w;
  p.dilation_h = q.dilation_h, p.dilation_w = q.dilation_w;
  const int error = start_dependent_kernel(&wgrad_sm90<Traits>, plan.grid, Traits::kThreads, Traits::kTile.shared_bytes(), stream, p, y_map, x_map);
  if (error != 0) return error;
  if (plan.units == 0) return 0;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.tiles_m * plan.tiles_n - plan.whole, Traits::kQuads * Traits::kConsumers / 256), config.blockDim = 256;
  config.stream = stream, config.attrs = &overlap, config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, &add_wgrad_sm90<Traits>, p));
}

}  // namespace convfirst::direct::sm90
