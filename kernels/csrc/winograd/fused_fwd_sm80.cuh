// F(2x2, 3x3) and F(4x4, 3x3) in one kernel, float32 on CUDA cores: input transform, a product for each transform point, inverse
// transform, bias and activation. Beside x and y only the transformed filters touch device memory.
//
//   a block: 32 tiles x 64 outputs (F2) or 32 outputs (F4), all points, 8 warps
//
//     x --- transform, a (tile, channel) a thread ---> V[point][tile][8 channels] --+
//     U --- cp.async ---------------------------> U[point][output][8 channels] ----+--> sums in registers --> M[point][tile][output]
//                                                                                                              | inverse, bias, act
//   F2: a warp has 2 points, a lane 8 tiles x 8 outputs of each.                                               v
//   F4: a warp has 4 points, a half-warp 2 of them, a lane 8 x 8 of each; and half the tiles of a fifth, 4 x 4 a lane.   y
//
// | what                       | where                                                                                            |
// | --- | --- |
// | V, U of a slice            | shared memory, two of each; row r of 8 channels, its 16-byte chunk c at c ^ (r / 4 % 2)           |
// | x of the next slice        | registers, one (tile, channel) a thread: loaded before the products, transformed after them       |
// | sums                       | registers: 128 a lane (F2), 144 (F4)                                                              |
// | M                          | shared memory, over V and U, once a block                                                         |
#pragma once

#include "winograd/transform_stage_sm80.cuh"

namespace convfirst::winograd::sm80 {

template <int M>
struct FusedTile {
  static constexpr int kPoints = (M + 2) * (M + 2);
  static constexpr int kTiles = 32, kOutputs = M == 2 ? 64 : 32;
  static constexpr int kChannels = 8;  // of a slice
  static constexpr int kEarlyRows = 4;  // of a patch of the next slice, loaded before the products: as many as registers hold
  static constexpr int kThreads = kTiles * kChannels;
  static constexpr int kDataFloats = kPoints * kTiles * kChannels, kFilterFloats = kPoints * kOutputs * kChannels;
  static constexpr int kStageFloats = kDataFloats + kFilterFloats;
  static constexpr int kResultPitch = kOutputs + (M == 2 ? 8 : 4);
  static constexpr int kResultFloats = kPoints * kTiles * kResultPitch;
  static constexpr int kSharedBytes = 4 * (2 * kStageFloats > kResultFloats ? 2 * kStageFloats : kResultFloats);
  static_assert(kSharedBytes == fused_shared_bytes(M));
};

__device__ __forceinline__ int fused_address(int row, int chunk) { return row * 8 + (chunk ^ (row / 4 % 2)) * 4; }

// sums += v u^T over a slice of 8 channels: rows lane_m + 4 i of v, rows lane_n + kStride j of u.
template <int kRows, int kColumns, int kStride>
__device__ __forceinline__ void multiply_point(float (&sums)[kRows][kColumns], const float* v, const float* u, int lane_m, int lane_n) {
#pragma unroll 1
  for (int chunk = 0; chunk < 2; ++chunk) {
    float4 a[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) a[i] = *reinterpret_cast<const float4*>(v + fused_address(lane_m + 4 * i, chunk));
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float4 b = *reinterpret_cast<const float4*>(u + fused_address(lane_n + kStride * j, chunk));
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i][j] = fmaf(a[i].x, b.x, sums[i][j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i][j] = fmaf(a[i].y, b.y, sums[i][j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i][j] = fmaf(a[i].z, b.z, sums[i][j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i][j] = fmaf(a[i].w, b.w, sums[i][j]);
    }
  }
}

template <int kRows, int kColumns, int kStride>
__device__ __forceinline__ void store_point(const float (&sums)[kRows][kColumns], float* to, int pitch, int lane_m, int lane_n) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) to[(lane_m + 4 * i) * pitch + lane_n + kStride * j] = sums[i][j];
}

// A warp's part of the products.
template <int M>
struct FusedSums;

template <>
struct FusedSums<2> {
  float sums[2][8][8] = {};
  int lane_m, lane_n, point;

  __device__ __forceinline__ FusedSums(int warp, int lane)
      : lane_m(lane / 2 % 2 + lane / 16 * 2), lane_n(lane % 2 + lane / 4 % 4 * 2), point(2 * warp) {}

  __device__ __forceinline__ void multiply_extra(const float*, const float*) {}

  __device__ __forceinline__ void multiply(const float* v, const float* u) {
#pragma unroll
    for (int q = 0; q < 2; ++q) multiply_point<8, 8, 8>(sums[q], v + (point + q) * 32 * 8, u + (point + q) * 64 * 8, lane_m, lane_n);
  }

  __device__ __forceinline__ void store(float* to, int pitch) const {
#pragma unroll
    for (int q = 0; q < 2; ++q) store_point<8, 8, 8>(sums[q], to + (point + q) * 32 * pitch, pitch, lane_m, lane_n);
  }
};

template <>
struct FusedSums<4> {
  float sums[2][8][8] = {};
  float extra[4][4] = {};
  int lane_m, lane_n, point;                 // of the two points of the half-warp
  int extra_m, extra_n, extra_point;         // of the shared one: point 32 + warp / 2, tiles 16 (warp % 2) on

  __device__ __forceinline__ FusedSums(int warp, int lane)
      : lane_m(lane / 2 % 2 + lane / 8 % 2 * 2), lane_n(lane % 2 + lane / 4 % 2 * 2), point(4 * warp + lane / 16 * 2),
        extra_m(lane / 2 % 2 + lane / 16 * 2 + warp % 2 * 16), extra_n(lane % 2 + lane / 4 % 4 * 2), extra_point(32 + warp / 2) {}

  __device__ __forceinline__ void multiply(const float* v, const float* u) {
#pragma unroll
    for (int q = 0; q < 2; ++q) multiply_point<8, 8, 4>(sums[q], v + (point + q) * 32 * 8, u + (point + q) * 32 * 8, lane_m, lane_n);
  }

  __device__ __forceinline__ void multiply_extra(const float* v, const float* u) {
    multiply_point<4, 4, 8>(extra, v + extra_point * 32 * 8, u + extra_point * 32 * 8, extra_m, extra_n);
  }

  __device__ __forceinline__ void store(float* to, int pitch) const {
#pragma unroll
    for (int q = 0; q < 2; ++q) store_point<8, 8, 4>(sums[q], to + (point + q) * 32 * pitch, pitch, lane_m, lane_n);
    store_point<4, 4, 8>(extra, to + extra_point * 32 * pitch, pitch, extra_m, extra_n);
  }
};

// One (tile, channel) of a thread: which pixels of its patch lie in the image, and where the first one is.
template <int M>
struct Patch {
  const float* first;
  uint32_t rows, columns;  // bit i: row i of the patch lies in the image
  int64_t row_stride, column_stride;
  int channels, channel;

  __device__ __forceinline__ Patch(const Problem& p, const float* x, int64_t tile, int channel_)
      : rows(0), columns(0), row_stride(p.width * p.channels), column_stride(p.channels), channels(p.channels), channel(channel_) {
    first = x;
    if (tile >= p.tiles(M)) return;
    const Corner at = corner<M>(p, tile);
    const int row = at.row - p.padding, column = at.column - p.padding;
#pragma unroll
    for (int i = 0; i < M + 2; ++i) {
      rows |= uint32_t{row + i >= 0 && row + i < p.height} << i;
      columns |= uint32_t{column + i >= 0 && column + i < p.width} << i;
    }
    first = x + ((int64_t{at.image} * p.height + row) * p.width + column) * p.channels + channel;
  }

  __device__ __forceinline__ void advance(int by) { first += by, channel += by; }

  // Rows kFirst to kEnd of the patch ; zeros beyond the image and the channels.
  template <int kFirst, int kEnd>
  __device__ __forceinline__ void read(float (&d)[M + 2][M + 2]) const {
    const bool inside = channel < channels;
    const float* row = first + kFirst * row_stride;
#pragma unroll
    for (int i = kFirst; i < kEnd; ++i) {
      const float* from = row;
#pragma unroll
      for (int j = 0; j < M + 2; ++j) {
        d[i][j] = inside && (rows >> i & columns >> j & 1) != 0 ? __ldg(from) : 0.f;
        from += column_stride;
      }
      row += row_stride;
    }
  }
};

// B^T d B to shared memory, `stride` floats from point to point.
template <int M>
__device__ __forceinline__ void write_transformed(const float (&d)[M + 2][M + 2], float* to, int stride) {
  constexpr int n = M + 2;
  float half[n][n][1];  // (d B)[i][j], of row i
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float line[n][1];
#pragma unroll
    for (int j = 0; j < n; ++j) line[j][0] = d[i][j];
#pragma unroll
    for (int j = 0; j < n; ++j) row_product<Input<M, 3>, 1>(half[j][i], j, line);
  }
#pragma unroll
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i) {
      float value[1];
      row_product<Input<M, 3>, 1>(value, i, half[j]);
      to[(i * n + j) * stride] = value[0];
    }
}

// A slice of all points' filters; `from` and `to` are the thread's own first chunks.
template <int M>
__device__ __forceinline__ void copy_filters(uint32_t to, const float* from, int64_t point_stride) {
  using Tile = FusedTile<M>;
  constexpr int kPointsAtOnce = Tile::kThreads / 2 / Tile::kOutputs;
#pragma unroll
  for (int i = 0; i < Tile::kPoints / kPointsAtOnce; ++i) {
    ptx::cp_async16(to + i * kPointsAtOnce * Tile::kOutputs * Tile::kChannels * 4, from, true);
    from += kPointsAtOnce * point_stride;
  }
  ptx::cp_async_commit();
}

template <int M>
__global__ void __launch_bounds__(FusedTile<M>::kThreads, 1) fused_fwd_sm80(const Problem p, const Tensors t, int output_blocks) {
  extern __shared__ __align__(128) unsigned char smem[];
  using Tile = FusedTile<M>;
  float* const memory = reinterpret_cast<float*>(smem);
  const int block = blockIdx.x, output = block % output_blocks * Tile::kOutputs;
  const int64_t tile = int64_t{block / output_blocks} * Tile::kTiles;
  const int pitch = p.channel_pitch(), steps = static_cast<int>(ceil_div(p.channels, Tile::kChannels));
  const int64_t point_stride = int64_t{p.output_pitch()} * pitch;
  const int my_row = threadIdx.x / 2, my_chunk = threadIdx.x % 2;
  const float* filter = static_cast<const float*>(t.filter) + my_row / Tile::kOutputs * point_stride +
                        int64_t{output + my_row % Tile::kOutputs} * pitch + my_chunk * 4;

  const int my_tile = threadIdx.x / Tile::kChannels, my_channel = threadIdx.x % Tile::kChannels;
  Patch<M> patch(p, static_cast<const float*>(t.x), tile + my_tile, my_channel);
  const int place = fused_address(my_tile, my_channel / 4) + my_channel % 4;
  constexpr int kPointStride = Tile::kTiles * Tile::kChannels;
  const uint32_t filter_place = ptx::smem_address(memory + Tile::kDataFloats + fused_address(my_row, my_chunk));
  auto data = [&](int step) { return memory + step % 2 * Tile::kStageFloats; };

  FusedSums<M> sums(threadIdx.x / 32, threadIdx.x % 32);
  copy_filters<M>(filter_place, filter, point_stride);
  float d[M + 2][M + 2];
  patch.template read<0, M + 2>(d);
  write_transformed<M>(d, data(0) + place, kPointStride);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this slice is there, and everyone has left the other one
    const bool more = step + 1 < steps;
    if (more) {
      filter += Tile::kChannels;
      patch.advance(Tile::kChannels);
      copy_filters<M>(filter_place + (step + 1) % 2 * Tile::kStageFloats * 4, filter, point_stride);
      patch.template read<0, Tile::kEarlyRows>(d);
    }
    sums.multiply(data(step), data(step) + Tile::kDataFloats);
    if (more) patch.template read<Tile::kEarlyRows, M + 2>(d);
    sums.multiply_extra(data(step), data(step) + Tile::kDataFloats);
    if (more) write_transformed<M>(d, data(step + 1) + place, kPointStride);
  }

  __syncthreads();
  sums.store(memory, Tile::kResultPitch);
  __syncthreads();
  float* const y = static_cast<float*>(t.y);
  for (int job = threadIdx.x; job < Tile::kTiles * Tile::kOutputs; job += Tile::kThreads) {
    const int k = output + job % Tile::kOutputs;
    const int64_t my = tile + job / Tile::kOutputs;
    if (k >= p.outputs || my >= p.tiles(M)) continue;
    const Corner at = corner<M>(p, my);
    const float* from = memory + job / Tile::kOutputs * Tile::kResultPitch + job % Tile::kOutputs;
    const float shift = t.bias != nullptr ? t.bias[k] : 0.f;
    const int height = p.out_height(), width = p.out_width();
    transform_output<M, 3, 1>([&](int point, float(&value)[1]) { value[0] = from[point * Tile::kTiles * Tile::kResultPitch]; },
                              [&](int i, int j, float(&value)[1]) {
                                const int h = at.row + i, w = at.column + j;
                                if (h >= height || w >= width) return;
                                y[((int64_t{at.image} * height + h) * width + w) * p.outputs + k] = activate(p.activation, value[0] + shift);
                              });
  }
}

}  // namespace convfirst::winograd::sm80
