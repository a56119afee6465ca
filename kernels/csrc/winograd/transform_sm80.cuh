// The transforms as kernels of their own: filters (every path), and for the split path the input and the output.
//
// | what          | a thread              | device memory                                                            |
// | --- | --- | --- |
// | filter        | one (k, c)            | weight by strides -> [point][k][c], zeros where k or c is padding          |
// | input         | a tile, some channels | x NHWC -> [point][tile][c], zeros where c is padding, tiles of the chunk   |
// | output        | a tile, some outputs  | [split][point][tile][k] -> y NHWC, with bias and activation                |
#pragma once

#include "winograd/transform_stage_sm80.cuh"

namespace convfirst::winograd::sm80 {

constexpr int kTransformThreads = 128;
constexpr int transform_blocks(int64_t threads) { return static_cast<int>(ceil_div(threads, kTransformThreads)); }

template <int M, typename T>
__global__ void __launch_bounds__(kTransformThreads) filter_transform_sm80(const FilterView f, T* to, int outputs, int channels) {
  constexpr int n = M + 2;
  using Matrix = Filter<M, 3>;
  const int index = static_cast<int>(blockIdx.x) * kTransformThreads + threadIdx.x;
  if (index >= outputs * channels) return;
  const int k = index / channels, c = index % channels;
  float half[3][n][1] = {};  // half[s][i] = (G g)[i][s]
  if (k < f.outputs && c < f.channels) {
    const T* g = static_cast<const T*>(f.weight) + k * f.k_stride + c * f.c_stride;
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      float taps[3][1];
#pragma unroll
      for (int r = 0; r < 3; ++r) taps[r][0] = static_cast<float>(g[r * f.r_stride + s * f.s_stride]);
#pragma unroll
      for (int i = 0; i < n; ++i) row_product<Matrix, 1>(half[s][i], i, taps);
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float line[3][1] = {{half[0][i][0]}, {half[1][i][0]}, {half[2][i][0]}};
#pragma unroll
    for (int j = 0; j < n; ++j) {
      float value[1];
      row_product<Matrix, 1>(value, j, line);
      to[int64_t{i * n + j} * outputs * channels + index] = static_cast<T>(value[0]);
    }
  }
}

// Tiles [first, first + tiles) to rows [0, tiles) of each point, zeros to those up to `rows`.
template <int M, typename T, int kCount>
__global__ void __launch_bounds__(kTransformThreads) input_transform_sm80(const Problem p, const T* x, T* v, int64_t first, int tiles,
                                                                          int rows, int pitch, int64_t point_stride) {
  const int groups = pitch / kCount;
  const int64_t index = int64_t{blockIdx.x} * kTransformThreads + threadIdx.x;
  if (index >= int64_t{rows} * groups) return;
  const int tile = static_cast<int>(index / groups), channel = static_cast<int>(index % groups) * kCount;
  T* to = v + int64_t{tile} * pitch + channel;
  if (channel >= p.channels || tile >= tiles) {
    const float zeros[kCount] = {};
    for (int point = 0; point < (M + 2) * (M + 2); ++point) store<T, kCount>(to + point * point_stride, zeros);
    return;
  }
  const Corner at = corner<M>(p, first + tile);
  transform_input<M, 3, kCount>(x, at.image, at.row - p.padding, at.column - p.padding, p.height, p.width, p.channels, channel,
                                [&](int point, const float(&value)[kCount]) { store<T, kCount>(to + point * point_stride, value); });
}

template <int M, typename T, int kCount>
__global__ void __launch_bounds__(kTransformThreads) output_transform_sm80(const Problem p, const float* products, const float* bias, T* y,
                                                                           int64_t first, int tiles, int splits, int64_t point_stride,
                                                                           int64_t split_stride) {
  const int groups = p.outputs / kCount;
  const int64_t index = int64_t{blockIdx.x} * kTransformThreads + threadIdx.x;
  if (index >= int64_t{tiles} * groups) return;
  const int tile = static_cast<int>(index / groups), output = static_cast<int>(index % groups) * kCount;
  const Corner at = corner<M>(p, first + tile);
  const float* from = products + int64_t{tile} * p.output_pitch() + output;
  float shift[kCount];
#pragma unroll
  for (int q = 0; q < kCount; ++q) shift[q] = bias != nullptr ? bias[output + q] : 0.f;
  auto take = [&](int point, float(&sum)[kCount]) {
    load<float, kCount>(sum, from + point * point_stride);
#pragma unroll 1
    for (int split = 1; split < splits; ++split) {
      float part[kCount];
      load<float, kCount>(part, from + split * split_stride + point * point_stride);
#pragma unroll
      for (int q = 0; q < kCount; ++q) sum[q] += part[q];
    }
  };
  const int height = p.out_height(), width = p.out_width();
  transform_output<M, 3, kCount>(take, [&](int i, int j, float(&value)[kCount]) {
    const int h = at.row + i, w = at.column + j;
    if (h >= height || w >= width) return;
#pragma unroll
    for (int q = 0; q < kCount; ++q) value[q] = activate(p.activation, value[q] + shift[q]);
    store<T, kCount>(y + ((int64_t{at.image} * height + h) * width + w) * p.outputs + output, value);
  });
}

}  // namespace convfirst::winograd::sm80
