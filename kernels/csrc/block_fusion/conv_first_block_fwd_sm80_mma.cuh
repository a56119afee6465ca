// The whole conv-first block of a tile of pixels in one launch, for sm_80 and newer: cp.async, ldmatrix, mma.sync m16n8k16.
//
//        x, a slice of channels with halo            a [pixels x C]            S = a W1^T [pixels x chunk]
//      +---------------------------+  convolution  +----------------+  W1    +-----------+
//      |  . . . . . . . . . . . .  |  + bias       |  warp 0: 32    |------> |  act(S)   |--+ W2, chunk after chunk
//      |  .  tile of pixels     .  |  ---------->  |  warp 1: 32    |        +-----------+  v
//      |  .                     .  |  LayerNorm    |  warp 2: 32    |        +----------------+
//      |  . . . . . . . . . . . .  |               |  warp 3: 32    |        | O [pixels x C] |--> y = x + scale (O + bias)
//      +---------------------------+               +----------------+        +----------------+
//
//   what                         where                                     size
//   x slices with halo           shared, region (before the products)      buffers x halo pixels x slice channels
//   a                            shared (registers too where C <= 64)      pixels x C
//   W1 and W2 chunks             shared, region: ring of slots             chunk x C, alternately C x chunk
//   S                            registers, fp32                           16 row_blocks x chunk / warps_n a warp
//   act(S)                       registers where one warp owns its rows,   pixels x chunk
//                                else shared, region
//   O                            registers, fp32                           16 row_blocks x C / warps_n a warp
//   x for the residual, then y   shared, over a                            pixels x C
//
// The hidden tensor exists a chunk at a time and never in device memory. C beyond the tensor's channels, and hidden units
// beyond the last, are zero-filled copies.
#pragma once

#include "conv_stage_sm80.cuh"
#include "copy_stage_sm80.cuh"
#include "matmul_stage_sm80.cuh"
#include "tile_sm80.h"

namespace convfirst::block_fusion::sm80 {

template <typename T, int kWidth, bool kDepthwise>
__global__ void __launch_bounds__(fused_tile(kWidth, kDepthwise).threads(), fused_tile(kWidth, kDepthwise).min_blocks)
    conv_first_block_fwd_sm80(const __grid_constant__ BlockParams p) {
  constexpr FusedTile kTile = fused_tile(kWidth, kDepthwise);
  constexpr FusedLayout kLayout = fused_layout(kWidth, kDepthwise);
  constexpr int kPixels = kTile.pixels(), kThreads = kTile.threads(), kChunk = kTile.hidden_chunk, kSlots = kTile.slots;
  constexpr int kRows = kTile.row_blocks;
  constexpr int kHiddenColumns = kChunk / kTile.warps_n / 8;  // n8 blocks of S a warp
  constexpr int kOutColumns = kWidth / kTile.warps_n / 8;     // n8 blocks of O a warp
  constexpr int kSteps1 = kWidth / 16, kSteps2 = kChunk / 16;
  constexpr int kPitchA = row_bytes(kWidth), kPitchP = row_bytes(kChunk);
  constexpr bool kRegisterA = kTile.warps_n == 1 && kWidth <= 64;
  static_assert(kThreads >= kChunk, "a thread a bias");
  static_assert(kHiddenColumns % 2 == 0 && kOutColumns % 2 == 0, "ldmatrix.x4 brings two n8 blocks");

  extern __shared__ __align__(128) unsigned char smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / kTile.warps_n, warp_n = warp % kTile.warps_n;
  const int first_row = warp_m * kRows * 16;

  const TileRows<kPixels> rows{reinterpret_cast<int*>(smem + kLayout.pixel), reinterpret_cast<uint32_t*>(smem + kLayout.taps),
                               reinterpret_cast<int*>(smem + kLayout.window)};
  float* norm_weight = reinterpret_cast<float*>(smem + kLayout.norm);
  float* norm_bias = norm_weight + kWidth;
  const TileOrigin origin = tile_origin(p.geometry);
  for (int c = threadIdx.x; c < kWidth; c += kThreads) {
    norm_weight[c] = p.t.norm_weight && c < p.channels ? p.t.norm_weight[c] : 1.f;
    norm_bias[c] = p.t.norm_bias && c < p.channels ? p.t.norm_bias[c] : 0.f;
  }
  float* scale = reinterpret_cast<float*>(smem + kLayout.project);
  float* shift = scale + kWidth;
  project_scale<kThreads>(p.t, 0, kWidth, p.channels, scale, shift);
  if (threadIdx.x < 4) reinterpret_cast<uint32_t*>(smem + kLayout.zero)[threadIdx.x] = 0u;
  if (p.channels < kWidth) {
    const int padding = (kWidth - p.channels) / 8;
    for (int i = threadIdx.x; i < kPixels * padding; i += kThreads)
      *reinterpret_cast<uint4*>(smem + i / padding * kPitchA + (p.channels + i % padding * 8) * 2) = make_uint4(0, 0, 0, 0);
  }

  conv_stage<T, kDepthwise, kPixels, kTile.slice, kThreads>(p, origin, rows, smem + kLayout.region,
                                                            ptx::smem_address(smem + kLayout.zero), smem, kPitchA);

  // The ring: half step 2j holds W1's chunk j, half step 2j + 1 holds W2's.
  const int chunks = (p.hidden + kChunk - 1) / kChunk;
  unsigned char* ring = smem + kLayout.region + kLayout.hidden;
  const uint32_t ring_address = ptx::smem_address(ring);
  const BlockCopy<T, kChunk, kWidth / 8, kThreads, kPitchA> copy_expand(p.t.expand_weight, 0, p.channels);
  const BlockCopy<T, kWidth, kChunk / 8, kThreads, kPitchP> copy_project(p.t.project_weight, 0, p.hidden);
  auto load_half_step = [&](int h) {
    const int j = h / 2;
    const uint32_t slot = ring_address + h % kSlots * kLayout.slot;
    if (j < chunks && h % 2 == 0) {
      copy_expand(slot, static_cast<size_t>(j * kChunk) * p.channels, p.hidden - j * kChunk, p.channels);
      const int unit = j * kChunk + threadIdx.x;
      const bool valid = p.t.expand_bias != nullptr && unit < p.hidden;
      if (threadIdx.x < kChunk)  // the biases, behind the chunk
        ptx::cp_async4(slot + kChunk * kPitchA + threadIdx.x * 4, valid ? p.t.expand_bias + unit : p.t.expand_weight, valid);
    } else if (j < chunks) {
      copy_project(slot, j * kChunk, p.channels, p.hidden - j * kChunk);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int h = 0; h < kSlots - 1; ++h) load_half_step(h);

  if (p.has_norm) {
    layer_norm_rows<T, kPixels, 8, (kWidth + 63) / 64, norm_batch(kWidth, kPixels, kThreads), kThreads>(
        smem, kPitchA, p.channels, norm_weight, norm_bias, p.t.eps,
        [&](int row, int chunk, uint4 value) { *reinterpret_cast<uint4*>(smem + row * kPitchA + chunk * 16) = value; });
    __syncthreads();
  }

  const SharedA<kRows> shared_a{ptx::smem_address(smem) + first_row * kPitchA + a_lane_offset(kPitchA), kPitchA};
  uint32_t register_a[kRegisterA ? kRows : 1][kRegisterA ? kSteps1 : 1][4];
  if constexpr (kRegisterA) {
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int step = 0; step < kSteps1; ++step)
        ptx::ldmatrix_x4(register_a[m][step], shared_a.address + m * 16 * kPitchA + step * 32);
  }

  unsigned char* hidden = smem + kLayout.region;  // act(S) of all warps, where warps share rows
  auto row_pixel = [&](int row) { return rows.pixel[first_row + row]; };
  const ResultTile<T, kRows, kOutColumns, decltype(row_pixel)> result{
      smem + first_row * kPitchA + warp_n * kOutColumns * 16, kPitchA, warp_n * kOutColumns * 8, p.channels, row_pixel};

  float out[kRows][kOutColumns][4];
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int n = 0; n < kOutColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][n][i] = 0.f;

  for (int j = 0; j < chunks; ++j) {
    ptx::cp_async_wait<kSlots - 2>();
    __syncthreads();  // W1's chunk is there; every warp is done with the slot that the next copy overwrites
    load_half_step(2 * j + kSlots - 1);

    const unsigned char* slot1 = ring + 2 * j % kSlots * kLayout.slot;
    float s[kRows][kHiddenColumns][4];
    const float* bias = reinterpret_cast<const float*>(slot1 + kChunk * kPitchA) + warp_n * kHiddenColumns * 8 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHiddenColumns; ++n) {
      const float2 b = *reinterpret_cast<const float2*>(bias + n * 8);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        s[m][n][0] = s[m][n][2] = b.x;
        s[m][n][1] = s[m][n][3] = b.y;
      }
    }
    const uint32_t b1 = ptx::smem_address(slot1) + warp_n * kHiddenColumns * 8 * kPitchA + b_lane_offset(kPitchA);
    if constexpr (kRegisterA) {
      multiply<T, kRows, kHiddenColumns, kSteps1, kSteps1>(s, RegisterA<kRows, kSteps1>{register_a}, b1, kPitchA);
    } else {
      multiply<T, kRows, kHiddenColumns, kSteps1, (kSteps1 <= 8 ? kSteps1 : 4)>(s, shared_a, b1, kPitchA);
    }
    activate(s, p.activation);

    uint32_t fragments[kTile.warps_n == 1 ? kRows : 1][kTile.warps_n == 1 ? kSteps2 : 1][4];
    if constexpr (kTile.warps_n == 1) {
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int n = 0; n < kHiddenColumns; ++n) {
          fragments[m][n / 2][n % 2 * 2] = ptx::pack2<T>(s[m][n][0], s[m][n][1]);
          fragments[m][n / 2][n % 2 * 2 + 1] = ptx::pack2<T>(s[m][n][2], s[m][n][3]);
        }
    } else {
      unsigned char* to = hidden + (first_row + lane / 4) * kPitchP + (warp_n * kHiddenColumns * 8 + lane % 4 * 2) * 2;
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int n = 0; n < kHiddenColumns; ++n) {
          *reinterpret_cast<uint32_t*>(to + m * 16 * kPitchP + n * 16) = ptx::pack2<T>(s[m][n][0], s[m][n][1]);
          *reinterpret_cast<uint32_t*>(to + (m * 16 + 8) * kPitchP + n * 16) = ptx::pack2<T>(s[m][n][2], s[m][n][3]);
        }
    }

    ptx::cp_async_wait<kSlots - 2>();
    __syncthreads();  // W2's chunk is there, and act(S) of the warps that share rows
    load_half_step(2 * j + kSlots);
    if (j == chunks - 1) {  // a is dead: its place takes the residual
      result.load(static_cast<const T*>(p.t.x));
      ptx::cp_async_commit();
    }

    const unsigned char* slot2 = ring + (2 * j + 1) % kSlots * kLayout.slot;
    const uint32_t b2 = ptx::smem_address(slot2) + warp_n * kOutColumns * 8 * kPitchP + b_lane_offset(kPitchP);
    if constexpr (kTile.warps_n == 1) {
      multiply<T, kRows, kOutColumns, kSteps2, kSteps2>(out, RegisterA<kRows, kSteps2>{fragments}, b2, kPitchP);
    } else {
      const SharedA<kRows> shared_p{ptx::smem_address(hidden) + first_row * kPitchP + a_lane_offset(kPitchP), kPitchP};
      multiply<T, kRows, kOutColumns, kSteps2, kSteps2>(out, shared_p, b2, kPitchP);
    }
  }

  ptx::cp_async_wait<0>();
  __syncwarp();
  result.add_residual(out, scale + result.channel, shift + result.channel, p.t.sample_scale, p.height * p.width);
  __syncwarp();
  result.store(static_cast<T*>(p.t.y));
}

}  // namespace convfirst::block_fusion::sm80
