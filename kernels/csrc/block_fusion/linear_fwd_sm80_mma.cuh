// Second and third launch of the split path: a linear layer with the block's epilogues, for widths whose output does not fit
// the registers of one block.
//
//            K                          N
//        +--------+               +-----------+
//      M |  A     |  W [N x K]    |  8 or 16  |   expand:  h = act(A W^T + bias)
//        | slices |  ---------->  |  warps    |   project: y = x + scale (A W^T + bias)
//        +--------+               +-----------+
//
//   A and W slices of 64     shared, ring of stages    stages x (tile_m + tile_n) x 64
//   result                   registers, fp32           a warp's rows x columns
//   x, then the result       shared, over the ring     tile_m x tile_n
#pragma once

#include "copy_stage_sm80.cuh"
#include "launch_sm80.h"
#include "matmul_stage_sm80.cuh"

namespace convfirst::block_fusion::sm80 {

template <typename T, int kTile, bool kProject>
__global__ void __launch_bounds__(linear_tile(kTile).threads(), linear_tile(kTile).min_blocks)
    linear_fwd_sm80(const __grid_constant__ LinearParams p) {
  constexpr LinearTile kShape = linear_tile(kTile);
  constexpr int kPitch = row_bytes(kShape.depth), kSteps = kShape.depth / 16, kChunks = kShape.depth / 8;
  constexpr int kRows = kShape.m / kShape.warps_m / 16, kColumns = kShape.n / kShape.warps_n / 8;
  extern __shared__ __align__(128) unsigned char smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / kShape.warps_n, warp_n = warp % kShape.warps_n;
  const int tiles_n = (p.columns + kShape.n - 1) / kShape.n;
  const int tile_row = blockIdx.x / tiles_n * kShape.m, tile_column = blockIdx.x % tiles_n * kShape.n;
  const uint32_t ring = ptx::smem_address(smem);
  const BlockCopy<T, kShape.m, kChunks, kShape.threads(), kPitch> copy_a(p.a, tile_row, p.depth);
  const BlockCopy<T, kShape.n, kChunks, kShape.threads(), kPitch> copy_weight(p.weight, tile_column, p.depth);
  auto load = [&](int slice) {
    const uint32_t stage = ring + slice % kShape.stages * kShape.stage_bytes();
    const int k = slice * kShape.depth;
    copy_a(stage, k, p.rows - tile_row, p.depth - k);
    copy_weight(stage + kShape.m * kPitch, k, p.columns - tile_column, p.depth - k);
  };

  float* scale = reinterpret_cast<float*>(smem + kShape.vectors_offset());
  float* shift = scale + kShape.n;
  if constexpr (kProject) project_scale<kShape.threads()>(p.t, tile_column, kShape.n, p.columns, scale, shift);

  float acc[kRows][kColumns][4];
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;

  const int slices = (p.depth + kShape.depth - 1) / kShape.depth;
#pragma unroll
  for (int s = 0; s < kShape.stages - 1; ++s) {
    if (s < slices) load(s);
    ptx::cp_async_commit();
  }
  for (int s = 0; s < slices; ++s) {
    ptx::cp_async_wait<kShape.stages - 2>();
    __syncthreads();
    if (s + kShape.stages - 1 < slices) load(s + kShape.stages - 1);
    ptx::cp_async_commit();
    const uint32_t stage = ring + s % kShape.stages * kShape.stage_bytes();
    const SharedA<kRows> shared_a{stage + warp_m * kRows * 16 * kPitch + a_lane_offset(kPitch), kPitch};
    multiply<T, kRows, kColumns, kSteps, kSteps>(
        acc, shared_a, stage + (kShape.m + warp_n * kColumns * 8) * kPitch + b_lane_offset(kPitch), kPitch);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the ring becomes the stage of the result

  constexpr int kStagePitch = row_bytes(kColumns * 8);
  unsigned char* mine = smem + warp * kRows * 16 * kStagePitch;
  const int first_row = tile_row + warp_m * kRows * 16;
  auto row_index = [&](int row) { return first_row + row < p.rows ? first_row + row : -1; };
  const ResultTile<T, kRows, kColumns, decltype(row_index)> result{mine, kStagePitch, tile_column + warp_n * kColumns * 8,
                                                                   p.columns, row_index};
  if constexpr (kProject) {
    result.load(static_cast<const T*>(p.t.x));
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    result.add_residual(acc, scale + warp_n * kColumns * 8, shift + warp_n * kColumns * 8, p.t.sample_scale, p.image_pixels);
  } else {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int c = result.channel + n * 8 + lane % 4 * 2;
      const bool inside = p.bias != nullptr && c < p.columns;
      const float b0 = inside ? __ldg(p.bias + c) : 0.f, b1 = inside ? __ldg(p.bias + c + 1) : 0.f;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        acc[m][n][0] += b0;
        acc[m][n][1] += b1;
        acc[m][n][2] += b0;
        acc[m][n][3] += b1;
      }
    }
    activate(acc, p.activation);
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(mine + (m * 16 + half * 8 + lane / 4) * kStagePitch + n * 16 + lane % 4 * 4) =
              ptx::pack2<T>(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
  }
  __syncwarp();
  result.store(static_cast<T*>(p.output));
}

}  // namespace convfirst::block_fusion::sm80
