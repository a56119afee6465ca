// The products of the split path for float16 and bfloat16, on tensor cores: for each transform point, out[tile][k] = sum over c of
// v[tile][c] u[k][c], summed in float32. Blocks, slices and copies are those of products_fwd_sm80.cuh.
//
// | what                        | where                                                                             |
// | --- | --- |
// | v, u                        | device memory [point][row][channel], channels contiguous, padded with zeros       |
// | a slice of 32 channels      | shared memory [row][32], kStages of them in flight by cp.async, 16-byte chunk c of |
// |                             | row r at c ^ (r / 2 % 4), so that ldmatrix finds its eight rows in eight banks     |
// | factors, 16 channels        | registers: 32 rows of v, 16 of u at a time                                        |
// | sums                        | registers: a warp 32 tiles x 64 outputs, mma.sync m16n8k16's layout               |
// | out                         | device memory [split][point][tile][output], float32, 8 bytes a lane               |
#pragma once

#include "winograd/products_fwd_sm80.cuh"

namespace convfirst::winograd::sm80 {

template <typename Tile, typename T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerMultiprocessor) products_mma_fwd_sm80(const ProductParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const BlockPlace at = block_place<Tile>(p);
  SliceCopy<Tile> copy(p, at, ptx::smem_address(smem));
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) copy.start(step);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_column = warp % (Tile::kColumns / 64) * 64, warp_row = warp / (Tile::kColumns / 64) * 32;
  // ldmatrix: of v the lanes give rows 0-15 of chunk 0, then of chunk 1; of u rows 0-7 of both chunks, then rows 8-15.
  const int v_row = warp_row + lane % 16, v_chunk = lane / 16;
  const int u_row = Tile::kRows + warp_column + lane % 8 + lane / 16 * 8, u_chunk = lane / 8 % 2;
  float sums[2][8][4] = {};
  for (int step = 0; step < at.steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    copy.start(step + Tile::kStages - 1);  // into the slot that everyone has left before the barrier
    const uint32_t stage = ptx::smem_address(smem) + step % Tile::kStages * Tile::kStageFloats * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ptx::ldmatrix_x4(a[i], stage + chunk_address(v_row + 16 * i, 2 * half + v_chunk) * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, stage + chunk_address(u_row + 16 * j, 2 * half + u_chunk) * 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          ptx::mma_16816<T>(sums[i][2 * j], a[i], b[0], b[1]);
          ptx::mma_16816<T>(sums[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  float* out = p.out + at.split * p.out_split + at.point * p.out_point + (at.row + warp_row + lane / 4) * p.out_pitch + at.column +
               warp_column + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(out + int64_t{16 * i + 8 * h} * p.out_pitch + 8 * j) = make_float2(sums[i][j][2 * h], sums[i][j][2 * h + 1]);
      }
}

}  // namespace convfirst::winograd::sm80
