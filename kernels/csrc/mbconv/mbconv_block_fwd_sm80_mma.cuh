// The whole MBConv block of a tile of pixels in one launch, for sm_80 and newer: cp.async, ldmatrix, mma.sync m16n8k16.
//
//        x, all channels, with halo         hidden, a chunk, with halo        a, the chunk         O [pixels x C]
//      +---------------------------+  W1  +---------------------------+  3x3  +-----------+   W2   +-------------+
//      |  . . . . . . . . . . . .  |      |  act(x W1^T + b1);        |       |           |        |  += a W2^T, |--> y = x +
//      |  .  tile of pixels     .  |----->|  zero where there is no   |------>|  act(...) |------->|  chunk      |  scale (O + b2)
//      |  .                     .  |      |  pixel: the padding is    |       |           |        |  after      |
//      |  . . . . . . . . . . . .  |      |  of this tensor, not of x |       |           |        |  chunk      |
//      +---------------------------+      +---------------------------+       +-----------+        +-------------+
//
//   what                         where                                        size
//   x with halo                  shared, for all chunks                       halo rows x C
//   W1 and both biases, W2       shared, two slots each                       chunk x C, C x chunk
//   filters                      shared, two slots                            9 x chunk x group width
//   hidden                       shared                                       halo rows x chunk
//   a                            shared                                       pixels x chunk
//   O                            registers, fp32                              16 row_blocks x C / warps_n a warp
//   x for the residual, then y   shared, over x with halo                     pixels x C
//
// A step of the loop projects the last chunk and expands the next one between the same two barriers, and convolves between the
// second and the first. The hidden tensor exists a chunk at a time and never in device memory. C beyond the tensor's channels,
// and hidden units beyond the last, are zero-filled copies.
#pragma once

#include "../block_fusion/copy_stage_sm80.cuh"
#include "hidden_conv_stage_sm80.cuh"

namespace convfirst::mbconv::sm80 {

// Pixel of each halo row, -1 where there is none.
template <int kThreads>
__device__ __forceinline__ void fill_halo(const BlockParams& p, const block_fusion::sm80::TileOrigin& origin, int* halo_pixel,
                                          int rows) {
  const Geometry& g = p.geometry;
  for (int h = threadIdx.x; h < rows; h += kThreads) {
    int pixel = -1;
    if (g.tile_height == 1) {
      pixel = origin.pixel - p.width - 1 + h;
      if (pixel >= p.pixels) pixel = -1;
    } else {
      const int row = origin.row - 1 + h / g.pitch, column = origin.column - 1 + h % g.pitch;
      if (row >= 0 && row < p.rows && column >= 0 && column < p.width) pixel = row * p.width + column;
    }
    halo_pixel[h] = h < g.halo_pixels && pixel >= 0 ? pixel : -1;
  }
}

// Issues the copies of x with halo; the caller commits.
template <typename T, int kWidth, int kThreads>
__device__ __forceinline__ void load_halo(const BlockParams& p, const int* halo_pixel, int rows, uint32_t to) {
  constexpr int kPieces = kWidth / 8;
  const T* x = static_cast<const T*>(p.t.x);
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * kPieces; i += kThreads) {
    const int row = i / kPieces, channel = i % kPieces * 8, pixel = halo_pixel[row];
    const bool valid = pixel >= 0 && channel < p.channels;
    ptx::cp_async16(to + row * row_bytes(kWidth) + channel * 2,
                    valid ? x + static_cast<size_t>(pixel) * p.channels + channel : x, valid);
  }
}

// Issues the copies of a chunk's filters and biases, units from `first` on; the caller commits.
template <typename T, int kChunk, bool kDepthwise, int kThreads>
__device__ __forceinline__ void load_filters(const BlockParams& p, int first, int group_width, uint32_t filter, uint32_t biases) {
  const T* w = static_cast<const T*>(p.t.conv_weight);
  // Copies of 16 bytes a tap are a power of two: no division.
  const int shift = log2_of(kChunk) + (kDepthwise ? -3 : group_width == 16 ? 1 : 0);
  const int left = (p.hidden - first) * group_width / 8;
  for (int i = threadIdx.x; i < kTaps << shift; i += kThreads) {
    const int tap = i >> shift, piece = i & ((1 << shift) - 1);
    const bool valid = piece < left;
    ptx::cp_async16(filter + i * 16, valid ? w + (static_cast<size_t>(tap) * p.hidden + first) * group_width + piece * 8 : w, valid);
  }
  static_assert(kThreads >= 2 * kChunk, "a thread a bias");
  if (threadIdx.x < 2 * kChunk) {
    const float* source = threadIdx.x < kChunk ? p.t.expand_bias : p.t.conv_bias;
    const int unit = first + threadIdx.x % kChunk;
    const bool valid = source != nullptr && unit < p.hidden;
    ptx::cp_async4(biases + threadIdx.x * 4, valid ? static_cast<const void*>(source + unit) : p.t.x, valid);
  }
}

// hidden = act(x W1^T + b1) of 16 * kRows halo rows from `first` on, for one chunk.
template <typename T, int kRows, int kWidth, int kChunk>
__device__ __forceinline__ void expand_rows(uint32_t x, uint32_t weight, const float* bias, const int* halo_pixel, int first,
                                            int activation, unsigned char* hidden) {
  constexpr int kColumns = kChunk / 8, kSteps = kWidth / 16, kPitchX = row_bytes(kWidth), kPitchH = row_bytes(kChunk);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float s[kRows][kColumns][4];
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const float2 b = *reinterpret_cast<const float2*>(bias + n * 8 + t * 2);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      s[m][n][0] = s[m][n][2] = b.x;
      s[m][n][1] = s[m][n][3] = b.y;
    }
  }
  const block_fusion::sm80::SharedA<kRows> a{x + first * kPitchX + block_fusion::sm80::a_lane_offset(kPitchX), kPitchX};
  block_fusion::sm80::multiply<T, kRows, kColumns, kSteps, (kSteps <= 8 ? kSteps : 4)>(
      s, a, weight + block_fusion::sm80::b_lane_offset(kPitchX), kPitchX);
  block_fusion::sm80::activate(s, activation);
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + m * 16 + half * 8 + g;
      const bool pixel = halo_pixel[row] >= 0;
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        *reinterpret_cast<uint32_t*>(hidden + row * kPitchH + (n * 8 + t * 2) * 2) =
            pixel ? ptx::pack2<T>(s[m][n][2 * half], s[m][n][2 * half + 1]) : 0u;
    }
}

template <typename T, int kWidth, int kPixels, bool kDepthwise>
__global__ void __launch_bounds__(tile(kWidth, kPixels, kDepthwise).threads(),
                                  tile(kWidth, kPixels, kDepthwise).min_blocks)
    mbconv_block_fwd_sm80(const __grid_constant__ BlockParams p) {
  constexpr Tile kTile = tile(kWidth, kPixels, kDepthwise);
  constexpr int kThreads = kTile.threads(), kChunk = kTile.hidden_chunk, kRows = kTile.row_blocks;
  constexpr int kOutColumns = kWidth / kTile.warps_n / 8;  // n8 blocks of O a warp
  constexpr int kPitchX = row_bytes(kWidth), kPitchH = row_bytes(kChunk);
  static_assert(kTile.pixels() == kPixels && kChunk % 16 == 0 && kOutColumns % 2 == 0, "ldmatrix.x4 brings two n8 blocks");

  extern __shared__ __align__(128) unsigned char smem[];
  const int group_width = kDepthwise ? 1 : p.group_width;
  const int halo = halo_rows(p.geometry);
  const Layout layout = shared_layout(kWidth, kTile, group_width, halo);
  const uint32_t base = ptx::smem_address(smem);
  const int warp = threadIdx.x / 32, warp_n = warp % kTile.warps_n;
  const int first_row = warp / kTile.warps_n * kRows * 16;

  const block_fusion::sm80::TileRows<kPixels> rows{reinterpret_cast<int*>(smem + layout.pixel),
                                                   reinterpret_cast<uint32_t*>(smem + layout.taps),
                                                   reinterpret_cast<int*>(smem + layout.window)};
  int* halo_pixel = reinterpret_cast<int*>(smem + layout.halo_pixel);
  float* scale = reinterpret_cast<float*>(smem + layout.project);
  float* shift = scale + kWidth;
  const block_fusion::sm80::TileOrigin origin = block_fusion::sm80::tile_origin(p.geometry);
  fill_halo<kThreads>(p, origin, halo_pixel, halo);
  block_fusion::sm80::fill_tile_rows<kPixels, kThreads>(p, origin, rows);
  block_fusion::sm80::project_scale<kThreads>(p.t, 0, kWidth, p.channels, scale, shift);
  if (threadIdx.x < 4) reinterpret_cast<uint32_t*>(smem + layout.zero)[threadIdx.x] = 0u;
  __syncthreads();
  load_halo<T, kWidth, kThreads>(p, halo_pixel, halo, base + layout.x);

  const int chunks = (p.hidden + kChunk - 1) / kChunk;
  const block_fusion::sm80::BlockCopy<T, kChunk, kWidth / 8, kThreads, kPitchX> copy_expand(p.t.expand_weight, 0, p.channels);
  const block_fusion::sm80::BlockCopy<T, kWidth, kChunk / 8, kThreads, kPitchH> copy_project(p.t.project_weight, 0, p.hidden);
  auto expand_slot = [&](int j) { return layout.expand + j % 2 * layout.expand_slot; };
  auto filter_slot = [&](int j) { return layout.filter + j % 2 * layout.filter_slot; };
  auto project_slot = [&](int j) { return layout.project_ring + j % 2 * layout.project_slot; };
  auto load_step = [&](int j) {  // chunk j of what comes before the projection, chunk j - 1 of the projection
    if (j < chunks) {
      copy_expand(base + expand_slot(j), static_cast<size_t>(j * kChunk) * p.channels, p.hidden - j * kChunk, p.channels);
      load_filters<T, kChunk, kDepthwise, kThreads>(p, j * kChunk, group_width, base + filter_slot(j), base + expand_slot(j) + kChunk * kPitchX);
    }
    if (j > 0 && j <= chunks) copy_project(base + project_slot(j - 1), (j - 1) * kChunk, p.channels, p.hidden - (j - 1) * kChunk);
  };
  load_step(0);
  ptx::cp_async_commit();

  auto row_pixel = [&](int row) { return rows.pixel[first_row + row]; };
  const block_fusion::sm80::ResultTile<T, kRows, kOutColumns, decltype(row_pixel)> result{
      smem + layout.x + first_row * kPitchX + warp_n * kOutColumns * 16, kPitchX, warp_n * kOutColumns * 8, p.channels, row_pixel};
  const block_fusion::sm80::SharedA<kRows> a{base + layout.a + first_row * kPitchH + block_fusion::sm80::a_lane_offset(kPitchH),
                                             kPitchH};
  float out[kRows][kOutColumns][4];
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int n = 0; n < kOutColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][n][i] = 0.f;

  constexpr int kWarps = kThreads / 32;
  const int begin = warp * (halo / 16) / kWarps, end = (warp + 1) * (halo / 16) / kWarps;  // this warp's m16 blocks of the expansion
  for (int j = 0; j <= chunks; ++j) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // step j's copies and a are there; hidden and the slots that the next copies take are free
    load_step(j + 1);
    if (j == chunks) result.load(static_cast<const T*>(p.t.x));  // x with halo is dead: its place takes the residual
    ptx::cp_async_commit();
    if (j > 0) {
      const uint32_t weight = base + project_slot(j - 1) + warp_n * kOutColumns * 8 * kPitchH;
      block_fusion::sm80::multiply<T, kRows, kOutColumns, kChunk / 16, kChunk / 16>(
          out, a, weight + block_fusion::sm80::b_lane_offset(kPitchH), kPitchH);
    }
    if (j == chunks) break;

    const float* bias = reinterpret_cast<const float*>(smem + expand_slot(j) + kChunk * kPitchX);
    int block = begin;
    for (; block + 2 <= end; block += 2)
      expand_rows<T, 2, kWidth, kChunk>(base + layout.x, base + expand_slot(j), bias, halo_pixel, block * 16, p.activation,
                                        smem + layout.hidden);
    if (block < end)
      expand_rows<T, 1, kWidth, kChunk>(base + layout.x, base + expand_slot(j), bias, halo_pixel, block * 16, p.activation,
                                        smem + layout.hidden);
    __syncthreads();  // hidden is there, and every warp is done with a

    const ConvOperands<T> operands{smem + layout.hidden, reinterpret_cast<const T*>(smem + filter_slot(j)), bias + kChunk,
                                   smem + layout.a};
    if constexpr (kDepthwise) {
      depthwise_conv<T, depthwise_rows(kTile), depthwise_columns(kTile), kPixels, kChunk, kThreads>(operands, p, origin);
    } else if (p.group_width == 8) {
      grouped_conv<T, 8, kPixels, kChunk, kThreads>(operands, rows, p.geometry.pitch, base + layout.zero, p.activation);
    } else {
      grouped_conv<T, 16, kPixels, kChunk, kThreads>(operands, rows, p.geometry.pitch, base + layout.zero, p.activation);
    }
  }

  ptx::cp_async_wait<0>();
  __syncwarp();
  result.add_residual(out, scale + result.channel, shift + result.channel, p.t.sample_scale, p.height * p.width);
  __syncwarp();
  result.store(static_cast<T*>(p.t.y));
}

}  // namespace convfirst::mbconv::sm80
