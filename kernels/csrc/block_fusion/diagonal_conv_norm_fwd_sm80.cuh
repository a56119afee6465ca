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
//   x, a slice of 32 channels   shared, [pixel][80 bytes]: banks differ; up to   cp.async, all       slice multiplied
//                               three slices, two on their way
//   filters of the slice        shared, behind it, [tap][32 channels]            cp.async, all       in registers
//   diagonals of 49 taps        49 registers: lane (n, q) has channel n where    ldmatrix, masked    slice multiplied
//                               q = n / 2, else zeros
//   sums                        28 registers, float32, begin with the bias       mma.sync            stored
//   convolution + bias, 16 bit  device memory, where A will be                   a warp's 8 channels normalised
//
// Two blocks of eight warps a multiprocessor: one normalises or waits for x while the other multiplies. Through shared memory the convolution's
// result would take the room of two slices.
#pragma once

#include <type_traits>

#include "../common/again.cuh"
#include "../common/mma_1688.cuh"
#include "../common/ptx.cuh"
#include "diagonal_conv_norm_sm80.h"
#include "image_conv_norm_fwd_sm90.cuh"

namespace convfirst::block_fusion::sm80 {

// The first output pixel of the block's tile; in shared memory, since across the products it costs registers that they need.
struct DiagonalOrigin {
  int image, y, x;

  __device__ __forceinline__ void find(const DiagonalPlan& plan) {
    const int row = static_cast<int>(blockIdx.x) / plan.tiles_x;
    image = row / plan.tiles_y;
    y = (row - image * plan.tiles_y) * plan.rows();
    x = (static_cast<int>(blockIdx.x) - row * plan.tiles_x) * plan.columns;
  }
};
static_assert(sizeof(DiagonalOrigin) <= kDiagonalOriginBytes, "its place");

// Issues a thread's copies of a slice: every eighth row of the box a warp, eight pixels of 64 bytes at once, and a tap's 8 channels of the filters;
// the caller commits. What lies outside the map becomes zeros; channels that don't exist are not read.
__device__ __forceinline__ void diagonal_load(const DiagonalParams& p, const DiagonalOrigin& origin, uint32_t to, int slice) {
  constexpr int kChunks = kDiagonalSlice / 8, kAcross = 32 / kChunks, kWarps = kDiagonalThreads / 32;
  constexpr int kSteps = (kDiagonalColumns * kDiagonalParts + 2 * kDiagonalPad + kAcross - 1) / kAcross;  // of the widest box
  const int thread = again::thread_index(), chunk = thread % kChunks, channel = slice * kDiagonalSlice + chunk * 8;
  if (channel >= p.channels) return;
  static_assert(kDiagonalKernel * kDiagonalKernel <= kDiagonalThreads / kChunks, "a thread 8 channels of a tap");
  const int tap = thread / kChunks;
  if (tap < kDiagonalKernel * kDiagonalKernel)
    ptx::cp_async16(to + p.plan.filter_offset() + thread * 16, static_cast<const uint16_t*>(p.weight) + tap * p.channels + channel, true);
  const int first = thread % 32 / kChunks, columns = again::value(p.plan.box_columns()), rows = p.plan.box_rows();
  const int column = origin.x - kDiagonalPad + first, step = kAcross * 2 * p.channels;
  int row = thread / 32, y = origin.y - kDiagonalPad + row;
  const char* from = static_cast<const char*>(p.x) +
                     (((static_cast<int64_t>(origin.image) * p.height + y) * p.width + column) * p.channels + channel) * 2;
  uint32_t line = to + (row * columns + first) * kDiagonalPixelBytes + chunk * 16;
#pragma unroll 1
  for (; row < rows; row += kWarps, y += kWarps) {
    const bool in_rows = static_cast<unsigned>(y) < static_cast<unsigned>(p.height);
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      if (first + s * kAcross < columns)
        ptx::cp_async16(line + s * kAcross * kDiagonalPixelBytes, from + s * step,
                        in_rows && static_cast<unsigned>(column + s * kAcross) < static_cast<unsigned>(p.width));
    line += kWarps * columns * kDiagonalPixelBytes, from += static_cast<int64_t>(kWarps * 2) * p.width * p.channels;
  }
}

// A warp's share of a slice: 8 channels of one part of the tile.
template <class Element>
struct DiagonalPart {
  static constexpr int kK = kDiagonalKernel, kRows = kDiagonalRows;
  uint32_t taps[kK * kK];
  float sums[kRows][4];

  // filter: the 8 channels of the first tap. Every row of ldmatrix's matrices is the same tap.
  __device__ __forceinline__ void load_taps(uint32_t filter) {
    const int lane = threadIdx.x % 32, n = lane / 4;
    const uint32_t kept = n / 2 != lane % 4 ? 0u : n % 2 == 0 ? 0xffffu : 0xffff0000u;
#pragma unroll
    for (int tap = 0; tap < kK * kK; tap += 4) {
      uint32_t four[4];
      ptx::ldmatrix_x4(four, filter + min(tap + lane / 8, kK * kK - 1) * 2 * kDiagonalSlice);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (tap + i < kK * kK) taps[tap + i] = four[i] & kept;
    }
  }

  __device__ __forceinline__ void begin(float2 bias) {
#pragma unroll
    for (int o = 0; o < kRows; ++o) sums[o][0] = sums[o][2] = bias.x, sums[o][1] = sums[o][3] = bias.y;
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

  // To device memory, where these outputs are the part's and the map's. to: the 8 channels of the mma's first pixel, whose pixels are `pixel` and
  // whose lines `line` bytes apart; of its columns those from `skipped` up to `columns` are wanted.
  __device__ __forceinline__ void store(char* to, int pixel, int64_t line, int skipped, int columns, int rows) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = lane / 4 + half * 8, wanted = column >= skipped && column < columns ? rows : 0;
      char* const first = to + column * pixel + lane % 4 * 4;
#pragma unroll
      for (int o = 0; o < kRows; ++o) again::store_32_if(first + o * line, ptx::pack2<Element>(sums[o][2 * half], sums[o][2 * half + 1]), o < wanted);
    }
  }
};

// A warp's place: 8 channels of every slice, and a part of the tile. Worked out where it is used: kept across the products it costs registers that
// they need.
struct DiagonalPlace {
  int group, down, from;  // first row and column of the part

  __device__ __forceinline__ explicit DiagonalPlace(const DiagonalPlan& plan) {
    constexpr int kGroups = kDiagonalSlice / 8;
    const unsigned warp = again::thread_index() / 32u, part = warp / kGroups;
    static_assert(kDiagonalParts == 2, "one part below or beside the other");
    const bool below = plan.parts_down == 2;
    group = warp % kGroups, down = below ? part * kDiagonalRows : 0, from = below ? 0 : part * kDiagonalColumns;
  }

  __device__ __forceinline__ int channel(int slice) const { return slice * kDiagonalSlice + group * 8; }
  __device__ __forceinline__ bool exists(const DiagonalParams& p, int slice) const { return channel(slice) < p.channels && from < p.plan.columns; }
  // Where the mma's columns begin: the last ones end with the tile.
  __device__ __forceinline__ int first(const DiagonalPlan& plan) const { return max(0, min(from, plan.columns - kDiagonalColumns)); }
  // Of the lane's two channels.
  __device__ __forceinline__ float2 bias(const DiagonalParams& p, int slice) const {
    if (p.bias == nullptr || channel(slice) >= p.channels) return make_float2(0.f, 0.f);
    return __ldg(reinterpret_cast<const float2*>(p.bias + channel(slice)) + again::thread_index() % 4);
  }
};

// A warp's share of a slice that is there.
template <class Element>
__device__ __forceinline__ void diagonal_multiply(const DiagonalParams& p, const DiagonalOrigin& origin, uint32_t box, int slice, float2 bias) {
  DiagonalPart<Element> work;
  {
    const DiagonalPlace place(p.plan);
    const int pitch = again::value(p.plan.box_columns() * kDiagonalPixelBytes);
    work.load_taps(box + p.plan.filter_offset() + place.group * 16);
    work.begin(bias);
    work.multiply(box + place.down * pitch + place.first(p.plan) * kDiagonalPixelBytes + place.group * 16, pitch);
  }
  const DiagonalPlace place(p.plan);
  const int first = place.first(p.plan), row = origin.y + place.down, column = origin.x + first, channels = again::value(p.channels);
  const int64_t pixel = (static_cast<int64_t>(origin.image) * p.height + row) * p.width + column;
  work.store(static_cast<char*>(p.a) + (pixel * channels + place.channel(slice)) * 2, 2 * channels, static_cast<int64_t>(2 * channels) * p.width,
             place.from - first, min(p.plan.columns - first, p.width - column), p.height - row);
}

// One of the tile's pixels in A, whose norm eight lanes work out: each has every eighth 16-byte chunk, the first ones in registers.
template <class Element>
struct DiagonalPixel {
  static constexpr int kHeld = 3;
  uint4* at;  // the lane's first chunk, or nullptr outside the map
  uint4 held[kHeld];

  // From the lane's first chunk on.
  __device__ __forceinline__ static int chunks(const DiagonalParams& p) { return p.channels / 8 - static_cast<int>(threadIdx.x) % 8; }

  __device__ __forceinline__ void load(const DiagonalParams& p, const DiagonalOrigin& origin, int tile_row, int tile_column) {
    const int row = origin.y + tile_row, column = origin.x + tile_column;
    const bool exists = tile_row < p.plan.rows() && row < p.height && column < p.width;
    const int64_t pixel = (static_cast<int64_t>(origin.image) * p.height + row) * p.width + column;
    at = exists ? static_cast<uint4*>(p.a) + pixel * (p.channels / 8) + threadIdx.x % 8 : nullptr;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      held[j] = make_uint4(0, 0, 0, 0);
      if (exists && 8 * j < chunks(p)) held[j] = at[8 * j];
    }
  }

  __device__ __forceinline__ static void add(const float (&v)[8], float& sum, float& square) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j], square = fmaf(v[j], v[j], square);
  }

  __device__ __forceinline__ void store(const DiagonalParams& p, int place, float (&v)[8], float scale, float shift) const {
    const int channel = 8 * (place + static_cast<int>(threadIdx.x) % 8);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = fmaf(v[j], scale, shift);
    if (p.norm_weight != nullptr || p.norm_bias != nullptr) {
      float w[8] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f}, b[8] = {};
      if (p.norm_weight != nullptr) sm90::load8(w, p.norm_weight + channel);
      if (p.norm_bias != nullptr) sm90::load8(b, p.norm_bias + channel);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = fmaf(v[j], w[j], b[j]);
    }
    at[place] = sm90::pack8<Element>(v);
  }

  __device__ __forceinline__ void normalise(const DiagonalParams& p) const {
    float sum = 0.f, square = 0.f, v[kHeld][8];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) sm90::unpack8<Element>(v[j], held[j]), add(v[j], sum, square);  // zeros beyond the channels
    const int held_end = 8 * kHeld, end = at == nullptr ? 0 : chunks(p);
    for (int chunk = held_end; chunk < end; chunk += 8) {
      float w[8];
      sm90::unpack8<Element>(w, at[chunk]);
      add(w, sum, square);
    }
#pragma unroll
    for (int d = 1; d < 8; d *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, d);
      square += __shfl_xor_sync(0xffffffffu, square, d);
    }
    const float mean = sum / p.channels, scale = rsqrtf(fmaxf(square / p.channels - mean * mean, 0.f) + p.eps), shift = -mean * scale;
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if (8 * j < end) store(p, 8 * j, v[j], scale, shift);
    for (int chunk = held_end; chunk < end; chunk += 8) {
      float w[8];
      sm90::unpack8<Element>(w, at[chunk]);
      store(p, chunk, w, scale, shift);
    }
  }
};

// The tile in A, in place; a pixel is on its way while the one before it is normalised.
template <class Element>
__device__ __forceinline__ void diagonal_normalise(const DiagonalParams& p, const DiagonalOrigin& origin) {
  constexpr int kStep = kDiagonalThreads / 8;
  const int columns = p.plan.columns, pixels = p.plan.rows() * columns, down = kStep / columns, right = kStep - down * columns;
  int row = threadIdx.x / 8 / columns, column = threadIdx.x / 8 - row * columns;
  DiagonalPixel<Element> pixel;
  pixel.load(p, origin, row, column);
#pragma unroll 1
  for (int first = 0; first < pixels; first += kStep) {
    row += down, column += right;
    if (column >= columns) column -= columns, ++row;
    DiagonalPixel<Element> next;
    next.load(p, origin, row, column);
    pixel.normalise(p);
    pixel = next;
  }
}

template <DType kType>
__global__ void __launch_bounds__(kDiagonalThreads, 2) diagonal_conv_norm_fwd_sm80(const __grid_constant__ DiagonalParams p) {
  using Element = std::conditional_t<kType == DType::kHalf, __half, __nv_bfloat16>;
  extern __shared__ __align__(128) unsigned char smem[];
  DiagonalOrigin& origin = *reinterpret_cast<DiagonalOrigin*>(smem);
  const int slices = (p.channels + kDiagonalSlice - 1) / kDiagonalSlice, slice_bytes = p.plan.slice_bytes();
  const uint32_t boxes = ptx::smem_address(smem) + kDiagonalOriginBytes;
  const auto load = [&](int slice, int buffer) {
    if (slice < slices) diagonal_load(p, origin, boxes + buffer * slice_bytes, slice);
    ptx::cp_async_commit();
  };
  if (threadIdx.x == 0) origin.find(p.plan);
  __syncthreads();
  for (int slice = 0; slice + 1 < p.plan.buffers; ++slice) load(slice, slice);
  int buffer = 0;
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    const DiagonalPlace place(p.plan);
    const float2 bias = place.bias(p, slice);
    if (p.plan.buffers == 1) load(slice, 0);
    if (p.plan.buffers == kDiagonalMostBuffers) {
      ptx::cp_async_wait<kDiagonalMostBuffers - 2>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // the slice is there, and every warp is done with the one before it
    if (p.plan.buffers > 1) load(slice + p.plan.buffers - 1, buffer > 0 ? buffer - 1 : p.plan.buffers - 1);
    if (place.exists(p, slice)) diagonal_multiply<Element>(p, origin, boxes + buffer * slice_bytes, slice, bias);
    if (p.plan.buffers == 1) __syncthreads();
    buffer = buffer + 1 < p.plan.buffers ? buffer + 1 : 0;
  }
  if (!p.has_norm) return;
  __syncthreads();
  diagonal_normalise<Element>(p, origin);
}

}  // namespace convfirst::block_fusion::sm80
