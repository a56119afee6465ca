// First launch of the portable split path for depthwise 7x7 filters: A = LayerNorm(conv(x) + bias), on tensor cores. A tap of 8 channels'
// filters is a diagonal 8x8 matrix, x its 16 pixels by 8 channels: seven of eight products are with zeros, but x needs no rearrangement.
//
//     x, 32 channels of a tile with halo                      warp: 8 channels, 7 rows x 16 columns          LayerNorm -> A
//     +-----------------------+   row r: fragments of   +--------------------------------------------+      eight lanes
//     | 13 (20) rows          |   16 pixels x 2 taps    | sums of output rows 0 ... 6: row r adds to |      a pixel
//     | x columns + 6         | ----------------------> | r, r - 1 ... 0, row r + 7 to the others    |  -->
//     |                       |   (7 a row pair)        | 7 (3 m16n8k16 + 1 m16n8k8) a row pair      |
//     +-----------------------+                         +--------------------------------------------+
//
//   what                        where                                            written by          released when
//   x, a slice of 32 channels   shared, [pixel][80 bytes]: banks differ          cp.async, all       slice multiplied
//   diagonals of 49 taps        49 registers: lane (n, q) has channel n where    from L1             slice multiplied
//                               q = n / 2, else zeros
//   sums                        28 registers, float32, begin with the bias       mma.sync            staged
//   convolution + bias, 16 bit  shared, [pixel][channels], odd number of chunks  a warp's 8 channels normalised
//
// Two blocks of eight warps a multiprocessor: one normalises or waits for x while the other multiplies.
#pragma once

#include <type_traits>

#include "../common/mma_1688.cuh"
#include "../common/ptx.cuh"
#include "diagonal_conv_norm_sm80.h"
#include "image_conv_norm_fwd_sm90.cuh"

namespace convfirst::block_fusion::sm80 {

// The first output pixel of the block's tile.
struct DiagonalOrigin {
  int image, y, x;

  __device__ __forceinline__ explicit DiagonalOrigin(const DiagonalPlan& plan) {
    const int row = static_cast<int>(blockIdx.x) / plan.tiles_x;
    image = row / plan.tiles_y;
    y = (row - image * plan.tiles_y) * plan.rows();
    x = (static_cast<int>(blockIdx.x) - row * plan.tiles_x) * plan.columns;
  }
};

// Issues a thread's copies of a slice, a 16-byte chunk of every 64th pixel of the box; the caller commits. What lies outside the map
// becomes zeros; channels that don't exist are not read.
__device__ __forceinline__ void diagonal_load(const DiagonalParams& p, const DiagonalOrigin& origin, uint32_t to, int slice) {
  constexpr int kChunks = kDiagonalSlice / 8, kStep = kDiagonalThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, channel = slice * kDiagonalSlice + chunk * 8;
  if (channel >= p.channels) return;
  const int columns = p.plan.box_columns(), pixels = p.plan.box_rows() * columns;
  const int down = kStep / columns, right = kStep - down * columns;
  const int first = threadIdx.x / kChunks, first_row = first / columns;
  const char* x = static_cast<const char*>(p.x);
  int row = origin.y - kDiagonalPad + first_row, column = origin.x - kDiagonalPad + first - first_row * columns;
  const int end = origin.x - kDiagonalPad + columns;
#pragma unroll 2
  for (int pixel = first; pixel < pixels; pixel += kStep) {
    const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(p.height) &&
                        static_cast<unsigned>(column) < static_cast<unsigned>(p.width);
    const int64_t from = (static_cast<int64_t>(origin.image) * p.height + row) * p.width + column;
    ptx::cp_async16(to + pixel * kDiagonalPixelBytes + chunk * 16, inside ? x + (from * p.channels + channel) * 2 : x, inside);
    column += right, row += down;
    if (column >= end) column -= columns, ++row;
  }
}

// A warp's share of a slice: 8 channels of one part of the tile.
template <class Element>
struct DiagonalPart {
  static constexpr int kK = kDiagonalKernel, kRows = kDiagonalRows;
  uint32_t taps[kK * kK];
  float sums[kRows][4];

  // Of channels from `channel` on, which exist.
  __device__ __forceinline__ void load_filter(const DiagonalParams& p, int channel) {
    const int lane = threadIdx.x % 32, n = lane / 4;
    const bool diagonal = n / 2 == lane % 4;
    const uint16_t* weight = static_cast<const uint16_t*>(p.weight) + channel + n;
#pragma unroll
    for (int tap = 0; tap < kK * kK; ++tap)
      taps[tap] = diagonal ? static_cast<uint32_t>(__ldg(weight + tap * p.channels)) << n % 2 * 16 : 0u;
  }

  __device__ __forceinline__ void begin(const DiagonalParams& p, int channel) {
    const int c = channel + threadIdx.x % 4 * 2;
    const float low = p.bias != nullptr ? __ldg(p.bias + c) : 0.f, high = p.bias != nullptr ? __ldg(p.bias + c + 1) : 0.f;
#pragma unroll
    for (int o = 0; o < kRows; ++o) sums[o][0] = sums[o][2] = low, sums[o][1] = sums[o][3] = high;
  }

  // Input row r adds to output rows up to r by `low`, row r + 7 to the others by `high`: seven sums that don't wait for each other.
  template <class Add>
  __device__ __forceinline__ void add(int r, Add add) {
#pragma unroll
    for (int o = 0; o < kRows; ++o) add(sums[o], o > r, (o > r ? r + kRows - o : r - o) * kK);
  }

  // corner: the box pixel at the part's first output's first tap, its 8 channels; rows of the box `pitch` bytes apart.
  __device__ __forceinline__ void multiply(uint32_t corner, int pitch) {
    const int lane = threadIdx.x % 32;
    const uint32_t pixel = corner + lane % 16 * kDiagonalPixelBytes;
    const uint32_t beside = pixel + lane / 16 * kDiagonalPixelBytes;  // two taps of a row
    const uint32_t below = pixel + lane / 16 * kRows * pitch;         // the last tap, of two rows
    const uint32_t further = kRows * pitch;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool two = r + 1 < kRows;
#pragma unroll
      for (int tap = 0; tap + 1 < kK; tap += 2) {
        uint32_t low[4], high[4];
        ptx::ldmatrix_x4(low, beside + r * pitch + tap * kDiagonalPixelBytes);
        if (two) ptx::ldmatrix_x4(high, beside + further + r * pitch + tap * kDiagonalPixelBytes);
        add(r, [&](float(&sum)[4], bool second, int row) {
          ptx::mma_16816<Element>(sum, second ? high : low, taps[row + tap], taps[row + tap + 1]);
        });
      }
      uint32_t last[4];
      ptx::ldmatrix_x4(last, (two ? below : pixel) + r * pitch + (kK - 1) * kDiagonalPixelBytes);
      add(r, [&](float(&sum)[4], bool second, int row) {
        ptx::mma_1688<Element>(sum, last[second ? 2 : 0], last[second ? 3 : 1], taps[row + kK - 1]);
      });
    }
  }

  // Into the staged tile, where this part's columns are the tile's: from `from` up to `end`, of which the mma's rows begin at `first`.
  __device__ __forceinline__ void store(unsigned char* staged, int pixel_bytes, int columns, int first, int from, int end) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = first + lane / 4 + half * 8;
      if (column < from || column >= end) continue;
#pragma unroll
      for (int o = 0; o < kRows; ++o)
        *reinterpret_cast<uint32_t*>(staged + (o * columns + column) * pixel_bytes + lane % 4 * 4) =
            ptx::pack2<Element>(sums[o][2 * half], sums[o][2 * half + 1]);
    }
  }
};

// A warp's place: 8 channels of every slice, and a part of the tile. What follows from it is worked out where it is used.
struct DiagonalPlace {
  int group, down, across;

  __device__ __forceinline__ explicit DiagonalPlace(const DiagonalPlan& plan) {
    constexpr int kGroups = kDiagonalSlice / 8;
    const int warp = threadIdx.x / 32, part = warp / kGroups;
    group = warp % kGroups, down = part % plan.parts_down, across = part / plan.parts_down;
  }

  __device__ __forceinline__ int channel(int slice) const { return slice * kDiagonalSlice + group * 8; }
  __device__ __forceinline__ bool exists(const DiagonalParams& p, int slice) const {
    return channel(slice) < p.channels && across * kDiagonalColumns < p.plan.columns;
  }
};

// A warp's share of a slice, whose filter it has, once x is there.
template <class Element>
__device__ __forceinline__ void diagonal_multiply(const DiagonalParams& p, DiagonalPart<Element>& work, const DiagonalPlace& place,
                                                  unsigned char* staged, uint32_t box, int channel) {
  const int columns = p.plan.columns, from = place.across * kDiagonalColumns, first = max(0, min(from, columns - kDiagonalColumns));
  const int pitch = p.plan.box_columns() * kDiagonalPixelBytes, pixel_bytes = diagonal_staged_bytes(p.channels);
  const int down = place.down * kDiagonalRows;
  work.begin(p, channel);
  work.multiply(box + down * pitch + first * kDiagonalPixelBytes + place.group * 16, pitch);
  work.store(staged + down * columns * pixel_bytes + channel * 2, pixel_bytes, columns, first, from, min(from + kDiagonalColumns, columns));
}

// The staged tile into A: eight lanes a pixel. Pixels outside the map are left out.
template <class Element>
__device__ __forceinline__ void diagonal_normalise(const DiagonalParams& p, const DiagonalOrigin& origin, const unsigned char* staged) {
  const int chunks = p.channels / 8, lane = threadIdx.x % 8, columns = p.plan.columns, pixels = p.plan.rows() * columns;
  sm90::ImageParams norm{};
  norm.channels = p.channels, norm.eps = p.eps;
#pragma unroll 1
  for (int i = threadIdx.x / 8; i - static_cast<int>(threadIdx.x % 32 / 8) < pixels; i += kDiagonalThreads / 8) {
    const int tile_row = i / columns, row = origin.y + tile_row, column = origin.x + i - tile_row * columns;
    const bool exists = i < pixels && row < p.height && column < p.width;
    const uint4* pixel = reinterpret_cast<const uint4*>(staged + (exists ? i : 0) * diagonal_staged_bytes(p.channels));
    float2 scale = make_float2(1.f, 0.f);
    if (p.has_norm) scale = sm90::scale_and_shift<Element>(norm, pixel, lane);
    if (!exists) continue;
    uint4* out = static_cast<uint4*>(p.a) + ((static_cast<int64_t>(origin.image) * p.height + row) * p.width + column) * chunks;
#pragma unroll 3
    for (int chunk = lane; chunk < chunks; chunk += 8) {
      float v[8], w[8];
      sm90::unpack8<Element>(v, pixel[chunk]);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = fmaf(v[j], scale.x, scale.y);
      if (p.norm_weight != nullptr) {
        sm90::load8(w, p.norm_weight + 8 * chunk);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] *= w[j];
      }
      if (p.norm_bias != nullptr) {
        sm90::load8(w, p.norm_bias + 8 * chunk);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] += w[j];
      }
      out[chunk] = sm90::pack8<Element>(v);
    }
  }
}

template <DType kType>
__global__ void __launch_bounds__(kDiagonalThreads, 2) diagonal_conv_norm_fwd_sm80(const __grid_constant__ DiagonalParams p) {
  using Element = std::conditional_t<kType == DType::kHalf, __half, __nv_bfloat16>;
  extern __shared__ __align__(128) unsigned char smem[];
  const DiagonalOrigin origin(p.plan);
  const int slices = (p.channels + kDiagonalSlice - 1) / kDiagonalSlice, slice_bytes = p.plan.slice_bytes();
  const uint32_t boxes = ptx::smem_address(smem);
  unsigned char* const staged = smem + p.plan.buffers * slice_bytes;
  const auto load = [&](int slice) {
    if (slice < slices) diagonal_load(p, origin, boxes + (p.plan.buffers == 2 ? slice % 2 * slice_bytes : 0), slice);
    ptx::cp_async_commit();
  };
  const DiagonalPlace place(p.plan);
  load(0);
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    DiagonalPart<Element> work;
    const bool exists = place.exists(p, slice);
    if (p.plan.buffers == 2) load(slice + 1);
    if (exists) work.load_filter(p, place.channel(slice));  // while x is on its way
    if (p.plan.buffers == 2) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    const uint32_t box = boxes + (p.plan.buffers == 2 ? slice % 2 * slice_bytes : 0);
    if (exists) diagonal_multiply(p, work, place, staged, box, place.channel(slice));
    __syncthreads();
    if (p.plan.buffers == 1) load(slice + 1);
  }
  diagonal_normalise<Element>(p, origin, staged);
}

}  // namespace convfirst::block_fusion::sm80
