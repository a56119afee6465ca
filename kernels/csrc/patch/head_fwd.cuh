// A network's head for few images in one launch: global average, LayerNorm over channels, linear layer.
//
//     x [pixels x C] of an image         v [C]                  y [8 classes]
//     +----------------+  each block     +------------------+   a warp a class, its weights
//     | 16-byte pieces |  sums all       | mean, LayerNorm  |   in registers before the wait
//     +----------------+  pixels ----->  +------------------+ ----->
//
//   what                          where       written by
//   W of 8 classes                registers   each warp its row, 16 bytes a lane
//   sums of a part of the pixels  shared      all threads: [part][C]
//   v                             shared      all threads
//
// Every block computes v anew: reading x again from L2 costs less than a second launch. The norm's affine part is folded into W and the bias.
// Sums are in float32, in a fixed order.
#pragma once

#include "../common/ptx.cuh"
#include "fragments.cuh"
#include "params.h"
#include "sync.cuh"

namespace convfirst::patch::sm80 {

constexpr int kHeadThreads = 256, kHeadClasses = kHeadThreads / 32;

template <typename T>
__device__ __forceinline__ void add_8(float (&sums)[8], uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = ptx::unpack2<T>(words[i]);
    sums[2 * i] += pair.x, sums[2 * i + 1] += pair.y;
  }
}

// Of all threads; `scratch` has a float a warp.
__device__ __forceinline__ float head_sum(float v, float* scratch) {
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) v += __shfl_xor_sync(~0u, v, lane);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kHeadThreads / 32; ++i) sum += scratch[i];
  return sum;
}

// kPieces x 256 channels.
template <typename T, int kPieces, bool kHopper>
__global__ void __launch_bounds__(kHeadThreads, 2) head_fwd(const __grid_constant__ Head h) {
  constexpr int kC = kPieces * 256, kChunks = kC / 8, kParts = kHeadThreads / kChunks;
  __shared__ __align__(16) float parts[kParts * kC];
  __shared__ float scratch[2][kHeadThreads / 32];
  const int thread = threadIdx.x, lane = thread % 32, group = (h.classes + kHeadClasses - 1) / kHeadClasses;
  const int image = static_cast<int>(blockIdx.x) / group, y = static_cast<int>(blockIdx.x) % group * kHeadClasses + thread / 32;
  const int row = y < h.classes ? y : 0;
  uint4 w[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) w[i] = __ldg(static_cast<const uint4*>(h.weight) + static_cast<size_t>(row) * kChunks + i * 32 + lane);
  const float bias = h.bias == nullptr ? 0.f : __ldg(h.bias + row);
  const int chunk = thread % kChunks, part = thread / kChunks;
  const uint4* from = static_cast<const uint4*>(h.x) + static_cast<size_t>(image) * h.pixels * kChunks + chunk;

  wait_for_inputs<kHopper>();
  launch_dependents<kHopper>();
  float sums[8] = {};
  if (part < kParts) {
#pragma unroll 8
    for (int pixel = part; pixel < h.pixels; pixel += kParts) add_8<T>(sums, __ldg(from + static_cast<size_t>(pixel) * kChunks));
    float4* to = reinterpret_cast<float4*>(parts + part * kC + chunk * 8);
    to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]), to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  }
  __syncthreads();
  float v[kPieces], total = 0.f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kParts; ++j) sum += parts[j * kC + i * 256 + thread];
    v[i] = sum / static_cast<float>(h.pixels), total += v[i];
  }
  const float mean = head_sum(total, scratch[0]) * (1.f / kC);
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) v[i] -= mean, squares += v[i] * v[i];
  const float inverse = rsqrtf(head_sum(squares, scratch[1]) * (1.f / kC) + h.eps);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) parts[i * 256 + thread] = v[i] * inverse;  // the sums there are read: two barriers passed
  __syncthreads();
  float dot = 0.f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    float a[8];
    load_floats(a, parts + (i * 32 + lane) * 8);
    const uint32_t words[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = ptx::unpack2<T>(words[j]);
      dot = fmaf(a[2 * j], pair.x, dot), dot = fmaf(a[2 * j + 1], pair.y, dot);
    }
  }
#pragma unroll
  for (int other = 1; other < 32; other *= 2) dot += __shfl_xor_sync(~0u, dot, other);
  if (lane == 0 && y < h.classes) {
    const uint32_t rounded = ptx::pack2<T>(dot + bias, 0.f);
    static_cast<uint16_t*>(h.y)[static_cast<size_t>(image) * h.classes + y] = static_cast<uint16_t>(rounded);
  }
}

}  // namespace convfirst::patch::sm80
