// The 3x3 convolution of a chunk of hidden channels, from shared memory to shared memory: + bias, activation, rounded once.
//
// Input [halo pixel][chunk] holds zeros where there is no pixel; taps beyond an image's first or last row, where the tile goes
// on with the next image, are masked here. Filters [tap][chunk][group width].
#pragma once

#include "../block_fusion/conv_stage_sm80.cuh"
#include "../block_fusion/matmul_stage_sm80.cuh"
#include "tile_sm80.h"

namespace convfirst::mbconv::sm80 {

template <typename T>
struct ConvOperands {
  const unsigned char* hidden;
  const T* filter;
  const float* bias;  // [chunk]
  unsigned char* a;   // [pixels][chunk]
};

// Grouped, on tensor cores. Width 8: two taps make one k = 16, the ninth alone against zeros; width 16: a tap is one k = 16. A
// warp's item is one group of kRows m16 blocks of pixels. `zero` is the address of 16 bytes of zeros.
template <typename T, int kGroup, int kPixels, int kChunk, int kThreads>
__device__ __forceinline__ void grouped_conv(const ConvOperands<T>& o, const block_fusion::sm80::TileRows<kPixels>& rows,
                                             int halo_pitch, uint32_t zero, int activation) {
  constexpr int kPitch = row_bytes(kChunk);
  constexpr int kPair = kGroup == 8 ? 2 : 1, kSteps = (kTaps + kPair - 1) / kPair, kColumns = kGroup / 8;
  constexpr int kGroups = kChunk / kGroup;
  constexpr int kRows = kPixels / 32 * kGroups >= kThreads / 32 ? 2 : 1;  // two share a filter's loads, unless warps would idle
  constexpr int kItems = kPixels / 16 / kRows * kGroups;
  constexpr int kTapStride = kChunk * kGroup;
  const int lane = threadIdx.x % 32, half = lane / 16;  // half: which k half of A this lane addresses
  const int g = lane / 4, t = lane % 4;

  for (int item = threadIdx.x / 32; item < kItems; item += kThreads / 32) {
    const int channel = item % kGroups * kGroup, first = item / kGroups * kRows * 16;
    uint32_t base[kRows], taps[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const int r = first + m * 16 + lane % 16;
      base[m] = ptx::smem_address(o.hidden) + rows.window[r] * kPitch + channel * 2 + (kGroup == 16 ? half * 16 : 0);
      taps[m] = rows.taps[r] >> (kGroup == 8 ? half : 0);
    }
    float acc[kRows][kColumns][4];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float2 b = *reinterpret_cast<const float2*>(o.bias + channel + n * 8 + t * 2);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        acc[m][n][0] = acc[m][n][2] = b.x;
        acc[m][n][1] = acc[m][n][3] = b.y;
      }
    }
    const T* filter = o.filter + (channel + g) * kGroup + t * 2;
    auto word = [&](int tap, int offset) { return *reinterpret_cast<const uint32_t*>(filter + tap * kTapStride + offset); };
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int tap = step * kPair;
      uint32_t b[kColumns][2];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        b[n][0] = word(tap, n * 8 * kGroup);
        b[n][1] = kGroup == 16 ? word(tap, n * 8 * kGroup + 8) : tap + 1 < kTaps ? word(tap + 1, n * 8 * kGroup) : 0u;
      }
      const int this_tap = (tap / 3 * halo_pitch + tap % 3) * kPitch;
      const int next_tap = ((tap + 1) / 3 * halo_pitch + (tap + 1) % 3) * kPitch;
      const int offset = kGroup == 8 && half ? next_tap : this_tap;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        uint32_t fragment[4];
        ptx::ldmatrix_x4(fragment, (taps[m] >> tap) & 1u ? base[m] + offset : zero);  // bit 9, a tenth tap, is never set
#pragma unroll
        for (int n = 0; n < kColumns; ++n) ptx::mma_16816<T>(acc[m][n], fragment, b[n][0], b[n][1]);
      }
    }
    block_fusion::sm80::activate(acc, activation);
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        unsigned char* to = o.a + (first + m * 16 + g) * kPitch + (channel + n * 8 + t * 2) * 2;
        *reinterpret_cast<uint32_t*>(to) = ptx::pack2<T>(acc[m][n][0], acc[m][n][1]);
        *reinterpret_cast<uint32_t*>(to + 8 * kPitch) = ptx::pack2<T>(acc[m][n][2], acc[m][n][3]);
      }
  }
}

// Depthwise, on CUDA cores in fp32: a thread owns two channels of kRows x kColumns pixels, so that a row of input pixels, once
// in registers, serves up to three output rows.
template <typename T, int kRows, int kColumns, int kPixels, int kChunk, int kThreads>
__device__ __forceinline__ void depthwise_conv(const ConvOperands<T>& o, const BlockParams& p,
                                               const block_fusion::sm80::TileOrigin& origin) {
  constexpr int kPairs = kChunk / 2, kItems = kPixels / (kColumns * kRows) * kPairs, kPitch = row_bytes(kChunk);
  const Geometry& g = p.geometry;
  const int blocks_across = g.tile_width / kColumns;

  for (int item = threadIdx.x; item < kItems; item += kThreads) {
    const int channel = item % kPairs * 2, block = item / kPairs;
    const int by = block / blocks_across * kRows, bx = block % blocks_across * kColumns;
    float2 weight[kTaps];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
      weight[tap] = ptx::unpack2<T>(*reinterpret_cast<const uint32_t*>(o.filter + tap * kChunk + channel));
    const float2 bias = *reinterpret_cast<const float2*>(o.bias + channel);

    uint32_t inside[kRows];             // bit dy: that input row lies in the output row's image
    float acc[kRows][kColumns / 2][4];  // [row][pixel / 2][pixel % 2 * 2 + channel]
    int y = (origin.row + by) % p.height;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      inside[i] = block_fusion::sm80::inside_window(y, p.height, 3);
      y = y + 1 == p.height ? 0 : y + 1;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        acc[i][j / 2][j % 2 * 2] = bias.x;
        acc[i][j / 2][j % 2 * 2 + 1] = bias.y;
      }
    }

    const unsigned char* window = o.hidden + (by * g.pitch + bx) * kPitch + channel * 2;
#pragma unroll
    for (int row = 0; row < kRows + 2; ++row) {
      float2 in[kColumns + 2];
#pragma unroll
      for (int j = 0; j < kColumns + 2; ++j)
        in[j] = ptx::unpack2<T>(*reinterpret_cast<const uint32_t*>(window + (row * g.pitch + j) * kPitch));
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int dy = row - i;
        if (dy < 0 || dy >= 3) continue;
        if (!((inside[i] >> dy) & 1u)) continue;
#pragma unroll
        for (int dx = 0; dx < 3; ++dx)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            float(&sum)[4] = acc[i][j / 2];
            sum[j % 2 * 2] = fmaf(in[j + dx].x, weight[dy * 3 + dx].x, sum[j % 2 * 2]);
            sum[j % 2 * 2 + 1] = fmaf(in[j + dx].y, weight[dy * 3 + dx].y, sum[j % 2 * 2 + 1]);
          }
      }
    }
    block_fusion::sm80::activate(acc, p.activation);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        *reinterpret_cast<uint32_t*>(o.a + ((by + i) * g.tile_width + bx + j) * kPitch + channel * 2) =
            ptx::pack2<T>(acc[i][j / 2][j % 2 * 2], acc[i][j / 2][j % 2 * 2 + 1]);
  }
}

}  // namespace convfirst::mbconv::sm80
