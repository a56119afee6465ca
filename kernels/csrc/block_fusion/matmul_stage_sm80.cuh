// Warp-level matrix products from shared memory, and the epilogue that adds the residual.
#pragma once

#include "../common/activation.cuh"
#include "../common/again.cuh"
#include "../common/ptx.cuh"
#include "params.h"

namespace convfirst::block_fusion::sm80 {

// Lane offsets of ldmatrix.x4 for a 16x16 block of A (rows by k) and of B (columns by k), rows `pitch` bytes apart.
__device__ __forceinline__ uint32_t a_lane_offset(int pitch) {
  const int lane = threadIdx.x % 32;
  return lane % 16 * pitch + lane / 16 * 16;
}

__device__ __forceinline__ uint32_t b_lane_offset(int pitch) {
  const int lane = threadIdx.x % 32;
  return (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16;
}

// acc[m][n] += A B^T over kSteps k16 steps. load_a(fragments, step) yields A; B's rows are the product's columns.
template <typename T, int kRows, int kColumns, int kSteps, int kUnroll, typename LoadA>
__device__ __forceinline__ void multiply(float (&acc)[kRows][kColumns][4], LoadA load_a, uint32_t b, int b_pitch) {
#pragma unroll kUnroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t fa[kRows][4];
    load_a(fa, step);
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t fb[4];
      ptx::ldmatrix_x4(fb, b + n * 16 * b_pitch + step * 32);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        ptx::mma_16816<T>(acc[m][2 * n], fa[m], fb[0], fb[1]);
        ptx::mma_16816<T>(acc[m][2 * n + 1], fa[m], fb[2], fb[3]);
      }
    }
  }
}

// A from shared memory, rows `pitch` bytes apart.
template <int kRows>
struct SharedA {
  uint32_t address;  // with the lane's offset
  int pitch;
  __device__ __forceinline__ void operator()(uint32_t (&fa)[kRows][4], int step) const {
#pragma unroll
    for (int m = 0; m < kRows; ++m) ptx::ldmatrix_x4(fa[m], address + m * 16 * pitch + step * 32);
  }
};

// A from registers: the fragments of all steps, or a product's accumulators once rounded.
template <int kRows, int kSteps>
struct RegisterA {
  uint32_t (&fragments)[kRows][kSteps][4];
  __device__ __forceinline__ void operator()(uint32_t (&fa)[kRows][4], int step) const {
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) fa[m][i] = fragments[m][step][i];
  }
};

template <int kRows, int kColumns>
__device__ __forceinline__ void activate(float (&s)[kRows][kColumns][4], int activation) {
  auto each = [&](auto function) {
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = function(s[m][n][i]);
  };
  if (activation == static_cast<int>(Activation::kSilu)) {
    each([](float x) { return silu(x); });
  } else if (activation == static_cast<int>(Activation::kGelu)) {
    each([](float x) { return gelu(x); });
  } else {
    each([](float x) { return relu(x); });
  }
}

// Layer scale and bias of the projection as one multiply-add a channel, in shared memory: scale acc + shift, for `count`
// channels from `first` on; zeros beyond the tensor's channels.
template <int kThreads>
__device__ __forceinline__ void project_scale(const Tensors& t, int first, int count, int channels, float* scale, float* shift) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int c = first + i;
    const float s = c >= channels ? 0.f : t.layer_scale ? t.layer_scale[c] : 1.f;
    scale[i] = s;
    shift[i] = c < channels && t.project_bias ? s * t.project_bias[c] : 0.f;
  }
}

// A warp's result tile: 16 * kRows rows by 8 * kColumns channels from `channel` on, staged in shared memory that is the warp's
// own. row_pixel(row) is the pixel of a row of the tile, or -1.
template <typename T, int kRows, int kColumns, typename RowPixel>
struct ResultTile {
  static constexpr int kChunks = kRows * 16 * kColumns;
  unsigned char* stage;
  int pitch;
  int channel;
  int channels;
  RowPixel row_pixel;

  // Starts copying x into the stage; the caller commits.
  __device__ __forceinline__ void load(const T* x) const {
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < kChunks; i += 32) {
      const int row = i / kColumns, c = channel + i % kColumns * 8;
      const int pixel = row_pixel(row);
      const bool valid = pixel >= 0 && c < channels;
      ptx::cp_async16(ptx::smem_address(stage + row * pitch + i % kColumns * 16),
                      valid ? x + static_cast<size_t>(pixel) * channels + c : x, valid);
    }
  }

  __device__ __forceinline__ void store(T* y) const {
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < kChunks; i += 32) {
      const int row = i / kColumns, c = channel + i % kColumns * 8;
      const int pixel = row_pixel(row);
      if (pixel >= 0 && c < channels)
        *reinterpret_cast<uint4*>(y + static_cast<size_t>(pixel) * channels + c) =
            *reinterpret_cast<const uint4*>(stage + row * pitch + i % kColumns * 16);
    }
  }

  // stage = stage + sample_scale * (scale * acc + shift), rounded once; see project_scale.
  __device__ __forceinline__ void add_residual(const float (&acc)[kRows][kColumns][4], const float* scale, const float* shift,
                                               const float* sample_scale, int image_pixels) const {
    const int lane = threadIdx.x % 32;
    float sample[kRows][2];
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = sample_scale ? row_pixel(m * 16 + half * 8 + lane / 4) : -1;
        sample[m][half] = pixel >= 0 ? sample_scale[pixel / image_pixels] : 1.f;
      }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float2 s = *reinterpret_cast<const float2*>(scale + n * 8 + lane % 4 * 2);
      const float2 b = *reinterpret_cast<const float2*>(shift + n * 8 + lane % 4 * 2);
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t* word = reinterpret_cast<uint32_t*>(stage + (m * 16 + half * 8 + lane / 4) * pitch + n * 16 + lane % 4 * 4);
          const float2 x = ptx::unpack2<T>(*word);
          *word = ptx::pack2<T>(fmaf(sample[m][half], fmaf(acc[m][n][2 * half], s.x, b.x), x.x),
                                fmaf(sample[m][half], fmaf(acc[m][n][2 * half + 1], s.y, b.y), x.y));
        }
    }
  }
};

// The same of a warp that owns its rows and whose columns are permuted (place_of): a lane has 8 neighbouring channels of every 32, and the
// result goes from registers to device memory. x waits in shared memory, where only the lane that copied it reads it.
template <typename T, int kRows, int kColumns, typename RowPixel>
struct DirectResult {
  static constexpr int kGroups = kColumns / 4;
  static_assert(kColumns % 4 == 0, "groups of 32 channels");
  unsigned char* stage;  // rows of all warps, 16 * kRows one after another each
  int pitch;
  int channels;
  RowPixel row_pixel;

  __device__ __forceinline__ unsigned char* place(unsigned thread) const { return stage + thread / 32 * (16 * kRows) * pitch + thread % 32 * 16; }
  __device__ __forceinline__ static int offset_of(int i, int group) { return (i * kGroups + group) * 512; }

  // Starts copying x; the caller commits. The lane's place is worked out here: kept across the products it costs registers that they need.
  __device__ __forceinline__ void load(const T* x) const {
    const unsigned thread = again::thread_index(), lane = thread % 32;
    const uint32_t to = ptx::smem_address(place(thread));
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
      const int pixel = row_pixel(i * 8 + lane / 4);
      const T* from = x + static_cast<size_t>(max(pixel, 0)) * channels + lane % 4 * 8;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const bool valid = pixel >= 0 && group * 32 + static_cast<int>(lane % 4) * 8 < channels;
        ptx::cp_async16(to + offset_of(i, group), from + group * 32, valid);
      }
    }
  }

  // y = x + sample_scale * (scale * acc + shift), rounded once; see project_scale. x has arrived.
  __device__ __forceinline__ void store(const float (&acc)[kRows][kColumns][4], const float* scale, const float* shift,
                                        const float* sample_scale, int image_pixels, T* y) const {
    const unsigned thread = again::thread_index(), lane = thread % 32;
    const unsigned char* from = place(thread);
    int pixel[2 * kRows];
    float sample[2 * kRows];
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
      pixel[i] = row_pixel(i * 8 + lane / 4);
      sample[i] = sample_scale && pixel[i] >= 0 ? sample_scale[pixel[i] / image_pixels] : 1.f;
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int channel = group * 32 + lane % 4 * 8;
      float s[8], b[8];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        *reinterpret_cast<float4*>(s + j) = *reinterpret_cast<const float4*>(scale + channel + j);
        *reinterpret_cast<float4*>(b + j) = *reinterpret_cast<const float4*>(shift + channel + j);
      }
#pragma unroll
      for (int i = 0; i < 2 * kRows; ++i) {
        const uint4 raw = *reinterpret_cast<const uint4*>(from + offset_of(i, group));
        const uint32_t x[4] = {raw.x, raw.y, raw.z, raw.w};
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 was = ptx::unpack2<T>(x[j]);
          const float(&sums)[4] = acc[i / 2][group * 4 + j];
          words[j] = ptx::pack2<T>(fmaf(sample[i], fmaf(sums[i % 2 * 2], s[2 * j], b[2 * j]), was.x),
                                   fmaf(sample[i], fmaf(sums[i % 2 * 2 + 1], s[2 * j + 1], b[2 * j + 1]), was.y));
        }
        if (pixel[i] >= 0 && channel < channels)
          *reinterpret_cast<uint4*>(y + static_cast<size_t>(pixel[i]) * channels + channel) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
};

}  // namespace convfirst::block_fusion::sm80
