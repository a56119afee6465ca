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

// Bit i of a filter's k taps along one axis: position - k / 2 + i lies in [0, extent).
__device__ __forceinline__ uint32_t inside_window(int position, int extent, int k) {
  const int low = max(0, k / 2 - position), high = max(low, min(k, extent + k / 2 - position));
  return ((1u << high) - 1u) & ~((1u << low) - 1u);
}

template <int kPixels, int kThreads>
__device__ __forceinline__ void fill_tile_rows(const BlockParams& p, const TileOrigin& origin, const TileRows<kPixels>& rows) {
  const Geometry& g = p.geometry;
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
      const int k = p.kernel_size;
      const uint32_t columns = g.tile_height == 1 ? inside_window(x, p.width, k) : (1u << k) - 1u;  // else zeros in the halo
      const uint32_t lines = inside_window(y, p.height, k);
#pragma unroll
      for (int ky = 0; ky < 5; ++ky) taps |= (lines >> ky) & 1u ? columns << (ky * k) : 0u;
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
  const int chunk = threadIdx.x % kChunks;
  const int channel = slice * kSlice + chunk * 8;
  const bool exists = channel < p.channels;
  x += exists ? channel : 0;
  uint32_t to = halo + threadIdx.x / kChunks * row_bytes(kSlice) + chunk * 16;
  if (g.tile_height == 1) {
    const int first = origin.pixel - pad * p.width - pad;
#pragma unroll 4
    for (int h = threadIdx.x / kChunks; h < g.halo_pixels; h += kThreads / kChunks) {
      const int pixel = first + h;
      const bool valid = exists && static_cast<unsigned>(pixel) < static_cast<unsigned>(p.pixels);
      ptx::cp_async16(to, x + static_cast<size_t>(valid ? pixel : 0) * p.channels, valid);
      to += kThreads / kChunks * row_bytes(kSlice);
    }
  } else {
#pragma unroll 4
    for (int h = threadIdx.x / kChunks; h < g.halo_pixels; h += kThreads / kChunks) {
      const int halo_row = static_cast<int>((h * g.inverse_pitch) >> 16);
      const int row = origin.row - pad + halo_row;
      const int column = origin.column - pad + h - halo_row * g.pitch;
      const bool valid = exists && static_cast<unsigned>(row) < static_cast<unsigned>(p.rows) &&
                         static_cast<unsigned>(column) < static_cast<unsigned>(p.width);
      ptx::cp_async16(to, x + static_cast<size_t>(valid ? row * p.width + column : 0) * p.channels, valid);
      to += kThreads / kChunks * row_bytes(kSlice);
    }
  }
}

// B fragments of one group's filter: kSteps k16 steps of kColumns n8 blocks. Group width 8: two taps make one k = 16 (the last
// one alone, against zero weights); group width 16: one tap is one k = 16.
template <typename T, int kTaps1d, int kGroup>
struct GroupFilter {
  static constexpr int kTaps = kTaps1d * kTaps1d;
  static constexpr int kPair = kGroup == 8 ? 2 : 1;
  static constexpr int kSteps = (kTaps + kPair - 1) / kPair;
  static constexpr int kColumns = kGroup / 8;
  static constexpr bool kWhole = kSteps * kColumns <= 5;  // small enough to hold two of them in registers
  uint32_t b[kWhole ? kSteps : 1][kColumns][2];
  float bias[kColumns][2];

  __device__ __forceinline__ void load_step(const BlockParams& p, int channel, int step, uint32_t (&to)[kColumns][2]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, tap = step * kPair;
    const T* w = static_cast<const T*>(p.t.conv_weight) + (tap * p.channels + channel + g) * kGroup + t * 2;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      to[n][0] = __ldg(reinterpret_cast<const uint32_t*>(w + n * 8 * kGroup));
      if (kGroup == 16) {
        to[n][1] = __ldg(reinterpret_cast<const uint32_t*>(w + n * 8 * kGroup + 8));
      } else {
        to[n][1] = tap + 1 < kTaps ? __ldg(reinterpret_cast<const uint32_t*>(w + p.channels * kGroup)) : 0u;
      }
    }
  }

  __device__ __forceinline__ void load(const BlockParams& p, int channel) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int c = channel + n * 8 + threadIdx.x % 4 * 2;
      bias[n][0] = p.t.conv_bias ? __ldg(p.t.conv_bias + c) : 0.f;
      bias[n][1] = p.t.conv_bias ? __ldg(p.t.conv_bias + c + 1) : 0.f;
    }
    if constexpr (kWhole) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_step(p, channel, step, b[step]);
    }
  }
};

// Grouped convolution of one slice on tensor cores. A warp keeps half of the tile's rows and walks over groups of channels; the
// next group's filter is fetched under this one's products. kMasked: some tap of these rows lies outside the image.
template <typename T, int kTaps1d, int kGroup, int kPixels, int kSlice, int kThreads, bool kMasked>
__device__ __forceinline__ void grouped_conv_rows(const BlockParams& p, const uint32_t (&base)[kPixels / 32],
                                                  const uint32_t (&taps)[kPixels / 32], uint32_t zero, unsigned char* a,
                                                  int a_pitch, int slice) {
  using Filter = GroupFilter<T, kTaps1d, kGroup>;
  constexpr int kColumns = Filter::kColumns;
  constexpr int kBlocks = kPixels / 32;  // m16 blocks of half a tile
  constexpr bool kPrefetch = Filter::kWhole;
  constexpr int kUnroll = kPrefetch ? Filter::kSteps : kTaps1d;
  constexpr int kPixelBytes = row_bytes(kSlice);
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int half = lane / 16;  // which k half of A this lane addresses
  const int g = lane / 4, t = lane % 4;

  const int end = min(kSlice, p.channels - slice * kSlice);
  int local = warp / 2 * kGroup;
  Filter filter, next;
  if (kPrefetch && local < end) filter.load(p, slice * kSlice + local);
  for (; local < end; local += kWarps / 2 * kGroup) {
    const int channel = slice * kSlice + local;
    if constexpr (kPrefetch) {
      if (local + kWarps / 2 * kGroup < end) next.load(p, channel + kWarps / 2 * kGroup);
    } else {
      filter.load(p, channel);
    }
    float acc[kBlocks][kColumns][4];
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        acc[i][n][0] = acc[i][n][2] = filter.bias[n][0];
        acc[i][n][1] = acc[i][n][3] = filter.bias[n][1];
      }
#pragma unroll kUnroll
    for (int step = 0; step < Filter::kSteps; ++step) {
      uint32_t b[kColumns][2];
      if constexpr (!kPrefetch) filter.load_step(p, channel, step, b);
      const int tap = step * Filter::kPair;
      const int this_tap = (tap / kTaps1d * p.geometry.pitch + tap % kTaps1d) * kPixelBytes;
      const int next_tap = ((tap + 1) / kTaps1d * p.geometry.pitch + (tap + 1) % kTaps1d) * kPixelBytes;
      // Beyond the last tap any address in the halo does: its weights are zero, but what it reads must be finite.
      const bool beyond = kGroup == 8 && tap + 1 >= Filter::kTaps;
      const int offset = (kGroup == 8 && half && !beyond ? next_tap : this_tap) + local * 2;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        uint32_t fragment[4];
        const bool inside = !kMasked || (taps[i] >> tap) & 1u;
        ptx::ldmatrix_x4(fragment, inside ? base[i] + offset : zero);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          if constexpr (kPrefetch) {
            ptx::mma_16816<T>(acc[i][n], fragment, filter.b[step][n][0], filter.b[step][n][1]);
          } else {
            ptx::mma_16816<T>(acc[i][n], fragment, b[n][0], b[n][1]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        unsigned char* out = a + ((warp % 2 * kBlocks + i) * 16 + g) * a_pitch + (channel + n * 8 + t * 2) * 2;
        *reinterpret_cast<uint32_t*>(out) = ptx::pack2<T>(acc[i][n][0], acc[i][n][1]);
        *reinterpret_cast<uint32_t*>(out + 8 * a_pitch) = ptx::pack2<T>(acc[i][n][2], acc[i][n][3]);
      }
    if constexpr (kPrefetch) filter = next;
  }
}

template <typename T, int kTaps1d, int kGroup, int kPixels, int kSlice, int kThreads>
__device__ __forceinline__ void grouped_conv_slice(const BlockParams& p, uint32_t halo, uint32_t zero,
                                                   const TileRows<kPixels>& rows, unsigned char* a, int a_pitch, int slice) {
  constexpr int kBlocks = kPixels / 32;
  const int lane = threadIdx.x % 32, half = lane / 16;
  uint32_t base[kBlocks], taps[kBlocks];
  bool all = true;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const int r = (threadIdx.x / 32 % 2 * kBlocks + i) * 16 + lane % 16;
    base[i] = halo + rows.window[r] * row_bytes(kSlice) + (kGroup == 16 ? half * 16 : 0);
    taps[i] = rows.taps[r];
    all = all && taps[i] == (1u << (kTaps1d * kTaps1d)) - 1u;
    taps[i] >>= kGroup == 8 ? half : 0;
  }
  if (__all_sync(0xffffffffu, all)) {
    grouped_conv_rows<T, kTaps1d, kGroup, kPixels, kSlice, kThreads, false>(p, base, taps, zero, a, a_pitch, slice);
  } else {
    grouped_conv_rows<T, kTaps1d, kGroup, kPixels, kSlice, kThreads, true>(p, base, taps, zero, a, a_pitch, slice);
  }
}

// Depthwise 7x7 of one slice on CUDA cores: a thread owns two channels of 4x4 pixels, so an input row of ten pixels, once in
// registers, serves up to four output rows, and a weight sixteen pixels. fp32 throughout.
template <typename T, int kPixels, int kSlice, int kThreads>
__device__ __forceinline__ void depthwise_conv_slice(const BlockParams& p, const TileOrigin& origin, const unsigned char* halo,
                                                     unsigned char* a, int a_pitch, int slice) {
  constexpr int kK = 7, kPairs = kSlice / 2, kBlocks = kPixels / 16;
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
      inside[i] = inside_window(y, p.height, kK);
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
// ring of slices starts at `region`; on return every thread may overwrite it. meanwhile() runs while the first copies fly; what it
// writes to shared memory is there when the first slice is.
template <typename T, bool kDepthwise, int kPixels, int kSlice, int kThreads, typename Meanwhile>
__device__ __forceinline__ void conv_stage(const BlockParams& p, const TileOrigin& origin, const TileRows<kPixels>& rows,
                                           unsigned char* region, uint32_t zero, unsigned char* a, int a_pitch, Meanwhile meanwhile) {
  const uint32_t ring = ptx::smem_address(region);
  const int slice_bytes = p.geometry.halo_pixels * row_bytes(kSlice);
  const int slices = (p.channels + kSlice - 1) / kSlice;
  for (int s = 0; s < p.buffers; ++s) {
    if (s < slices) load_slice<T, kSlice, kThreads>(p, origin, ring + s * slice_bytes, s);
    ptx::cp_async_commit();
  }
  fill_tile_rows<kPixels, kThreads>(p, origin, rows);
  meanwhile();
  int buffer = 0;
  for (int s = 0; s < slices; ++s) {
    ptx::cp_async_wait(p.buffers - 1);
    __syncthreads();  // slice s and, the first time, the rows' table and what meanwhile() wrote
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

// LayerNorm over channels of every row, in fp32, kLanes lanes a row and kBatch rows at once, so that one row's shuffles hide
// another's; weight and bias are float [channels] in shared memory. `store(row, chunk, value)` receives eight normalised
// channels at a time.
template <typename T, int kPixels, int kLanes, int kChunks, int kBatch, int kThreads, typename Store>
__device__ __forceinline__ void layer_norm_rows(const unsigned char* a, int a_pitch, int channels, const float* weight,
                                                const float* bias, float eps, Store store) {
  constexpr int kRowsAtOnce = kThreads / kLanes;
  static_assert(kPixels % (kRowsAtOnce * kBatch) == 0, "whole warps shuffle");
  const int part = threadIdx.x % kLanes;
  const float inverse = 1.f / channels;
  for (int first = threadIdx.x / kLanes; first < kPixels; first += kRowsAtOnce * kBatch) {
    float v[kBatch][kChunks][8], sum[kBatch], square[kBatch];
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      sum[r] = 0.f;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int chunk = part + i * kLanes;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (chunk * 8 < channels) raw = *reinterpret_cast<const uint4*>(a + (first + r * kRowsAtOnce) * a_pitch + chunk * 16);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 f = ptx::unpack2<T>(words[j]);
          v[r][i][2 * j] = f.x;
          v[r][i][2 * j + 1] = f.y;
          sum[r] += f.x + f.y;
        }
      }
    }
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2)
#pragma unroll
      for (int r = 0; r < kBatch; ++r) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], d);
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      const float mean = sum[r] * inverse;
      square[r] = 0.f;
#pragma unroll
      for (int i = 0; i < kChunks; ++i)
        if ((part + i * kLanes) * 8 < channels)
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            v[r][i][j] -= mean;
            square[r] = fmaf(v[r][i][j], v[r][i][j], square[r]);
          }
    }
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2)
#pragma unroll
      for (int r = 0; r < kBatch; ++r) square[r] += __shfl_xor_sync(0xffffffffu, square[r], d);
#pragma unroll
    for (int r = 0; r < kBatch; ++r) square[r] = rsqrtf(fmaf(square[r], inverse, eps));
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = part + i * kLanes;
      if (chunk * 8 >= channels) continue;
      float scale[8], shift[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        scale[j] = weight[chunk * 8 + j];
        shift[j] = bias[chunk * 8 + j];
      }
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          words[j] = ptx::pack2<T>(fmaf(v[r][i][2 * j] * square[r], scale[2 * j], shift[2 * j]),
                                   fmaf(v[r][i][2 * j + 1] * square[r], scale[2 * j + 1], shift[2 * j + 1]));
        store(first + r * kRowsAtOnce, chunk, make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
}

}  // namespace convfirst::block_fusion::sm80
