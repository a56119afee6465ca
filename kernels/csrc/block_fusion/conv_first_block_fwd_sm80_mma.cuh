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
//   act(S)                       registers where one warp owns its rows    pixels x chunk
//                                (chunk_stage_sm80.cuh), else shared, region
//   O                            registers, fp32                           16 row_blocks x C / warps_n a warp
//   x for the residual           shared, over a                            pixels x C
//   y                            from registers to device memory where a   pixels x C
//                                warp owns its rows, else over x
//
// The hidden tensor exists a chunk at a time and never in device memory. C beyond the tensor's channels, and hidden units
// beyond the last, are zero-filled copies.
#pragma once

#include <type_traits>

#include "../common/again.cuh"
#include "chunk_stage_sm80.cuh"
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
  constexpr bool kOwnRows = kTile.warps_n == 1;
  constexpr bool kPaired = kOwnRows && kSlots == 4;           // W1's and W2's chunk are copied at once: a barrier a chunk
  constexpr bool kDirect = kOwnRows && kOutColumns % 4 == 0;  // the result goes from registers to device memory
  constexpr bool kRegisterA = kOwnRows && kWidth <= 64;
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
  const int channels = kDepthwise ? p.channels : kWidth;
  float* scale = reinterpret_cast<float*>(smem + kLayout.project);
  float* shift = scale + kWidth;
  conv_stage<T, kDepthwise, kPixels, kTile.slice, kThreads>(
      p, origin, rows, smem + kLayout.region, ptx::smem_address(smem + kLayout.zero), smem, kPitchA, [&] {
        for (int c = threadIdx.x; c < kWidth; c += kThreads) {
          norm_weight[c] = p.t.norm_weight && c < p.channels ? p.t.norm_weight[c] : 1.f;
          norm_bias[c] = p.t.norm_bias && c < p.channels ? p.t.norm_bias[c] : 0.f;
        }
        project_scale<kThreads>(p.t, 0, kWidth, p.channels, scale, shift);
        if (threadIdx.x < 4) reinterpret_cast<uint32_t*>(smem + kLayout.zero)[threadIdx.x] = 0u;
        if (p.channels < kWidth) {
          const int padding = (kWidth - p.channels) / 8;
          for (int i = threadIdx.x; i < kPixels * padding; i += kThreads)
            *reinterpret_cast<uint4*>(smem + i / padding * kPitchA + (p.channels + i % padding * 8) * 2) = make_uint4(0, 0, 0, 0);
        }
      });

  // The ring: half step 2j holds W1's chunk j, half step 2j + 1 holds W2's. Beyond the last chunk nothing exists: zeros.
  unsigned char* ring = smem + kLayout.region + kLayout.hidden;
  const uint32_t ring_address = ptx::smem_address(smem) + kLayout.region + kLayout.hidden;
  const auto slot_of = [&](int h) { return h % kSlots * kLayout.slot; };
  // Of the next two, the caller commits. A thread's place is worked out each time: kept, it costs spills.
  const auto load_expand = [&](int j) {
    const int thread = again::thread_index(), unit = j * kChunk + thread;
    const BlockCopy<T, kChunk, kWidth / 8, kThreads, kPitchA> copy(p.t.expand_weight, 0, channels, thread);
    const uint32_t slot = ring_address + slot_of(2 * j);
    const bool valid = p.t.expand_bias != nullptr && unit < p.hidden;
    again::copy_async_32_if(slot + kChunk * kPitchA + thread * 4, valid ? p.t.expand_bias + unit : p.t.expand_weight, valid,
                            thread < kChunk);  // the biases, behind the chunk
    copy(slot, static_cast<size_t>(j * kChunk) * channels, p.hidden - j * kChunk, channels);
  };
  const auto load_project = [&](int j) {
    const BlockCopy<T, kWidth, kChunk / 8, kThreads, kPitchP, kDirect> copy(p.t.project_weight, 0, p.hidden, again::thread_index());
    copy(ring_address + slot_of(2 * j + 1), j * kChunk, channels, p.hidden - j * kChunk);
  };
  const auto load_half_step = [&](int h) {
    if (h % 2 == 0) {
      load_expand(h / 2);
    } else {
      load_project(h / 2);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int h = 0; h < (kPaired ? 2 : kSlots - 1); ++h) load_half_step(h);

  if (p.has_norm) {
    layer_norm_rows<T, kPixels, 8, (kWidth + 63) / 64, norm_batch(kWidth, kPixels, kThreads), kThreads>(
        smem, kPitchA, channels, norm_weight, norm_bias, p.t.eps,
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

  auto row_pixel = [&](int row) { return rows.pixel[again::thread_index() / 32u / kTile.warps_n * (kRows * 16) + row]; };
  using Result = std::conditional_t<kDirect, DirectResult<T, kRows, kOutColumns, decltype(row_pixel)>,
                                    ResultTile<T, kRows, kOutColumns, decltype(row_pixel)>>;
  const Result result = [&] {
    if constexpr (kDirect) return Result{smem, kPitchA, channels, row_pixel};
    else return Result{smem + first_row * kPitchA + warp_n * kOutColumns * 16, kPitchA, warp_n * kOutColumns * 8, channels, row_pixel};
  }();
  const auto load_residual = [&] {  // a is dead: its place takes x
    __syncwarp();
    result.load(static_cast<const T*>(p.t.x));
    ptx::cp_async_commit();
  };

  float out[kRows][kOutColumns][4];
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int n = 0; n < kOutColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][n][i] = 0.f;

  // A chunk's S, still the biases, and where the lane reads its W1 and W2.
  float s[kRows][kHiddenColumns][4];
  const auto begin = [&](int j) {
    const unsigned char* slot = ring + slot_of(2 * j);
    const float* bias = reinterpret_cast<const float*>(slot + kChunk * kPitchA) + warp_n * kHiddenColumns * 8 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHiddenColumns; ++n) {
      const float2 b = *reinterpret_cast<const float2*>(bias + n * 8);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        s[m][n][0] = s[m][n][2] = b.x;
        s[m][n][1] = s[m][n][3] = b.y;
      }
    }
    return ptx::smem_address(slot) + warp_n * kHiddenColumns * 8 * kPitchA + b_lane_offset(kPitchA);
  };
  const auto project_weight = [&](int j) {
    return ring_address + slot_of(2 * j + 1) + warp_n * kOutColumns * 8 * kPitchP + b_lane_offset(kPitchP);
  };

  if constexpr (kOwnRows) {
    const auto all_chunks = [&](auto word) {
      using Word = decltype(word);
#pragma unroll 1
      for (int j = 0; j * kChunk < p.hidden; ++j) {
        ptx::cp_async_wait<kPaired ? 0 : kSlots - 2>();
        __syncthreads();  // W1's chunk is there, and W2's where they come in pairs; every warp is done with the slots that are copied to now
        const uint32_t b1 = begin(j);
        ActivatedStep<T, Word, kRows, kHiddenColumns> first;
        const auto copies = [&] {
          load_expand(j + 1);
          if (kPaired) load_project(j + 1);
        };
        if constexpr (kRegisterA) {
          expand_chunk<T, kSteps1>(s, RegisterA<kRows, kSteps1>{register_a}, b1, kPitchA, first, copies);
        } else {
          expand_chunk<T, kSteps1>(s, shared_a, b1, kPitchA, first, copies);
        }
        ptx::cp_async_commit();
        if (!kPaired) {
          ptx::cp_async_wait<kSlots - 2>();
          __syncthreads();  // W2's chunk is there
        }
        if ((j + 1) * kChunk >= p.hidden) load_residual();
        project_chunk<T>(out, s, first, project_weight(j), kPitchP, [&] {
          if (!kPaired) load_project(j + 1);
        });
        if (!kPaired) ptx::cp_async_commit();
      }
    };
    constexpr bool kHalf = std::is_same_v<T, __half>;
    if (p.activation == static_cast<int>(Activation::kSilu)) {
      all_chunks(std::conditional_t<kHalf, HalfWord<Activation::kSilu>, FloatWord<Activation::kSilu>>{});
    } else if (p.activation == static_cast<int>(Activation::kGelu)) {
      all_chunks(std::conditional_t<kHalf, HalfWord<Activation::kGelu>, FloatWord<Activation::kGelu>>{});
    } else {
      all_chunks(ReluWord{});
    }
  } else {
    unsigned char* hidden = smem + kLayout.region;  // act(S) of all warps
    for (int j = 0; j * kChunk < p.hidden; ++j) {
      ptx::cp_async_wait<kSlots - 2>();
      __syncthreads();  // W1's chunk is there; every warp is done with the slot that the next copy overwrites
      load_half_step(2 * j + kSlots - 1);
      multiply<T, kRows, kHiddenColumns, kSteps1, (kSteps1 <= 8 ? kSteps1 : 4)>(s, shared_a, begin(j), kPitchA);
      activate(s, p.activation);
      unsigned char* to = hidden + (first_row + lane / 4) * kPitchP + (warp_n * kHiddenColumns * 8 + lane % 4 * 2) * 2;
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int n = 0; n < kHiddenColumns; ++n) {
          *reinterpret_cast<uint32_t*>(to + m * 16 * kPitchP + n * 16) = ptx::pack2<T>(s[m][n][0], s[m][n][1]);
          *reinterpret_cast<uint32_t*>(to + (m * 16 + 8) * kPitchP + n * 16) = ptx::pack2<T>(s[m][n][2], s[m][n][3]);
        }
      ptx::cp_async_wait<kSlots - 2>();
      __syncthreads();  // W2's chunk is there, and act(S)
      load_half_step(2 * j + kSlots);
      if ((j + 1) * kChunk >= p.hidden) load_residual();
      const SharedA<kRows> shared_p{ptx::smem_address(hidden) + first_row * kPitchP + a_lane_offset(kPitchP), kPitchP};
      multiply<T, kRows, kOutColumns, kSteps2, kSteps2>(out, shared_p, project_weight(j), kPitchP);
    }
  }

  ptx::cp_async_wait<0>();
  if constexpr (kDirect) {
    result.store(out, scale, shift, p.t.sample_scale, p.height * p.width, static_cast<T*>(p.t.y));
  } else {
    __syncwarp();
    result.add_residual(out, scale + result.channel, shift + result.channel, p.t.sample_scale, p.height * p.width);
    __syncwarp();
    result.store(static_cast<T*>(p.t.y));
  }
}

}  // namespace convfirst::block_fusion::sm80
