// The gradient of the filter by F(3x3, 2x2), float32: tiles of 2x2 of the output's gradient are the filters, tiles of 4x4 of x the
// inputs; the products are summed over all tiles before the one inverse transform.
//
//   x    --- input_transform_sm80<2> -------> v[point][tile][c] --+
//   grad --- gradient_transform_sm80 -------> g[point][tile][k] --+--> part[split][point][k][c] --- gradient_inverse_sm80 --> [k][c][3][3]
//
// The products of a block, kRows outputs x kColumns channels of one point over the tiles of a split:
//
// | what                | where                                                                                            |
// | --- | --- |
// | g, v                | device memory, zeros in padding (tiles, outputs, channels)                                        |
// | a slice of 16 tiles | shared memory [tile][output], [tile][channel], kStages of them in flight by cp.async              |
// | sums                | registers, 8 x 8 a lane: rows 4 lane_m + i % 4 + 16 (i / 4), columns 4 lane_n + j % 4 + 32 (j / 4) |
// | part                | device memory; later chunks of tiles add to it, so every sum has one order                         |
#pragma once

#include "winograd/transform_sm80.cuh"

namespace convfirst::winograd::sm80 {

// 2x2 tiles of grad to rows [0, rows) of each point, zeros from `tiles` on; `p` is the forward problem.
template <int kCount>
__global__ void __launch_bounds__(kTransformThreads) gradient_transform_sm80(const Problem p, const float* grad, float* g, int64_t first,
                                                                             int tiles, int rows, int64_t point_stride) {
  using Matrix = Filter<3, 2>;
  const int pitch = p.output_pitch(), groups = pitch / kCount;
  const int64_t index = int64_t{blockIdx.x} * kTransformThreads + threadIdx.x;
  if (index >= int64_t{rows} * groups) return;
  const int tile = static_cast<int>(index / groups), output = static_cast<int>(index % groups) * kCount;
  float* to = g + int64_t{tile} * pitch + output;
  float half[2][4][kCount] = {};  // half[j][i] = (G g)[i][j]
  if (tile < tiles && output < p.outputs) {
    const Corner at = corner<2>(p, first + tile);
    const int height = p.out_height(), width = p.out_width();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float values[2][kCount] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int h = at.row + i, w = at.column + j;
        if (h < height && w < width) {
          load<float, kCount>(values[i], grad + ((int64_t{at.image} * height + h) * width + w) * p.outputs + output);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) row_product<Matrix, kCount>(half[j][i], i, values);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float line[2][kCount];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int q = 0; q < kCount; ++q) line[j][q] = half[j][i][q];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float value[kCount];
      row_product<Matrix, kCount>(value, j, line);
      store<float, kCount>(to + (i * 4 + j) * point_stride, value);
    }
  }
}

struct GradientParams {
  const float *g, *v;
  float* part;
  int row_blocks, column_blocks;
  int steps, steps_of_split;  // slices of tiles: in all, of a split
  int64_t g_point, v_point;   // strides, elements
  int outputs, channels;      // padded
  bool accumulate;
};

template <int kBlockRows, int kBlockColumns>
struct GradientTile {
  static constexpr int kRows = kBlockRows, kColumns = kBlockColumns;
  static constexpr int kThreads = kRows * kColumns / 64;
  static constexpr int kTiles = 16;  // of a slice
  static constexpr int kBlocksPerMultiprocessor = (kThreads == 64 ? 256 : 512) / kThreads;
  // A slice is summed on its own and then added, so that roundings at the sum's full size are a sixteenth as many; 128 x 128
  // sums of a block leave no registers for it.
  static constexpr bool kBySlice = kThreads == 64;
  static constexpr int kStages = 4;
  static constexpr int kStageFloats = (kRows + kColumns) * kTiles;
  static constexpr int kSharedBytes = kStages * kStageFloats * 4;
};

template <int kCount, int kThreads>
__device__ __forceinline__ void copy_tiles(uint32_t to, const float* from, int pitch) {
#pragma unroll
  for (int i = 0; i < kCount * 4 / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x, tile = index / (kCount / 4), chunk = index % (kCount / 4);
    ptx::cp_async16(to + index * 16, from + int64_t{tile} * pitch + chunk * 4, true);
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerMultiprocessor) gradient_products_sm80(const GradientParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const float* const stages = reinterpret_cast<const float*>(smem);
  int block = blockIdx.x;
  const int column = block % p.column_blocks * Tile::kColumns;
  block /= p.column_blocks;
  const int row = block % p.row_blocks * Tile::kRows;
  block /= p.row_blocks;
  const int point = block % 16, split = block / 16;
  const int first = split * p.steps_of_split, steps = min(p.steps_of_split, p.steps - first);
  const float* g = p.g + point * p.g_point + int64_t{first} * Tile::kTiles * p.outputs + row;
  const float* v = p.v + point * p.v_point + int64_t{first} * Tile::kTiles * p.channels + column;
  auto copy_step = [&](int step) {
    if (step < steps) {
      const uint32_t stage = ptx::smem_address(smem) + step % Tile::kStages * Tile::kStageFloats * 4;
      copy_tiles<Tile::kRows, Tile::kThreads>(stage, g + int64_t{step} * Tile::kTiles * p.outputs, p.outputs);
      copy_tiles<Tile::kColumns, Tile::kThreads>(stage + Tile::kRows * Tile::kTiles * 4, v + int64_t{step} * Tile::kTiles * p.channels, p.channels);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) copy_step(step);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lane_n = lane % 2 + lane / 4 % 4 * 2, lane_m = lane / 2 % 2 + lane / 16 * 2;
  const int my_row = warp / (Tile::kColumns / 64) * 32 + 4 * lane_m, my_column = warp % (Tile::kColumns / 64) * 64 + 4 * lane_n;
  float sums[8][8] = {}, slice[8][8] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    copy_step(step + Tile::kStages - 1);
    const float* a_slice = stages + step % Tile::kStages * Tile::kStageFloats + my_row;
    const float* b_slice = stages + step % Tile::kStages * Tile::kStageFloats + Tile::kRows * Tile::kTiles + my_column;
#pragma unroll 2
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      float a[8], b[8];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 a4 = *reinterpret_cast<const float4*>(a_slice + tile * Tile::kRows + 16 * h);
        const float4 b4 = *reinterpret_cast<const float4*>(b_slice + tile * Tile::kColumns + 32 * h);
        a[4 * h] = a4.x, a[4 * h + 1] = a4.y, a[4 * h + 2] = a4.z, a[4 * h + 3] = a4.w;
        b[4 * h] = b4.x, b[4 * h + 1] = b4.y, b[4 * h + 2] = b4.z, b[4 * h + 3] = b4.w;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 8; ++i) (Tile::kBySlice ? slice : sums)[i][j] = fmaf(a[i], b[j], (Tile::kBySlice ? slice : sums)[i][j]);
    }
    if constexpr (Tile::kBySlice) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i][j] += slice[i][j], slice[i][j] = 0.f;
    }
  }

  float* part = p.part + (int64_t{split} * 16 + point) * p.outputs * p.channels + int64_t{row + my_row} * p.channels + column + my_column;
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float4* to = reinterpret_cast<float4*>(part + int64_t{i % 4 + i / 4 * 16} * p.channels + 32 * h);
      float4 sum = make_float4(sums[i][4 * h], sums[i][4 * h + 1], sums[i][4 * h + 2], sums[i][4 * h + 3]);
      if (p.accumulate) {
        const float4 before = *to;
        sum.x += before.x, sum.y += before.y, sum.z += before.z, sum.w += before.w;
      }
      *to = sum;
    }
}

// The parts summed, A^T m A, to contiguous [outputs, channels, 3, 3].
__global__ void __launch_bounds__(kTransformThreads) gradient_inverse_sm80(const Problem p, const float* part, float* to, int splits,
                                                                           int padded_outputs, int padded_channels) {
  const int index = static_cast<int>(blockIdx.x) * kTransformThreads + threadIdx.x;
  if (index >= p.outputs * p.channels) return;
  const int k = index / p.channels, c = index % p.channels;
  const int64_t point_stride = int64_t{padded_outputs} * padded_channels;
  const float* from = part + int64_t{k} * padded_channels + c;
  transform_output<3, 2, 1>(
      [&](int point, float(&sum)[1]) {
        sum[0] = from[point * point_stride];
#pragma unroll 1
        for (int split = 1; split < splits; ++split) sum[0] += from[(int64_t{split} * 16 + point) * point_stride];
      },
      [&](int i, int j, float(&value)[1]) { to[int64_t{index} * 9 + i * 3 + j] = value[0]; });
}

}  // namespace convfirst::winograd::sm80
