// The convolution and LayerNorm stages that the fused kernel and the split path share.
//
// Input arrives in slices of channels through cp.async: the tile's pixels with their halo, [halo pixel][slice channel], zeros
// outside the tensor. Each row of the tile knows the halo index of its first tap and one bit a tap that lies in its image.
#pragma once

#include "../common/ptx.cuh"
#include "tile_sm80.h"

namespace convfirst::block_fusion::sm80 {

template <int kPixels>
struct TileRows {
  int* pixel;      // [kPixels] index of the pixel in the batch, -1 for rows beyond the tensor
  uint32_t* taps;  // [kPixels] bit ky * k + kx: the tap lies inside the image
  int* window;     // [kPixels] halo index of tap (0, 0)
};

// Where the block's tile begins.
struct TileOrigin {
  int row;     // batch row (rectangle)
  int column;  // rectangle
  int pixel;   // flat
};

__device__ __forceinline__ TileOrigin tile_origin(const Geometry& g) {
  const int tile = blockIdx.x;
  if (g.tile_height == 1) return {0, 0, tile * g.tile_width};
  return {tile / g.strips * g.tile_height, tile % g.strips * g.tile_width, 0};
}

template <int kPixels, int kThreads>
__device__ __forceinline__ void fill_tile_rows(const BlockParams& p, const TileOrigin& origin, const TileRows<kPixels>& rows) {
  const Geometry& g = p.geometry;
  const int pad = p.kernel_size / 2;
  for (int r = threadIdx.x; r < kPixels; r += kThreads) {
    int row, x, window;
    if (g.tile_height == 1) {
      row = (origin.pixel + r) / p.width;
      x = (origin.pixel + r) % p.width;
      window = r;
    } else {
      const int local = r / g.tile_width;
      row = origin.row + local;
      x = origin.column + r % g.tile_width;
      window = local * g.pitch + r % g.tile_width;
    }
    const bool valid = row < p.rows && x < p.width;
    const int y = row % p.height;
    uint32_t taps = 0;
    if (p.kernel_size <= 5) {  // the depthwise stage finds its rows' limits itself
      for (int ky = 0; ky < p.kernel_size; ++ky)
        for (int kx = 0; kx < p.kernel_size; ++kx) {
          const bool inside = static_cast<unsigned>(y + ky - pad) < static_cast<unsigned>(p.height) &&
                              static_cast<unsigned>(x + kx - pad) < static_cast<unsigned>(p.width);
          taps |= static_cast<uint32_t>(inside) << (ky * p.kernel_size + kx);
        }
    }
    rows.pixel[r] = valid ? row * p.width + x : -1;
    rows.taps[r] = valid ? taps : 0u;
    rows.window[r] = window;
  }
}

// Issues the copies of one slice; the caller commits.
template <typename T, int kSlice, int kThreads>
__device__ __forceinline__ void load_slice(const BlockParams& p, const TileOrigin& origin, uint32_t halo, int slice) {
  constexpr int kChunks = kSlice / 8;
  const Geometry& g = p.geometry;
  const int pad = p.kernel_size / 2;
  const T* x = static_cast<const T*>(p.t.x);
  for (int i = threadIdx.x; i < g.halo_pixels * kChunks; i += kThreads) {
    const int h = i / kChunks, chunk = i % kChunks;
    const int channel = slice * kSlice + chunk * 8;
    int pixel;
    bool valid = channel < p.channels;
    if (g.tile_height == 1) {
      pixel = origin.pixel - pad * p.width - pad + h;
      valid = valid && static_cast<unsigned>(pixel) < static_cast<unsigned>(p.pixels);
    } else {
      const int halo_row = static_cast<int>((h * g.inverse_pitch) >> 16);
      const int row = origin.row - pad + halo_row;
      const int column = origin.column - pad + h - halo_row * g.pitch;
      pixel = row * p.width + column;
      valid = valid && static_cast<unsigned>(row) < static_cast<unsigned>(p.rows) &&
              static_cast<unsigned>(column) < static_cast<unsigned>(p.width);
    }
    const T* source = valid ? x + static_cast<size_t>(pixel) * p.channels + channel : x;
    ptx::cp_async16(halo + h * row_bytes(kSlice) + chunk * 16, source, valid);
  }
}

// Grouped convolution of one slice on tensor cores. One item is one group of channels for half of the tile's rows. Group width
// 8: two taps make one k = 16 (the last one alone, against zero weights); group width 16: one tap is one k = 16.
template <typename T, int kTaps1d, int kGroup, int kPixels, int kSlice, int kThreads>
__device__ __forceinline__ void grouped_conv_slice(const BlockParams& p, uint32_t halo, uint32_t zero,
                                                   const TileRows<kPixels>& rows, unsigned char* a, int a_pitch, int slice) {
  constexpr int kTaps = kTaps1d * kTaps1d;
  constexpr int kPair = kGroup == 8 ? 2 : 1;
  constexpr int kSteps = (kTaps + kPair - 1) / kPair;
  constexpr int kColumns = kGroup / 8;  // n8 blocks
  constexpr int kBlocks = kPixels / 32;  // m16 blocks an item
  constexpr int kUnroll = kSteps <= 13 ? kSteps : 5;
  constexpr int kPixelBytes = row_bytes(kSlice);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int half = lane / 16;  // which k half of A this lane addresses
  const int g = lane / 4, t = lane % 4;
  const T* weight = static_cast<const T*>(p.t.conv_weight);

  for (int item = warp; item < kSlice / kGroup * 2; item += kThreads / 32) {
    const int local = item / 2 * kGroup;
    const int channel = slice * kSlice + local;
    const int first = item % 2 * kBlocks;
    uint32_t base[kBlocks], taps[kBlocks];
    float acc[kBlocks][kColumns][4];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int r = (first + i) * 16 + lane % 16;
      base[i] = halo + rows.window[r] * kPixelBytes + local * 2 + (kGroup == 16 ? half * 16 : 0);
      taps[i] = rows.taps[r] >> (kGroup == 8 ? half : 0);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int c = channel + n * 8 + t * 2;
      const float b0 = p.t.conv_bias ? p.t.conv_bias[c] : 0.f, b1 = p.t.conv_bias ? p.t.conv_bias[c + 1] : 0.f;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        acc[i][n][0] = acc[i][n][2] = b0;
        acc[i][n][1] = acc[i][n][3] = b1;
      }
    }
#pragma unroll kUnroll
    for (int step = 0; step < kSteps; ++step) {
      const int tap = step * kPair;
      uint32_t b[kColumns][2];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const T* w = weight + (static_cast<size_t>(tap) * p.channels + channel + n * 8 + g) * kGroup + t * 2;
        b[n][0] = __ldg(reinterpret_cast<const uint32_t*>(w));
        if (kGroup == 16) {
          b[n][1] = __ldg(reinterpret_cast<const uint32_t*>(w + 8));
        } else {
          b[n][1] = tap + 1 < kTaps ? __ldg(reinterpret_cast<const uint32_t*>(w + static_cast<size_t>(p.channels) * kGroup)) : 0u;
        }
      }
      const int this_tap = (tap / kTaps1d * p.geometry.pitch + tap % kTaps1d) * kPixelBytes;
      const int next_tap = ((tap + 1) / kTaps1d * p.geometry.pitch + (tap + 1) % kTaps1d) * kPixelBytes;
      const int offset = kGroup == 8 && half ? next_tap : this_tap;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        uint32_t fragment[4];
        ptx::ldmatrix_x4(fragment, (taps[i] >> tap) & 1u ? base[i] + offset : zero);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) ptx::mma_16816<T>(acc[i][n], fragment, b[n][0], b[n][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        unsigned char* out = a + ((first + i) * 16 + g) * a_pitch + (channel + n * 8 + t * 2) * 2;
        *reinterpret_cast<uint32_t*>(out) = ptx::pack2<T>(acc[i][n][0], acc[i][n][1]);
        *reinterpret_cast<uint32_t*>(out + 8 * a_pitch) = ptx::pack2<T>(acc[i][n][2], acc[i][n][3]);
      }
  }
}

// Depthwise 7x7 of one slice on CUDA cores: a thread owns two channels of 4x4 pixels, so an input row of ten pixels, once in
// registers, serves up to four output rows, and a weight sixteen pixels. fp32 throughout.
template <typename T, int kPixels, int kSlice, int kThreads>
__device__ __forceinline__ void depthwise_conv_slice(const BlockParams& p, const TileOrigin& origin, const unsigned char* halo,
                                                     unsigned char* a, int a_pitch, int slice) {
  constexpr int kK = 7, kPad = 3, kPairs = kSlice / 2, kBlocks = kPixels / 16;
  constexpr int kPixelBytes = row_bytes(kSlice);
  const Geometry& g = p.geometry;
  const int blocks_across = g.tile_width / 4;

  for (int item = threadIdx.x; item < kBlocks * kPairs; item += kThreads) {
    const int pair = item % kPairs, block = item / kPairs;
    const int channel = slice * kSlice + pair * 2;
    if (channel >= p.channels) continue;
    const int by = block / blocks_across * 4, bx = block % blocks_across * 4;

    uint32_t weight[kK * kK];
    const T* w = static_cast<const T*>(p.t.conv_weight) + channel;
#pragma unroll
    for (int tap = 0; tap < kK * kK; ++tap)
      weight[tap] = __ldg(reinterpret_cast<const uint32_t*>(w + static_cast<size_t>(tap) * p.channels));

    uint32_t inside[4];  // bit dy: that input row lies in the output row's image
    int y = (origin.row + by) % p.height;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int low = max(0, kPad - y), high = min(kK, p.height + kPad - y);
      inside[i] = ((1u << high) - 1u) & ~((1u << low) - 1u);
      y = y + 1 == p.height ? 0 : y + 1;
    }

    float2 acc[4][4];
    const float b0 = p.t.conv_bias ? p.t.conv_bias[channel] : 0.f, b1 = p.t.conv_bias ? p.t.conv_bias[channel + 1] : 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = make_float2(b0, b1);

    const unsigned char* window = halo + (by * g.pitch + bx) * kPixelBytes + pair * 4;
#pragma unroll
    for (int row = 0; row < 4 + kK - 1; ++row) {
      float2 in[4 + kK - 1];
#pragma unroll
      for (int j = 0; j < 4 + kK - 1; ++j)
        in[j] = ptx::unpack2<T>(*reinterpret_cast<const uint32_t*>(window + (row * g.pitch + j) * kPixelBytes));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int dy = row - i;
        if (dy < 0 || dy >= kK) continue;
        if (!((inside[i] >> dy) & 1u)) continue;
#pragma unroll
        for (int dx = 0; dx < kK; ++dx) {
          const float2 tap = ptx::unpack2<T>(weight[dy * kK + dx]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            acc[i][j].x = fmaf(in[j + dx].x, tap.x, acc[i][j].x);
            acc[i][j].y = fmaf(in[j + dx].y, tap.y, acc[i][j].y);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        *reinterpret_cast<uint32_t*>(a + ((by + i) * g.tile_width + bx + j) * a_pitch + channel * 2) =
            ptx::pack2<T>(acc[i][j].x, acc[i][j].y);
  }
}

// The whole convolution: x of the block's tile -> a [kPixels][channels] in shared memory, bias added, rounded to T once. The
// ring of slices starts at `region`; on return every thread may overwrite it.
template <typename T, bool kDepthwise, int kPixels, int kSlice, int kThreads>
__device__ __forceinline__ void conv_stage(const BlockParams& p, const TileOrigin& origin, const TileRows<kPixels>& rows,
                                           unsigned char* region, uint32_t zero, unsigned char* a, int a_pitch) {
  const uint32_t ring = ptx::smem_address(region);
  const int slice_bytes = p.geometry.halo_pixels * row_bytes(kSlice);
  const int slices = (p.channels + kSlice - 1) / kSlice;
  for (int s = 0; s < p.buffers; ++s) {
    if (s < slices) load_slice<T, kSlice, kThreads>(p, origin, ring + s * slice_bytes, s);
    ptx::cp_async_commit();
  }
  int buffer = 0;
  for (int s = 0; s < slices; ++s) {
    ptx::cp_async_wait(p.buffers - 1);
    __syncthreads();  // slice s and, the first time, the rows' table
    const int offset = buffer * slice_bytes;
    if constexpr (kDepthwise) {
      depthwise_conv_slice<T, kPixels, kSlice, kThreads>(p, origin, region + offset, a, a_pitch, s);
    } else {
      if (p.kernel_size == 3 && p.group_width == 8) {
        grouped_conv_slice<T, 3, 8, kPixels, kSlice, kThreads>(p, ring + offset, zero, rows, a, a_pitch, s);
      } else if (p.kernel_size == 3) {
        grouped_conv_slice<T, 3, 16, kPixels, kSlice, kThreads>(p, ring + offset, zero, rows, a, a_pitch, s);
      } else if (p.group_width == 8) {
        grouped_conv_slice<T, 5, 8, kPixels, kSlice, kThreads>(p, ring + offset, zero, rows, a, a_pitch, s);
      } else {
        grouped_conv_slice<T, 5, 16, kPixels, kSlice, kThreads>(p, ring + offset, zero, rows, a, a_pitch, s);
      }
    }
    __syncthreads();
    if (s + p.buffers < slices) load_slice<T, kSlice, kThreads>(p, origin, ring + offset, s + p.buffers);
    ptx::cp_async_commit();
    buffer = buffer + 1 == p.buffers ? 0 : buffer + 1;
  }
}

// LayerNorm over channels of every row, in fp32, kLanes lanes a row; weight and bias are float [channels] in shared memory.
// `store(row, chunk, value)` receives eight normalised channels at a time.
template <typename T, int kPixels, int kLanes, int kChunks, int kThreads, typename Store>
__device__ __forceinline__ void layer_norm_rows(const unsigned char* a, int a_pitch, int channels, const float* weight,
                                                const float* bias, float eps, Store store) {
  constexpr int kRowsAtOnce = kThreads / kLanes;
  const int part = threadIdx.x % kLanes;
  for (int row = threadIdx.x / kLanes; row < kPixels; row += kRowsAtOnce) {
    float v[kChunks][8];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = part + i * kLanes;
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (chunk * 8 < channels) raw = *reinterpret_cast<const uint4*>(a + row * a_pitch + chunk * 16);
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 f = ptx::unpack2<T>(words[j]);
        v[i][2 * j] = f.x;
        v[i][2 * j + 1] = f.y;
        sum += f.x + f.y;
      }
    }
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    const float mean = sum / channels;
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if ((part + i * kLanes) * 8 < channels)
#pragma unroll
        for (int j = 0; j < 8; ++j) square = fmaf(v[i][j] - mean, v[i][j] - mean, square);
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) square += __shfl_xor_sync(0xffffffffu, square, d);
    const float scale = rsqrtf(square / channels + eps);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = part + i * kLanes;
      if (chunk * 8 >= channels) continue;
      float n[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) n[j] = (v[i][j] - mean) * scale * weight[chunk * 8 + j] + bias[chunk * 8 + j];
      store(row, chunk, make_uint4(ptx::pack2<T>(n[0], n[1]), ptx::pack2<T>(n[2], n[3]), ptx::pack2<T>(n[4], n[5]),
                                   ptx::pack2<T>(n[6], n[7])));
    }
  }
}

}  // namespace convfirst::block_fusion::sm80
