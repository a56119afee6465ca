// First layers (RGB) on Hopper: x is rearranged once, and the tensor cores read overlapping windows of it in shared memory.
//
//   x, one row of the image          rearranged, stride 4, 3 channels             A of a warp-group product: 64 output pixels
//   +--+--+--+--+--+--+--+--+--      plane 0 |01|45|89|..                 q = 0   |chunk i|chunk i + 1|
//   |0 |1 |2 |3 |4 |5 |6 |7 |..  ->  plane 1 |23|67|ab|..             ->  q = 1   16 bytes further on
//   +--+--+--+--+--+--+--+--+--      (two pixels of 4 values, the                 ...
//                                     fourth zero, are a chunk of 16 bytes)
//
//   The windows of neighbouring output pixels lie 16 bytes apart, so 8 of them are one 128-byte core matrix of a matrix descriptor
//   without swizzle: what im2col would write, the descriptor reads. The depth is kernel_h rows of row_chunks chunks.
//
//   A first launch rearranges x, padding included, so that what a tile needs lies in one piece, halves shared by neighbours twice.
//   Of the second one block = 4 consumer warpgroups + a warp that copies, persistent over tiles of `rows` x 64 output pixels, all filters of
//   a group. A warpgroup computes every fourth row of the tile, from the first product to the store.
//
//   what              where                                          written by                 released when
//   filters           shared, [chunk][filter][8], for good           all threads                -
//   x                 shared, two buffers, [row][plane][place][8]    one bulk copy a tile       products done, per warp
//   sums              registers, kColumns / 2                        wgmma                      -
//   output            global, 16 bytes a thread                      consumer                   -
//
//   Filters are permuted in shared memory as in implicit_gemm_sm90_wgmma.cuh, so that a thread has 8 neighbouring ones.
#pragma once

#include "common/activation.cuh"
#include "common/sm90.cuh"
#include "first_layer_sm90.h"

namespace convfirst::direct::sm90 {

using namespace convfirst::sm90;

struct FirstParams {
  const uint16_t* x;
  uint4* rearranged;
  const uint16_t* weight;
  const float* bias;
  void* y;
  FirstLayout layout;
  int height, width, channels, filters, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, out_h, out_w;
  int tiles, column_tiles, tiles_p, tiles_q;
  int padded_rows;
  int64_t chunks;  // of all of x, rearranged
  Activation activation;
};

template <class Traits>
using FirstElement = std::conditional_t<Traits::kDType == DType::kHalf, __half, __nv_bfloat16>;

struct FirstBarriers {
  TransactionBarrier* full;
  Barrier* empty;
};

struct FirstTile {
  int n, p, q;
  __device__ __forceinline__ FirstTile(const FirstParams& params, int index) {
    q = index % params.tiles_q * 64;
    index /= params.tiles_q;
    p = index % params.tiles_p * params.layout.rows;
    n = index / params.tiles_p;
  }
};

// The 8 values of a chunk: which pixel and channel each of them is.
struct ChunkValues {
  int offset[8];     // from the chunk's first pixel in memory
  uint32_t present;  // bit v: the channel exists
  int shift;         // log2 of a pixel's channels in shared memory
  __device__ __forceinline__ ChunkValues(int pixel_channels, int channels) : present(0), shift(pixel_channels == 8 ? 3 : 2) {
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      const int c = v & (pixel_channels - 1);
      offset[v] = (v >> shift) * channels + c;
      if (c < channels) present |= 1u << v;
    }
  }
};

__device__ __forceinline__ uint4 pack_chunk(const uint16_t (&v)[8]) {
  const auto pair = [&](int i) { return v[2 * i] | static_cast<uint32_t>(v[2 * i + 1]) << 16; };
  return make_uint4(pair(0), pair(1), pair(2), pair(3));
}

template <int kColumns>
__device__ void load_filters(const FirstParams& p, uint32_t weights, int first_filter) {
  const FirstLayout& l = p.layout;
  const ChunkValues values(l.pixel_channels, p.channels);
  const int chunks = p.kernel_h * l.row_chunks;
#pragma unroll 2
  for (int i = threadIdx.x; i < chunks * kColumns; i += kFirstThreads) {
    const int column = i / chunks, chunk = i - column * chunks, r = chunk / l.row_chunks, first_s = (chunk - r * l.row_chunks) * (8 >> values.shift);
    // 32 b + 8 q + 2 j + k lies at 32 b + 8 j + 2 q + k.
    const int filter = first_filter + (column & ~31) + ((column >> 1) & 3) * 8 + ((column >> 3) & 3) * 2 + (column & 1);
    const uint16_t* from = p.weight + (static_cast<int64_t>(filter) * p.kernel_h + r) * p.kernel_w * p.channels + first_s * p.channels;
    uint16_t v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const bool valid = (values.present >> e & 1) && first_s + (e >> values.shift) < p.kernel_w && filter < p.filters;
      v[e] = valid ? __ldg(from + values.offset[e]) : uint16_t{0};
    }
    const uint4 packed = pack_chunk(v);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(weights + chunk * first_chunk_bytes(kColumns) + column * 16), "r"(packed.x),
                 "r"(packed.y), "r"(packed.z), "r"(packed.w)
                 : "memory");
  }
}

// Two pixels of three channels that begin at element `first`, the fourth of each zero. Words of two elements: half the loads, at either parity.
__device__ __forceinline__ uint4 load_two_rgb(const uint16_t* x, int64_t first) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(x) + (first >> 1);
  const uint32_t a = __ldg(words), b = __ldg(words + 1), c = __ldg(words + 2);
  if (first & 1) return make_uint4(__byte_perm(a, b, 0x5432), b >> 16, c, __ldg(reinterpret_cast<const uint16_t*>(words + 3)));
  return make_uint4(a, b & 0xffffu, __byte_perm(b, c, 0x5432), c >> 16);
}

// One chunk a thread; what lies outside the image becomes zero. kChannels: 3, the usual case, or 0 for any.
template <int kChannels>
__global__ void __launch_bounds__(256) rearrange_sm90(const __grid_constant__ FirstParams p) {
  wait_for_previous_launch();
  allow_next_launch();
  const uint32_t index = blockIdx.x * 256 + threadIdx.x;  // fewer than x has elements, 2^31
  if (index >= p.chunks) return;
  const FirstLayout& l = p.layout;
  const int channels = kChannels > 0 ? kChannels : p.channels;
  const uint32_t line = index / static_cast<uint32_t>(l.pitch), place = index - line * l.pitch;
  const uint32_t plane_shift = 31 - __clz(l.planes), padded_row = line >> plane_shift, plane = line & (l.planes - 1);
  const uint32_t strip = padded_row / p.padded_rows, row = padded_row - strip * p.padded_rows, n = strip / p.tiles_q;
  const ChunkValues values(l.pixel_channels, channels);
  const int h = static_cast<int>(row) - p.pad_h;
  const int w = static_cast<int>((strip - n * p.tiles_q) * 64 * p.stride_w + ((place << plane_shift) + plane) * (8 >> values.shift)) - p.pad_w;
  const int64_t first = ((static_cast<int64_t>(n) * p.height + h) * p.width + w) * channels;
  const bool inside = h >= 0 && h < p.height;
  if (kChannels == 3 && values.shift == 2 && inside && w >= 0 && w + 1 < p.width) {
    p.rearranged[index] = load_two_rgb(p.x, first);
    return;
  }
  uint16_t v[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int pixel = w + (e >> values.shift);
    v[e] = inside && (values.present >> e & 1) && pixel >= 0 && pixel < p.width ? __ldg(p.x + first + values.offset[e]) : uint16_t{0};
  }
  p.rearranged[index] = pack_chunk(v);
}

template <class Traits>
struct FirstConsumer {
  static constexpr int kColumns = Traits::kColumns;
  using Element = FirstElement<Traits>;
  const FirstParams& p;
  uint32_t weights;
  int warpgroup, warp, lane, first_filter;

  static __device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t chunk_stride) {
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(chunk_stride >> 4) << 16) | (uint64_t(128 >> 4) << 32);
  }

  // One row of 64 output pixels; `window` is where the first one's window begins.
  __device__ __forceinline__ void multiply(float (&sums)[kColumns / 2], uint32_t window) const {
    const FirstLayout& l = p.layout;
    const uint32_t plane_bytes = l.pitch * 16;
    uint64_t a_row = descriptor(window, l.planes == 1 ? 16 : plane_bytes);
    uint64_t b = descriptor(weights, first_chunk_bytes(kColumns));
    const int even = l.planes == 1 ? 2 : l.planes == 2 ? 1 : 0, odd_planes = l.planes == 4 ? 2 * plane_bytes >> 4 : 0;
    const int pairs = l.row_chunks / 2, steps = p.kernel_h * pairs;
    int i = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, b += 2 * first_chunk_bytes(kColumns) >> 4) {
      const uint32_t offset = l.planes == 4 ? (i & 1) * odd_planes + (i >> 1) : i * even;
      cute::warpgroup_arrive();
      wgmma_ss<Element, kColumns>(sums, a_row + offset, b, step > 0);
      cute::warpgroup_commit_batch();
      if (++i == pairs) i = 0, a_row += l.row_bytes() >> 4;
    }
    cute::warpgroup_wait<0>();
    fence_operands(sums);
  }

  __device__ __forceinline__ float activate(float v) const {
    if (p.activation == Activation::kNone) return v;
    if (p.activation == Activation::kRelu) return relu(v);
    return p.activation == Activation::kSilu ? silu(v) : gelu(v);
  }

  __device__ __forceinline__ void store(const float (&sums)[kColumns / 2], const FirstTile& tile, int row) const {
#pragma unroll
    for (int block = 0; block < kColumns / 32; ++block) {
      const int filter = first_filter + 32 * block + lane % 4 * 8;
      if (filter >= p.filters) continue;
      float bias[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) bias[i] = p.bias == nullptr ? 0.f : __ldg(p.bias + filter + i);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int q = tile.q + warp * 16 + lane / 4 + 8 * r;
        uint32_t v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* s = sums + 16 * block + 4 * j + 2 * r;
          v[j] = pack2<Element>(activate(s[0] + bias[2 * j]), activate(s[1] + bias[2 * j + 1]));
        }
        if (q >= p.out_w) continue;
        const int64_t offset = ((static_cast<int64_t>(tile.n) * p.out_h + tile.p + row) * p.out_w + q) * p.filters + filter;
        *reinterpret_cast<uint4*>(static_cast<Element*>(p.y) + offset) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }

  __device__ __forceinline__ void run(const FirstBarriers& bar, uint32_t buffers, int first, int step) const {
    int index = 0;
#pragma unroll 1
    for (int i = first; i < p.tiles; i += step, ++index) {
      const FirstTile tile(p, i);
      const uint32_t buffer = buffers + (index & 1) * p.layout.buffer_bytes();
      bar.full[index & 1].wait(index >> 1 & 1);
      float sums[kColumns / 2];
      int row = warpgroup;
      const int rows = min(p.layout.rows, p.out_h - tile.p);
#pragma unroll 1
      for (; row < rows; row += kFirstWarpgroups) {
        multiply(sums, buffer + row * p.stride_h * p.layout.row_bytes());
        if (row + kFirstWarpgroups >= rows && lane == 0) bar.empty[index & 1].arrive();  // the buffer is no more needed
        store(sums, tile, row);
      }
      if (warpgroup >= rows && lane == 0) bar.empty[index & 1].arrive();
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(kFirstThreads, 1) first_layer_sm90(const __grid_constant__ FirstParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  const FirstBarriers bar{reinterpret_cast<TransactionBarrier*>(smem), reinterpret_cast<Barrier*>(smem) + 2};
  const uint32_t buffers = smem_address(smem) + kFirstFixedBytes, weights = buffers + 2 * p.layout.buffer_bytes();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) bar.full[i].init(1), bar.empty[i].init(4 * kFirstWarpgroups);
    cutlass::arch::fence_barrier_init();
  }
  const int first_filter = blockIdx.x % p.column_tiles * Traits::kColumns, first = blockIdx.x / p.column_tiles, step = gridDim.x / p.column_tiles;
  wait_for_previous_launch();
  allow_next_launch();
  load_filters<Traits::kColumns>(p, weights, first_filter);
  fence_async_proxy();
  __syncthreads();
  if (warp == 4 * kFirstWarpgroups) {
    if (lane != 0) return;
    const uint32_t bytes = p.layout.buffer_bytes();
    int index = 0;
    for (int i = first; i < p.tiles; i += step, ++index) {
      const FirstTile tile(p, i);
      const int64_t row = (static_cast<int64_t>(tile.n) * p.tiles_q + tile.q / 64) * p.padded_rows + tile.p * p.stride_h;
      TransactionBarrier* full = bar.full + (index & 1);
      bar.empty[index & 1].wait((index >> 1 & 1) ^ 1);
      full->arrive_and_expect_tx(bytes);
      bulk_load(reinterpret_cast<const char*>(p.rearranged) + row * p.layout.row_bytes(), full, smem + kFirstFixedBytes + (index & 1) * bytes, bytes);
    }
  } else {
    FirstConsumer<Traits>{p, weights, warp / 4, warp % 4, lane, first_filter}.run(bar, buffers, first, step);
  }
#endif
}

}  // namespace convfirst::direct::sm90
