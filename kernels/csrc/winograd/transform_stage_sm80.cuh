// The transforms of Winograd's algorithm on registers, and vectors of channels as they lie in device memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/ptx.cuh"
#include "winograd/params.h"
#include "winograd/transforms.h"

namespace convfirst::winograd::sm80 {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ void load(float (&to)[kCount], const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = static_cast<float>(pack.values[i]);
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* to, const float (&from)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.values[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// The matrices of Transform<M, R> as types.
template <int M, int R>
struct Input {
  static constexpr int kRows = M + R - 1, kColumns = M + R - 1;
  static constexpr float at(int row, int column) { return Transform<M, R>::input(row, column); }
};
template <int M, int R>
struct Filter {
  static constexpr int kRows = M + R - 1, kColumns = R;
  static constexpr float at(int row, int column) { return Transform<M, R>::filter(row, column); }
};
template <int M, int R>
struct Output {
  static constexpr int kRows = M, kColumns = M + R - 1;
  static constexpr float at(int row, int column) { return Transform<M, R>::output(row, column); }
};

// Row `row` of matrix times a vector; zeros of the matrix cost nothing.
template <typename Matrix, int kCount>
__device__ __forceinline__ void row_product(float (&to)[kCount], int row, const float (&from)[Matrix::kColumns][kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < Matrix::kColumns; ++k) {
      if (Matrix::at(row, k) != 0.f) sum = fmaf(Matrix::at(row, k), from[k][i], sum);
    }
    to[i] = sum;
  }
}

// The tile's place: image, and the output pixel of its first corner.
struct Corner {
  int image, row, column;
};

template <int M>
__device__ __forceinline__ Corner corner(const Problem& p, int64_t tile) {
  const int rows = p.tile_rows(M), columns = p.tile_columns(M);
  const int index = static_cast<int>(tile), of_rows = index / columns;
  return {of_rows / rows, of_rows % rows * M, index % columns * M};
}

// B^T d B of one tile and kCount channels, d from device memory with zeros beyond the image. `emit(point, values)` takes the
// results.
template <int M, int R, int kCount, typename T, typename Emit>
__device__ __forceinline__ void transform_input(const T* x, int image, int row, int column, int height, int width, int channels,
                                                int channel, Emit emit) {
  constexpr int n = M + R - 1;
  using Matrix = Input<M, R>;
  float half[n][n][kCount];  // half[j][i] = (B^T d)[i][j]
#pragma unroll
  for (int j = 0; j < n; ++j) {
    float d[n][kCount];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int h = row + i, w = column + j;
#pragma unroll
      for (int q = 0; q < kCount; ++q) d[i][q] = 0.f;
      if (h >= 0 && h < height && w >= 0 && w < width) {
        load<T, kCount>(d[i], x + ((int64_t{image} * height + h) * width + w) * channels + channel);
      }
    }
#pragma unroll
    for (int i = 0; i < n; ++i) row_product<Matrix, kCount>(half[j][i], i, d);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float line[n][kCount];
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int q = 0; q < kCount; ++q) line[j][q] = half[j][i][q];
#pragma unroll
    for (int j = 0; j < n; ++j) {
      float value[kCount];
      row_product<Matrix, kCount>(value, j, line);
      emit(i * n + j, value);
    }
  }
}

// A^T m A of one tile and kCount output channels. `take(point, values)` gives m, `emit(row, column, values)` takes the results.
template <int M, int R, int kCount, typename Take, typename Emit>
__device__ __forceinline__ void transform_output(Take take, Emit emit) {
  constexpr int n = M + R - 1;
  using Matrix = Output<M, R>;
  float half[n][M][kCount];  // half[j][i] = (A^T m)[i][j]
#pragma unroll
  for (int j = 0; j < n; ++j) {
    float d[n][kCount];
#pragma unroll
    for (int i = 0; i < n; ++i) take(i * n + j, d[i]);
#pragma unroll
    for (int i = 0; i < M; ++i) row_product<Matrix, kCount>(half[j][i], i, d);
  }
#pragma unroll
  for (int i = 0; i < M; ++i) {
    float line[n][kCount];
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int q = 0; q < kCount; ++q) line[j][q] = half[j][i][q];
#pragma unroll
    for (int j = 0; j < M; ++j) {
      float value[kCount];
      row_product<Matrix, kCount>(value, j, line);
      emit(i, j, value);
    }
  }
}

// In full float32 precision, unlike common/activation.cuh, which serves 16-bit storage.
__device__ __forceinline__ float smooth_activation(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu: return x / (1.f + expf(-x));
    case Activation::kGelu: return 0.5f * x * (1.f + erff(0.70710678f * x));
    default: return x;
  }
}

__device__ __forceinline__ float activate(Activation activation, float x) {
  if (activation == Activation::kNone) return x;
  return activation == Activation::kRelu ? (x < 0.f ? 0.f : x) : smooth_activation(activation, x);
}

}  // namespace convfirst::winograd::sm80
