// Direct convolution on any GPU from compute capability 8.0 on: an implicit matrix product with cp.async copies; tensor cores for
// 16-bit types (mma.sync), CUDA cores for float32 (true float32).
//
//            depth                      columns (filters)
//          +-------+                  +----------------+
//     128  |   A   |   B [128 x 64B]  | 8 warps:       |     16 bit: a warp has 64 x 32, in m16n8k16 products
//   pixels | 64 B  |  ------------->  | 128 x 128 sums |     float32: a thread has 8 x 8, rows and columns 16 apart
//          +-------+                  +----------------+
//
//   what              where                                                  written by     released when
//   A, B steps        shared, three stages, rows of 80 bytes                 cp.async       the barrier of the step after
//   sums              registers, 64 a thread                                 products       -
//   partial sums      global, two tiles a block, [sum][thread]               a split tile   the second launch
//   output            global                                                 either launch  -
//
//   All tiles' steps are shared out evenly (stream-K), so no multiprocessor idles in a last round; the second launch adds the parts of
//   split tiles in the order of the depth, so results repeat to the bit.
//
//   float32 sums in blocks, since the error of a sum in order grows with its length: with element-wise copies a second set of sums in
//   registers takes each step's, and of the input gradient every `block_steps` steps are added to the partial sums in device memory.
#pragma once

#include <type_traits>

#include "common/activation.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "implicit_gemm_sm80.h"

namespace convfirst::direct::sm80 {

template <DType kDType>
using ElementOf = std::conditional_t<kDType == DType::kFloat, float, std::conditional_t<kDType == DType::kHalf, __half, __nv_bfloat16>>;

// e^v, v <= 0, to three units of the last place: with fast math expf loses as many bits as v has before its point.
__device__ __forceinline__ float exp_of(float v) {
  const float whole = rintf(fmaxf(v, -87.f) * 1.44269504f);
  return exp2f(fmaf(v, 1.44269504f, -whole) + v * 1.92596299e-8f) * exp2f(whole);
}

__device__ __forceinline__ float logistic(float v) {
  const float e = exp_of(-fabsf(v));
  return __fdiv_rn(v < 0.f ? e : 1.f, 1.f + e);
}

// Of float32 as exact as PyTorch's; of 16-bit types as elsewhere.
template <class Element>
__device__ __forceinline__ float activate(float v, Activation activation) {
  if (activation == Activation::kNone) return v;
  if (activation == Activation::kRelu) return relu(v);
  if constexpr (std::is_same_v<Element, float>) {
    return activation == Activation::kSilu ? v * logistic(v) : 0.5f * v * (1.f + erff(v * 0.707106781f));
  } else {
    return activation == Activation::kSilu ? silu(v) : gelu(v);
  }
}

struct Pixel {
  int n, h, w;  // image, and the source's row and column of tap (0, 0), before the division
};

__device__ __forceinline__ Pixel pixel_of(const GemmParams& p, int64_t index) {
  const int area = p.grid_h * p.grid_w, n = static_cast<int>(index / area), rest = static_cast<int>(index - static_cast<int64_t>(n) * area);
  const int h = rest / p.grid_w, w = rest - h * p.grid_w;
  return {n, h * p.mul_h + p.off_h, w * p.mul_w + p.off_w};
}

// Offset of a source pixel in pixels, or -1 where there is none.
__device__ __forceinline__ int64_t source_pixel(const GemmParams& p, const Pixel& at, int r, int s) {
  int h = at.h + r * p.step_h, w = at.w + s * p.step_w;
  bool inside = h >= 0 && w >= 0;
  if (p.div_h > 1) inside = inside && h % p.div_h == 0, h /= p.div_h;
  if (p.div_w > 1) inside = inside && w % p.div_w == 0, w /= p.div_w;
  inside = inside && h < p.height && w < p.width;
  return inside ? (static_cast<int64_t>(at.n) * p.height + h) * p.width + w : -1;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Copies. A step of an operand is 128 rows of four chunks of 16 bytes; a thread brings two chunks of both.

// Registers are scarce in the float32 kernel: positions are packed, and what is outside is told by a position that never is inside.
template <class Element, bool kDivide>
struct VectorCopies {  // channels are a multiple of what 16 bytes hold
  static constexpr int kChunk = 16 / sizeof(Element), kStep = kDepthBytes / sizeof(Element);
  static constexpr int kOutside = -(1 << 14);
  const GemmParams& p;
  int image;     // offset of the image, in pixels
  int position;  // row << 16 | column & 0xffff of tap (0, 0)
  int b;         // offset of the column's row of B, -1 where there is none
  int depth, c, tap;  // of the first chunk; tap is r << 16 | s

  __device__ __forceinline__ VectorCopies(const GemmParams& params, int64_t first_row, int first_column, int first_step) : p(params) {
    depth = first_step * kStep + threadIdx.x % 2 * 2 * kChunk;
    const int index = depth / p.channels, r = index / p.kernel_w;
    c = depth - index * p.channels, tap = r << 16 | (index - r * p.kernel_w);
    const int column = first_column + threadIdx.x / 2;
    b = column < p.columns ? column * p.depth : -1;
    const int64_t row = first_row + threadIdx.x / 2;
    const Pixel at = pixel_of(p, min(row, p.rows - 1));
    image = at.n * p.height * p.width;
    position = (row < p.rows ? at.h : kOutside) << 16 | (at.w & 0xffff);
  }

  __device__ __forceinline__ int source_offset() const {
    int h = (position >> 16) + (tap >> 16) * p.step_h, w = static_cast<int16_t>(position) + (tap & 0xffff) * p.step_w;
    bool inside = h >= 0 && w >= 0;
    if constexpr (kDivide) {
      inside = inside && h % p.div_h == 0 && w % p.div_w == 0;
      h /= p.div_h, w /= p.div_w;
    }
    return inside && h < p.height && w < p.width ? image + h * p.width + w : -1;
  }

  __device__ __forceinline__ void next_tap() {
    if ((++tap & 0xffff) == p.kernel_w) tap = (tap & ~0xffff) + (1 << 16);
  }

  __device__ __forceinline__ void issue(uint32_t stage) {
    const uint32_t to = stage + threadIdx.x / 2 * kPitch + threadIdx.x % 2 * 32;
    const bool inside = depth < p.depth, b_valid = inside && b >= 0;
    const int at = source_offset();
    const bool valid = inside && at >= 0;
    const Element* from = static_cast<const Element*>(p.source) + (valid ? at * p.channels + c : 0);
    const Element* b_from = static_cast<const Element*>(p.matrix) + (b_valid ? b + depth : 0);
    ptx::cp_async16(to, from, valid);
    ptx::cp_async16(to + kRows * kPitch, b_from, b_valid);
    if (c + kChunk < p.channels) {
      ptx::cp_async16(to + 16, from + (valid ? kChunk : 0), valid);
      ptx::cp_async16(to + kRows * kPitch + 16, b_from + (b_valid ? kChunk : 0), b_valid);
      c += kStep;
    } else {  // the second chunk is of the next tap
      next_tap();
      const int next = source_offset();
      const bool next_inside = depth + kChunk < p.depth, next_valid = next_inside && next >= 0;
      ptx::cp_async16(to + 16, static_cast<const Element*>(p.source) + (next_valid ? next * p.channels : 0), next_valid);
      ptx::cp_async16(to + kRows * kPitch + 16, b_from + (b_valid && next_inside ? kChunk : 0), b_valid && next_inside);
      c += kStep - p.channels;
    }
    depth += kStep;
    while (c >= p.channels) {
      c -= p.channels;
      next_tap();
    }
  }
};

template <class Element>
struct ScalarCopies {  // any channels, and the weight gradient; element by element
  static constexpr int kChunk = 16 / sizeof(Element), kStep = kDepthBytes / sizeof(Element);
  const GemmParams& p;
  int64_t first_row;
  int first_column, depth;

  __device__ __forceinline__ ScalarCopies(const GemmParams& params, int64_t row, int column, int first_step)
      : p(params), first_row(row), first_column(column), depth(first_step * kStep) {}

  __device__ __forceinline__ const Element* a_element(int64_t row, int d) const {
    if (row >= p.rows || d >= p.depth) return nullptr;
    if (p.operands == Operands::kFilters) return static_cast<const Element*>(p.matrix) + static_cast<int64_t>(d) * p.rows + row;
    return source_element(row, d);
  }
  __device__ __forceinline__ const Element* b_element(int column, int d) const {
    if (column >= p.columns || d >= p.depth) return nullptr;
    if (p.operands == Operands::kFilters) return source_element(d, column);
    return static_cast<const Element*>(p.matrix) + static_cast<int64_t>(column) * p.depth + d;
  }
  __device__ __forceinline__ const Element* source_element(int64_t pixel, int tap_channel) const {
    const int tap = tap_channel / p.channels, c = tap_channel - tap * p.channels, r = tap / p.kernel_w, s = tap - r * p.kernel_w;
    const int64_t at = source_pixel(p, pixel_of(p, pixel), r, s);
    return at < 0 ? nullptr : static_cast<const Element*>(p.source) + at * p.channels + c;
  }

  template <class Address>
  static __device__ __forceinline__ void store(uint32_t to, const Address& address) {
    Element v[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const Element* from = address(i);
      v[i] = from == nullptr ? Element(0.f) : *from;
    }
    uint32_t words[4];
    memcpy(words, v, 16);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
  }

  __device__ __forceinline__ void issue(uint32_t stage) {
    // Of the weight gradient neighbouring threads take neighbouring rows, which lie together in memory.
    const bool filters = p.operands == Operands::kFilters;
    const int row = filters ? threadIdx.x % 64 : threadIdx.x / 4, chunk = filters ? threadIdx.x / 64 : threadIdx.x % 4;
    const uint32_t to = stage + row * kPitch + chunk * 16;
    const int d = depth + chunk * kChunk;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      store(to + i * 64 * kPitch, [&](int e) { return a_element(first_row + row + 64 * i, d + e); });
      store(to + (kRows + i * 64) * kPitch, [&](int e) { return b_element(first_column + row + 64 * i, d + e); });
    }
    depth += kStep;
  }
};

// ---------------------------------------------------------------------------------------------------------------------------
// Products: sums[i] of thread t belong to row row_of(i), column column_of(i) of the tile

template <class Element>
struct Products {  // tensor cores
  static constexpr bool kPairs = true;  // sums 2 i and 2 i + 1 are neighbours
  int warp_m, warp_n, lane;
  __device__ __forceinline__ Products() : warp_m(threadIdx.x / 32 % 2 * 64), warp_n(threadIdx.x / 64 * 32), lane(threadIdx.x % 32) {}

  // Sum ((i 4 + j) 4 + 2 h + k): band i of 16 rows, group j of 8 columns, row half h, neighbour k.
  __device__ __forceinline__ int row_of(int i) const { return warp_m + i / 16 * 16 + lane / 4 + (i / 2 % 2) * 8; }
  __device__ __forceinline__ int column_of(int i) const { return warp_n + i / 4 % 4 * 8 + lane % 4 * 2 + i % 2; }

  __device__ __forceinline__ void step(float (&sums)[kSums], uint32_t stage) const {
    const uint32_t a = stage + (warp_m + lane % 16) * kPitch + lane / 16 * 16;
    const uint32_t b = stage + (kRows + warp_n + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t a_regs[4][4], b_regs[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::ldmatrix_x4(a_regs[i], a + i * 16 * kPitch + k * 32);
#pragma unroll
      for (int j = 0; j < 2; ++j) ptx::ldmatrix_x4(b_regs[j], b + j * 16 * kPitch + k * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float(&d)[4] = *reinterpret_cast<float(*)[4]>(&sums[(i * 4 + j) * 4]);
          ptx::mma_16816<Element>(d, a_regs[i], b_regs[j / 2][j % 2 * 2], b_regs[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
};

template <>
struct Products<float> {  // CUDA cores
  static constexpr bool kPairs = false;
  int ty, tx;
  __device__ __forceinline__ Products() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    ty = warp % 4 * 4 + lane / 8, tx = warp / 4 * 8 + lane % 8;
  }
  __device__ __forceinline__ int row_of(int i) const { return ty + i / 8 * 16; }
  __device__ __forceinline__ int column_of(int i) const { return tx + i % 8 * 16; }

  static __device__ __forceinline__ float4 load(uint32_t address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
  }

  __device__ __forceinline__ void step(float (&sums)[kSums], uint32_t stage) const {
    const uint32_t a = stage + ty * kPitch, b = stage + (kRows + tx) * kPitch;
#pragma unroll 1  // unrolled, ptxas loads so far ahead that it spills
    for (int k = 0; k < 4; ++k) {
      float4 left[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) left[i] = load(a + i * 16 * kPitch + k * 16);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 right = load(b + j * 16 * kPitch + k * 16);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i * 8 + j] = fmaf(left[i].x, right.x, sums[i * 8 + j]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i * 8 + j] = fmaf(left[i].y, right.y, sums[i * 8 + j]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i * 8 + j] = fmaf(left[i].z, right.z, sums[i * 8 + j]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i * 8 + j] = fmaf(left[i].w, right.w, sums[i * 8 + j]);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------

template <class Element>
__device__ __forceinline__ void store_tile(const GemmParams& p, const float (&sums)[kSums], int64_t first_row, int first_column) {
  const Products<Element> products;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int64_t row = first_row + products.row_of(i);
    const int column = first_column + products.column_of(i);
    if (row >= p.rows || column >= p.columns) continue;
    const float v = activate<Element>(sums[i] + (p.bias == nullptr ? 0.f : __ldg(p.bias + column)), p.activation);
    static_cast<Element*>(p.result)[row * p.columns + column] = Element(v);
  }
}

// sums added to a thread's share of a partial tile, or put there by the first block of the depth.
__device__ __forceinline__ void flush(float (&sums)[kSums], float* partials, bool first) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    partials[i * kThreads] = first ? sums[i] : partials[i * kThreads] + sums[i];
    sums[i] = 0.f;
  }
}

// The products of a step; kTwoSets: summed apart first.
template <bool kTwoSets, class Element>
__device__ __forceinline__ void multiply_step(const Products<Element>& products, float (&sums)[kSums], uint32_t stage) {
  if constexpr (kTwoSets) {
    float block[kSums] = {};
    products.step(block, stage);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += block[i];
  } else {
    products.step(sums, stage);
  }
}

// Returns whether earlier blocks of the depth were added to `partials`.
template <class Element, bool kTwoSets, class Copies>
__device__ __forceinline__ bool accumulate(const GemmParams& p, float (&sums)[kSums], Copies copies, int steps, uint32_t smem, float* partials) {
  const Products<Element> products;
  int loaded = 0, left_of_block = p.block_steps;
  bool flushed = false;
#pragma unroll
  for (; loaded < kStages - 1; ++loaded) {
    if (loaded < steps) copies.issue(smem + loaded * kStageBytes);
    ptx::cp_async_commit();
  }
  uint32_t read = smem;
#pragma unroll 1
  for (; steps > 0; --steps) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the step's data are there, and the stage of the one before is free
    const bool first = read == smem, last = read == smem + (kStages - 1) * kStageBytes;
    if (steps >= kStages) copies.issue(first ? smem + (kStages - 1) * kStageBytes : read - kStageBytes);
    ptx::cp_async_commit();
    multiply_step<kTwoSets>(products, sums, read);
    read = last ? smem : read + kStageBytes;
    if constexpr (std::is_same_v<Element, float> && !kTwoSets) {
      if (--left_of_block == 0 && steps > 1) {
        flush(sums, partials, !flushed);
        flushed = true, left_of_block = p.block_steps;
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  return flushed;
}

template <DType kDType, Copying kCopying>
__global__ void __launch_bounds__(kThreads, kCopying == Copying::kVector ? 2 : 1) implicit_gemm_sm80(const __grid_constant__ GemmParams p) {
  using Element = ElementOf<kDType>;
  using Copies = std::conditional_t<kCopying == Copying::kScalar, ScalarCopies<Element>, VectorCopies<Element, kCopying == Copying::kVectorDivide>>;
  extern __shared__ __align__(128) char shared[];
  const uint32_t smem = ptx::smem_address(shared);
  const int64_t begin = share_begin(p.units, gridDim.x, blockIdx.x);
  int left = static_cast<int>(share_begin(p.units, gridDim.x, blockIdx.x + 1) - begin);
  int tile = static_cast<int>(begin / p.steps), first = static_cast<int>(begin - static_cast<int64_t>(tile) * p.steps);
  int part = 2 * blockIdx.x;
#pragma unroll 1
  while (left > 0) {
    const int steps = min(left, p.steps - first), tile_row = tile / p.tiles_n, column = (tile - tile_row * p.tiles_n) * kColumns;
    float sums[kSums] = {};
    // A tile that is not split uses the place as well: what is split comes first or last in a share, and each has its own.
    float* partials = p.partials + static_cast<int64_t>(part) * kRows * kColumns + threadIdx.x;
    constexpr bool kTwoSets = std::is_same_v<Element, float> && kCopying == Copying::kScalar;
    const bool flushed = accumulate<Element, kTwoSets>(p, sums, Copies(p, static_cast<int64_t>(tile_row) * kRows, column, first), steps, smem, partials);
    if (flushed) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += partials[i * kThreads];
    }
    if (steps == p.steps) {
      store_tile<Element>(p, sums, static_cast<int64_t>(tile_row) * kRows, column);
    } else {
#pragma unroll
      for (int i = 0; i < kSums; ++i) partials[i * kThreads] = sums[i];
    }
    part = 2 * blockIdx.x + 1;  // of what follows
    left -= steps, first = 0, ++tile;
  }
}

// Block b adds up the tile that share b + 1 begins within, unless an earlier share does too.
template <DType kDType>
__global__ void __launch_bounds__(kThreads) add_partials_sm80(const __grid_constant__ GemmParams p, int blocks) {
  using Element = ElementOf<kDType>;
  const int64_t begin = share_begin(p.units, blocks, blockIdx.x + 1), tile = begin / p.steps, first = tile * p.steps;
  if (begin == first || begin >= p.units || share_begin(p.units, blocks, blockIdx.x) > first) return;
  float sums[kSums] = {};
  for (int block = blockIdx.x; block < blocks && share_begin(p.units, blocks, block) < first + p.steps; ++block) {
    const int64_t share = share_begin(p.units, blocks, block);
    if (share == share_begin(p.units, blocks, block + 1)) continue;
    const float* partial = p.partials + (2 * static_cast<int64_t>(block) + (share < first)) * kRows * kColumns + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += partial[i * kThreads];
  }
  const int64_t tile_row = tile / p.tiles_n;
  store_tile<Element>(p, sums, tile_row * kRows, static_cast<int>(tile - tile_row * p.tiles_n) * kColumns);
}

template <DType kDType, Copying kCopying>
int Gemm<kDType, kCopying>::launch(const GemmParams& p, int blocks, cudaStream_t stream) {
  if (const int error = start_kernel(&implicit_gemm_sm80<kDType, kCopying>, blocks, kThreads, kSharedBytes, stream, p)) return error;
  if (blocks == 1) return 0;
  add_partials_sm80<kDType><<<blocks - 1, kThreads, 0, stream>>>(p, blocks);
  return static_cast<int>(cudaGetLastError());
}

template <DType kDType, Copying kCopying>
const void* Gemm<kDType, kCopying>::kernel() {
  return reinterpret_cast<const void*>(&implicit_gemm_sm80<kDType, kCopying>);
}

}  // namespace convfirst::direct::sm80
