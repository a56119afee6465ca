// Kernels of block_bwd_weights.h; each reads and writes everything once.
#include "block_bwd_weights.h"

#include "../common/launch.cuh"
#include "../common/ptx.cuh"
#include "conv_bwd_weights.h"

namespace convfirst::block_fusion {
namespace sm80 {

constexpr int kAffineThreads = 256, kAffineWarps = kAffineThreads / 32;
constexpr int kReleaseRows = 64, kReleaseColumns = 64;  // of a block
constexpr int kRoundedValues = kAffineThreads * 8;      // of a block that only rounds

__device__ __forceinline__ float2 pair_or(const float* vector, int i, float otherwise) {
  return vector != nullptr ? make_float2(__ldg(vector + i), __ldg(vector + i + 1)) : make_float2(otherwise, otherwise);
}

// A warp a row of W.
template <typename T>
__global__ void __launch_bounds__(kAffineThreads) absorb_affine_sm80(AffineTensors t, uint32_t* matrix, float* bias) {
  const int row = blockIdx.x * kAffineWarps + threadIdx.x / 32, lane = threadIdx.x % 32, words = t.channels / 2;
  if (row >= t.hidden) return;
  const uint32_t* from = static_cast<const uint32_t*>(t.matrix) + static_cast<int64_t>(row) * words;
  uint32_t* to = matrix + static_cast<int64_t>(row) * words;
  float moved = 0.f;
#pragma unroll 4
  for (int i = lane; i < words; i += 32) {
    const float2 w = ptx::unpack2<T>(__ldg(from + i)), scale = pair_or(t.scale, 2 * i, 1.f), shift = pair_or(t.shift, 2 * i, 0.f);
    to[i] = ptx::pack2<T>(w.x * scale.x, w.y * scale.y);
    moved = fmaf(w.x, shift.x, fmaf(w.y, shift.y, moved));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) moved += __shfl_xor_sync(0xffffffffu, moved, distance);
  if (lane == 0 && bias != nullptr) bias[row] = moved + (t.bias != nullptr ? t.bias[row] : 0.f);
}

template <typename T>
__device__ __forceinline__ void round_values(const float* from, uint32_t* to, int64_t first, int64_t count) {
  const int64_t i = first + threadIdx.x * 8;
  if (i >= count) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 v = *reinterpret_cast<const float2*>(from + i + 2 * j);
    to[i / 2 + j] = ptx::pack2<T>(v.x, v.y);
  }
}

// The first blocks: 64 x 64 of dW each, and their part of the column sums, [row block][2][channels]. The others round.
template <typename T>
__global__ void __launch_bounds__(kAffineThreads) release_affine_sm80(AffineTensors t, ReleasedTensors r, float* partial, int across, int down) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int other = blockIdx.x - across * down;
  if (other >= 0) {
    const int of_first = static_cast<int>((r.counts[0] + kRoundedValues - 1) / kRoundedValues);
    if (other < of_first) {
      round_values<T>(r.others[0], static_cast<uint32_t*>(r.rounded[0]), int64_t{other} * kRoundedValues, r.counts[0]);
    } else {
      round_values<T>(r.others[1], static_cast<uint32_t*>(r.rounded[1]), int64_t{other - of_first} * kRoundedValues, r.counts[1]);
    }
    return;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block_row = blockIdx.x / across, column = blockIdx.x % across * kReleaseColumns + 2 * lane;
  const bool exists = column < t.channels;
  float2 scale = make_float2(1.f, 1.f), shift = make_float2(0.f, 0.f);
  if (exists) scale = pair_or(t.scale, column, 1.f), shift = pair_or(t.shift, column, 0.f);
  float2 d_scale = make_float2(0.f, 0.f), d_shift = make_float2(0.f, 0.f);
#pragma unroll
  for (int i = 0; i < kReleaseRows / kAffineWarps; ++i) {
    const int row = block_row * kReleaseRows + i * kAffineWarps + warp;
    if (row >= t.hidden || !exists) continue;
    const int64_t at = static_cast<int64_t>(row) * t.channels + column;
    const float2 d = *reinterpret_cast<const float2*>(r.d_matrix + at);
    const float2 w = ptx::unpack2<T>(__ldg(static_cast<const uint32_t*>(t.matrix) + at / 2));
    const float db = __ldg(r.d_bias + row);
    static_cast<uint32_t*>(r.d_expand)[at / 2] = ptx::pack2<T>(fmaf(d.x, scale.x, db * shift.x), fmaf(d.y, scale.y, db * shift.y));
    d_scale.x = fmaf(d.x, w.x, d_scale.x), d_scale.y = fmaf(d.y, w.y, d_scale.y);
    d_shift.x = fmaf(db, w.x, d_shift.x), d_shift.y = fmaf(db, w.y, d_shift.y);
  }
  if (partial == nullptr) return;
  float4* const sums = reinterpret_cast<float4*>(smem);
  sums[warp * 32 + lane] = make_float4(d_scale.x, d_scale.y, d_shift.x, d_shift.y);
  __syncthreads();
  if (warp > 0 || !exists) return;
  float4 sum = sums[lane];
#pragma unroll
  for (int w = 1; w < kAffineWarps; ++w) {
    const float4 more = sums[w * 32 + lane];
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  float* to = partial + static_cast<int64_t>(block_row) * 2 * t.channels + column;
  to[0] = sum.x, to[1] = sum.y, to[t.channels] = sum.z, to[t.channels + 1] = sum.w;
}

__global__ void __launch_bounds__(kAffineThreads)
    transpose_filter_sm80(const uint16_t* filter, uint16_t* result, int taps, int channels, int group_width) {
  const int i = blockIdx.x * kAffineThreads + threadIdx.x;
  if (i >= taps * channels * group_width) return;
  const int input = i % group_width, output = i / group_width % group_width, group = i / (group_width * group_width);  // through all taps
  const int groups = channels / group_width, tap = group / groups;
  const int from_group = (taps - 1 - tap) * groups + group % groups;
  result[i] = filter[(from_group * group_width + input) * group_width + output];
}

template <typename T>
int absorb(const AffineTensors& from, void* matrix, float* bias, cudaStream_t stream) {
  return start_kernel(absorb_affine_sm80<T>, (from.hidden + kAffineWarps - 1) / kAffineWarps, kAffineThreads, 0, stream, from,
                      static_cast<uint32_t*>(matrix), bias);
}

constexpr int row_blocks(const AffineTensors& t) { return (t.hidden + kReleaseRows - 1) / kReleaseRows; }

template <typename T>
int release(const AffineTensors& of, const ReleasedTensors& to, float* partial, cudaStream_t stream) {
  const int across = (of.channels + kReleaseColumns - 1) / kReleaseColumns, down = row_blocks(of);
  int blocks = across * down;
  for (int64_t count : to.counts) blocks += static_cast<int>((count + kRoundedValues - 1) / kRoundedValues);
  return start_kernel(release_affine_sm80<T>, blocks, kAffineThreads, kAffineThreads * 16, stream, of, to, partial, across, down);
}

}  // namespace sm80

int absorb_affine(DType dtype, const AffineTensors& from, void* matrix, float* bias, cudaStream_t stream) {
  return dtype == DType::kHalf ? sm80::absorb<__half>(from, matrix, bias, stream) : sm80::absorb<__nv_bfloat16>(from, matrix, bias, stream);
}

int64_t release_workspace(const AffineTensors& tensors) { return int64_t{sm80::row_blocks(tensors)} * 2 * tensors.channels * 4; }

int release_affine(DType dtype, const AffineTensors& of, const ReleasedTensors& to, void* workspace, cudaStream_t stream) {
  float* const partial = of.scale != nullptr || of.shift != nullptr ? static_cast<float*>(workspace) : nullptr;
  const int error = dtype == DType::kHalf ? sm80::release<__half>(of, to, partial, stream) : sm80::release<__nv_bfloat16>(of, to, partial, stream);
  if (error != 0 || partial == nullptr) return error;
  return add_slices(partial, to.d_scale, to.d_shift, sm80::row_blocks(of), of.channels, 2 * of.channels, stream);
}

int transpose_filter(const void* filter, void* result, int taps, int channels, int group_width, cudaStream_t stream) {
  const int values = taps * channels * group_width;
  return start_kernel(sm80::transpose_filter_sm80, (values + sm80::kAffineThreads - 1) / sm80::kAffineThreads, sm80::kAffineThreads, 0, stream,
                      static_cast<const uint16_t*>(filter), static_cast<uint16_t*>(result), taps, channels, group_width);
}

}  // namespace convfirst::block_fusion
