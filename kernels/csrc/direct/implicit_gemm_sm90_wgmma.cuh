// Direct convolution on Hopper: an implicit matrix product, A gathered by TMA's im2col mode, warp-group products, fused epilogue.
//
//           depth = taps x channels          filters
//          +--------+                    +-------------+   warpgroup 0
//   pixels |   A    |   W [filters,      |  64 pixels  |   warpgroup 1     y = act(A W^T + bias)
//  (n,p,q) | slices |    taps, channels] |  each       |   warpgroup 2
//          +--------+  --------------->  +-------------+
//
//   one block = a producer warpgroup (one thread at work) + consumer warpgroups, persistent over tiles. A is never in memory: TMA
//   walks the output pixels of a tile through x, stride by stride, row by row and image by image, at the offset of one tap, and
//   fills in the zeros of the padding. A slice is 64 deep: one panel of 64 channels of a tap, or two of 32, or four of 16, where
//   that wastes less (96 channels). With two sets of sums the epilogue of a tile runs between the first slices of the next.
//
//   what                     where                                       written by       released when
//   A, W slices of 64        shared, ring of slots, swizzled             producer (TMA)   products done, per warp
//   sums, then the result    registers, sets x bands x kColumns / 2      wgmma            -
//   output                   global, 16 bytes a thread                   consumer         -
//   bias                     shared, of the last tiles, float32          producer         no warp can still be in that tile
//
//   W's rows are permuted on their way into shared memory (by the tensor map), so that the 16 sums that a thread has of 32
//   columns, (row, 8 j + 2 q + i) for j < 4, i < 2 and its q = lane % 4, are the 8 neighbouring columns 8 q + 2 j + i of two rows.
//
//   kTransposed, the input gradient: filters lie with the depth as rows, as the forward pass has them, and wgmma transposes them (MN-major).
//   Their columns cannot be permuted on the way, so four lanes exchange their results.
#pragma once

#include "common/activation.cuh"
#include "common/sm90_mn_major.cuh"
#include "implicit_gemm_sm90.h"

namespace convfirst::direct::sm90 {

using namespace convfirst::sm90;

struct GemmParams {
  void* y;
  const float* bias;
  int pixels, filters;
  int steps, tiles, tiles_n;
  int out_w, out_hw, kernel_w, taps;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int channels, panel;
  int w_first, w_step_r, w_step_s;  // taps of transposed filters
  bool merged;                     // W's tensor map: depth is one dimension
  bool dense;                      // y's pixels lie one after another
  int y_stride_n, y_stride_p, y_stride_q;
  Activation activation;
};

template <class Traits>
using ElementOf = std::conditional_t<Traits::kDType == DType::kHalf, __half, __nv_bfloat16>;

struct GemmBarriers {
  TransactionBarrier* full;
  Barrier* empty;
  __device__ GemmBarriers(char* base, int slots)
      : full(reinterpret_cast<TransactionBarrier*>(base)), empty(reinterpret_cast<Barrier*>(full + slots)) {}
};

// ---------------------------------------------------------------------------------------------------------------------------
// Producer

// A panel of the depth: a tap and its first channel.
struct Panel {
  int tap = 0, r = 0, s = 0, c = 0;
  __device__ __forceinline__ void advance(const GemmParams& p) {
    if ((c += p.panel) < p.channels) return;
    c = 0, ++tap;
    if (++s == p.kernel_w) s = 0, ++r;
  }
};

template <class Traits>
struct GemmProducer {
  const GemmParams& p;
  const CUtensorMap& x_map;
  const CUtensorMap& w_map;
  char* smem;
  GemmBarriers& bar;

  __device__ __forceinline__ void load_transposed(TransactionBarrier* full, char* to, const Panel& at, int c, int column) const {
    const int tap = c < p.channels ? p.w_first + at.r * p.w_step_r + at.s * p.w_step_s : 0;
#pragma unroll
    for (int i = 0; i < Traits::kWPanels; ++i) {
      cute::SM90_TMA_LOAD_3D::copy(&w_map, barrier_pointer(full), kEvictLast, to + i * Traits::kWPanelBytes, column + i * 64, tap, c);
    }
  }

  // Past the last tap both operands are zeros: channels beyond the last.
  __device__ __forceinline__ void load_panel(TransactionBarrier* full, char* slot, int i, const Panel& at, int n, int h, int w, int column) const {
    const bool valid = at.tap < p.taps;
    const int c = valid ? at.c : p.channels, tap = valid ? at.tap : p.taps - 1;
    char* a = slot + i * Traits::kRows * p.panel * 2;
    cute::SM90_TMA_LOAD_IM2COL_4D::copy(&x_map, barrier_pointer(full), a, c, w, h, n, static_cast<uint16_t>(valid ? at.s * p.dilation_w : 0),
                                        static_cast<uint16_t>(valid ? at.r * p.dilation_h : 0));
    if constexpr (Traits::kTransposed) {
      load_transposed(full, slot + Traits::kABytes + i * p.panel * 128, at, valid ? c : p.channels, column);
      return;
    }
    char* b = slot + Traits::kABytes + i * Traits::kColumns * p.panel * 2;
    if (p.merged) {
      const int depth = valid ? tap * p.channels + c : p.taps * p.channels;
      cute::SM90_TMA_LOAD_5D::copy(&w_map, barrier_pointer(full), kEvictLast, b, depth, 0, 0, 0, column / 32);
    } else {
#pragma unroll 1
      for (int block = 0; block < Traits::kBlocks; ++block) {
        cute::SM90_TMA_LOAD_5D::copy(&w_map, barrier_pointer(full), kEvictLast, b + block * 32 * p.panel * 2, c, 0, column / 8 + 4 * block,
                                     0, tap);
      }
    }
  }

  __device__ void run() const {
    int slot = 0, buffer = 0;
    uint32_t phase = 1;  // the slots start empty
    const int panels = kDepth / p.panel;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      const int tile_row = tile / p.tiles_n, column = (tile - tile_row * p.tiles_n) * Traits::kColumns, row = tile_row * Traits::kRows;
      const int n = row / p.out_hw, pq = row - n * p.out_hw, out_p = pq / p.out_w, out_q = pq - out_p * p.out_w;
      const int h = out_p * p.stride_h - p.pad_h, w = out_q * p.stride_w - p.pad_w;
      Panel at;
#pragma unroll 1
      for (int step = 0; step < p.steps; ++step) {
        bar.empty[slot].wait(phase);
        TransactionBarrier* full = bar.full + slot;
        const int bytes = step == 0 && p.bias != nullptr ? min(Traits::kColumns, p.filters - column) * 4 : 0;
        full->arrive_and_expect_tx(Traits::kSlotBytes + bytes);
#pragma unroll 1
        for (int i = 0; i < panels; ++i) {
          load_panel(full, smem + slot * Traits::kSlotBytes, i, at, n, h, w, column);
          at.advance(p);
        }
        if (bytes > 0) bulk_load(p.bias + column, full, smem + Traits::kBiasOffset + buffer * Traits::kColumns * 4, bytes);
        if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
      }
      buffer = (buffer + 1) % kBiasBuffers;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------
// Consumer

// Where this thread's results of a tile go: element offsets of two rows a band, negative past the last pixel.
template <int kBands>
struct GemmResult {
  int offset[kBands][2];
  int columns_left;  // from this thread's first on
  int buffer;        // of the tile's bias
};

// Matrix descriptors of a slot: the same for all of them but for the address.
struct OperandLayout {
  uint64_t high;       // stride and swizzle
  int a[4], b[4];      // of each product of 16 deep, in units of 16 bytes
  __device__ OperandLayout(int panel, int rows, int columns) {
    const uint64_t swizzle = panel == 64 ? 1 : panel == 32 ? 2 : 3;
    high = (uint64_t(1) << 16) | (static_cast<uint64_t>(panel * 2 * 8 >> 4) << 32) | (swizzle << 62);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int which = k * 16 / panel, within = (k * 16 - which * panel) * 2;
      a[k] = (which * rows * panel * 2 + within) >> 4;
      b[k] = (which * columns * panel * 2 + within) >> 4;
    }
  }
};

template <class Traits>
struct GemmConsumer {
  using Element = ElementOf<Traits>;
  using Sums = float[Traits::kBands][Traits::kColumns / 2];
  using Result = GemmResult<Traits::kBands>;
  const GemmParams& p;
  const OperandLayout layout;
  char* smem;
  GemmBarriers& bar;
  int warpgroup, warp, lane;
  int slot = 0, held = -1;  // next to wait for; read by the products in flight
  uint32_t phase = 0;
  bool ready = false;       // the next slot is known to be full

  __device__ __forceinline__ void release_held() {
    if (held >= 0 && lane == 0) bar.empty[held].arrive();
    held = -1;
  }
  __device__ __forceinline__ void advance() {
    if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
  }

  // Queues the next slice's products, waits until they are all that is in flight and releases the slice before.
  __device__ __forceinline__ void step(Sums& sums, bool accumulate) {
    if (!ready) bar.full[slot].wait(phase);
    const uint32_t address = smem_address(smem) + slot * Traits::kSlotBytes;
    const uint64_t a = layout.high | ((address & 0x3FFFF) >> 4) ;
    const uint64_t w = Traits::kTransposed ? mn_descriptor<128>(address + Traits::kABytes, Traits::kWPanelBytes)
                                           : layout.high | (((address + Traits::kABytes) & 0x3FFFF) >> 4);
    const int band = 64 * p.panel * 2 >> 4;
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
      for (int i = 0; i < Traits::kBands; ++i) {
        const uint64_t a_k = a + (warpgroup * Traits::kBands + i) * band + layout.a[k];
        if constexpr (Traits::kTransposed) {
          wgmma_ss_major<Element, Traits::kColumns, Major::K, Major::MN>(sums[i], a_k, w + (k * 16 * 128 >> 4), accumulate || k > 0);
        } else {
          wgmma_ss<Element, Traits::kColumns>(sums[i], a_k, w + layout.b[k], accumulate || k > 0);
        }
      }
    }
    cute::warpgroup_commit_batch();
    const int issued = slot;
    advance();
    cute::warpgroup_wait<1>();
    release_held();
    held = issued;
    ready = bar.full[slot].test_wait(phase);
  }

  __device__ __forceinline__ void multiply(Sums& sums, int first_step) {
#pragma unroll 1
    for (int i = first_step; i < p.steps; ++i) step(sums, i > 0);
  }

  __device__ __forceinline__ void complete(Sums& sums) {
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int i = 0; i < Traits::kBands; ++i) fence_operands(sums[i]);
    release_held();
  }

  // The biases of eight neighbouring columns, this thread's of 32-column block `block`.
  __device__ __forceinline__ void load_bias(float (&v)[8], int buffer, int block) const {
    const uint32_t address = smem_address(smem) + Traits::kBiasOffset + (buffer * Traits::kColumns + lane % 4 * 8 + 32 * block) * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 loaded = load_shared_128(address + 16 * i);
      v[4 * i] = __uint_as_float(loaded.x), v[4 * i + 1] = __uint_as_float(loaded.y);
      v[4 * i + 2] = __uint_as_float(loaded.z), v[4 * i + 3] = __uint_as_float(loaded.w);
    }
  }

  __device__ __forceinline__ float activate(float v) const {
    if (p.activation == Activation::kNone) return v;
    if (p.activation == Activation::kRelu) return relu(v);
    return p.activation == Activation::kSilu ? silu(v) : gelu(v);
  }

  // Four lanes with pairs 8 j + 2 lane, + 1 for j < 4 of a row's 32 columns: each gets the four of columns 8 lane to 8 lane + 7.
  __device__ __forceinline__ void exchange(uint32_t (&v)[4]) const {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
      const bool upper = lane & distance;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int low = distance == 1 ? 2 * i : i, high = low + distance;
        const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? v[low] : v[high], distance);
        (upper ? v[low] : v[high]) = received;
      }
    }
  }

  __device__ __forceinline__ void store_transposed(const float* s, const Result& result, int band, int block) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = pack2<Element>(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
      exchange(v);
      if (result.offset[band][r] < 0 || 32 * block >= result.columns_left) continue;
      *reinterpret_cast<uint4*>(static_cast<Element*>(p.y) + result.offset[band][r] + 32 * block) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }

  // 32 columns. This thread has sums of 8 neighbouring columns 2 j + i of two rows r, at 4 j + 2 r + i.
  __device__ __forceinline__ void store_block(const float* sums, const Result& result, int band, int block) const {
    const float* s = sums + 16 * block;
    if constexpr (Traits::kTransposed) return store_transposed(s, result, band, block);
    float bias[8];
    load_bias(bias, result.buffer, block);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = pack2<Element>(activate(s[4 * j + 2 * r] + bias[2 * j]), activate(s[4 * j + 2 * r + 1] + bias[2 * j + 1]));
      if (result.offset[band][r] < 0 || 32 * block >= result.columns_left) continue;
      *reinterpret_cast<uint4*>(static_cast<Element*>(p.y) + result.offset[band][r] + 32 * block) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }

  // A tile's products with the epilogue of the tile before, which is complete when the first slice is queued, a block a slice.
  __device__ __forceinline__ void multiply_under_epilogue(Sums& sums, Sums& done, const Result& result) {
#pragma unroll
    for (int block = 0; block < Traits::kBlocks; ++block) {
      step(sums, block > 0);
      if (block == 0) fence_operands(done[0]);
      store_block(done[0], result, 0, block);
    }
    multiply(sums, Traits::kBlocks);
  }

  __device__ __forceinline__ int offset_of(int row) const {
    if (row >= p.pixels) return -1;
    if (p.dense) return row * p.filters;
    const int n = row / p.out_hw, pq = row - n * p.out_hw, out_p = pq / p.out_w, out_q = pq - out_p * p.out_w;
    return n * p.y_stride_n + out_p * p.y_stride_p + out_q * p.y_stride_q;
  }

  __device__ __forceinline__ Result result_of(int tile, int index) const {
    const int tile_row = tile / p.tiles_n, column = (tile - tile_row * p.tiles_n) * Traits::kColumns + lane % 4 * 8;
    Result result;
    result.columns_left = p.filters - column;
    result.buffer = index % kBiasBuffers;
#pragma unroll
    for (int i = 0; i < Traits::kBands; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int offset = offset_of(tile_row * Traits::kRows + (warpgroup * Traits::kBands + i) * 64 + warp * 16 + lane / 4 + 8 * r);
        result.offset[i][r] = offset < 0 ? offset : offset + column;
      }
    }
    return result;
  }

  __device__ __forceinline__ void finish(Sums& sums, const Result& result) {
    complete(sums);
#pragma unroll
    for (int i = 0; i < Traits::kBands; ++i) {
#pragma unroll
      for (int block = 0; block < Traits::kBlocks; ++block) store_block(sums[i], result, i, block);
    }
  }

  __device__ __forceinline__ void run_two_sets() {
    const int tiles = (p.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
    Sums sums[2];
    Result result = result_of(blockIdx.x, 0);
    multiply(sums[0], 0);
    const auto next = [&](Sums& current, Sums& done, int i) {
      multiply_under_epilogue(current, done, result);
      result = result_of(blockIdx.x + i * gridDim.x, i);
    };
    int i = 1;
#pragma unroll 1
    for (; i + 1 < tiles; i += 2) {
      next(sums[1], sums[0], i);
      next(sums[0], sums[1], i + 1);
    }
    if (i < tiles) {
      next(sums[1], sums[0], i);
      finish(sums[1], result);
    } else {
      finish(sums[0], result);
    }
  }

  __device__ __forceinline__ void run_one_set() {
    int index = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, ++index) {
      Sums sums;
      multiply(sums, 0);
      finish(sums, result_of(tile, index));
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    implicit_gemm_sm90(const __grid_constant__ GemmParams p, const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  GemmBarriers bar(smem + Traits::kBarrierOffset, Traits::kSlots);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&w_map));
    for (int i = 0; i < Traits::kSlots; ++i) bar.full[i].init(1), bar.empty[i].init(4 * Traits::kWarpgroups);
    cutlass::arch::fence_barrier_init();
  }
  if (p.bias == nullptr) {
    float* bias = reinterpret_cast<float*>(smem + Traits::kBiasOffset);
    for (int i = threadIdx.x; i < kBiasBuffers * Traits::kColumns; i += Traits::kThreads) bias[i] = 0.f;
  }
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) GemmProducer<Traits>{p, x_map, w_map, smem, bar}.run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    GemmConsumer<Traits> consumer{p, OperandLayout(p.panel, Traits::kRows, Traits::kColumns), smem, bar, warp / 4 - 1, warp % 4, lane};
    if constexpr (Traits::kSets == 2) {
      consumer.run_two_sets();
    } else {
      consumer.run_one_set();
    }
  }
#endif
}

}  // namespace convfirst::direct::sm90
