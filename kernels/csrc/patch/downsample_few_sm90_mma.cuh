// LayerNorm and the 2x2 convolution of stride 2 after it in one launch, for few rows on sm_90: mma.sync m16n8k16, made for latency.
//
//     patches [32 x 4C]              sums [16 columns x 32]          y [32 x 16 columns]
//     +---------------+              one part of the depth a warp
//     | 4 pixels each |  normalise   +---------------+
//     | of x          | ---------->  | W A^T         | x 8  ---->  sum of the parts, in order, + bias
//     +---------------+              +---------------+
//
//   what              where                                      written by                when
//   W                 registers, operand layout                  its thread                before the wait
//   patches           shared, 16-byte chunks of 8 channels       eight lanes a pixel       after the wait
//   parts of the sums shared: [warp][8 rows][lane]               all warps
//
// The matrix is the left operand, 16 of its rows a block, and comes straight from L2 to registers before the launch waits for the one before
// it: every block reads only what it multiplies. The norm's affine part is folded into W and the bias.
#pragma once

#include "../common/ptx.cuh"
#include "downsample_fwd_mma.cuh"

namespace convfirst::patch {

constexpr int kFewThreads = 256, kFewRows = 32, kFewColumns = 16;

template <int kC>
constexpr int few_bytes() {
  return kFewRows * 4 * kC * 2 + kFewThreads * kFewRows / 8 * 16;
}

namespace sm90 {

// Of 8 channels of a patch: neighbouring chunks and neighbouring patches lie in different banks.
__device__ __forceinline__ int few_chunk(int chunk, int row) { return chunk * kFewRows + (row ^ ((chunk & 3) << 1)); }

// This block's patches into shared memory, normalised. Each thread copies what it then normalises: it keeps no registers meanwhile.
template <typename T, int kC>
__device__ __forceinline__ void load_patches(const DownsampleParams& p, uint4* patches, const int64_t (&from)[4]) {
  constexpr int kChunks = kC / 64;
  const int tap = threadIdx.x / 8 % 4, lane = threadIdx.x % 8;
  const auto at = [&](int j, int i) { return patches + few_chunk(tap * (kC / 8) + i * 8 + lane, threadIdx.x / 32 + 8 * j); };
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      ptx::cp_async16(ptx::smem_address(at(j, i)), static_cast<const uint4*>(p.d.x) + (from[j] < 0 ? 0 : from[j]) + i * 8, from[j] >= 0);
    }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (!p.d.has_norm) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint4 chunks[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) chunks[i] = *at(j, i);
    sm80::normalise<T, kChunks, 8>(chunks, kC, p.d.eps);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) *at(j, i) = chunks[i];
  }
}

// A thread's 16 bytes of a row are eight neighbours in depth on both sides: two products of depth 16 in an order of their own.
template <typename T, int kSteps>
__device__ __forceinline__ void multiply_patches(float (&sums)[4][4], const uint4* patches, const uint4 (&w)[kSteps][2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint4 low = w[step][0], high = w[step][1];
    const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 b = patches[few_chunk((warp * kSteps + step) * 4 + lane % 4, 8 * i + lane / 4)];
      ptx::mma_16816<T>(sums[i], a[0], b.x, b.y);
      ptx::mma_16816<T>(sums[i], a[1], b.z, b.w);
    }
  }
}

template <typename T, int kC>
__global__ void __launch_bounds__(kFewThreads, 2) downsample_few_sm90(const __grid_constant__ DownsampleParams p) {
  extern __shared__ __align__(16) char few_smem[];
  constexpr int kSteps = 4 * kC / 32 / (kFewThreads / 32);  // of depth 32, a warp
  uint4* patches = reinterpret_cast<uint4*>(few_smem);
  float4* parts = reinterpret_cast<float4*>(few_smem + kFewRows * 4 * kC * 2);
  const Downsample& d = p.d;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, blocks = d.columns / kFewColumns;
  const int first_row = static_cast<int>(blockIdx.x) / blocks * kFewRows, first_column = static_cast<int>(blockIdx.x) % blocks * kFewColumns;

  uint4 w[kSteps][2];
  const uint4* weight = static_cast<const uint4*>(d.weight) + static_cast<size_t>(first_column + lane / 4) * (kC / 2) + warp * kSteps * 4 + lane % 4;
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) w[i / 2][i % 2] = __ldg(weight + i % 2 * 8 * (kC / 2) + i / 2 * 4);
  const int slot = thread / 2, column = slot % 32 / 4 + thread % 2 * 8;  // of the sums that this thread finishes, two rows of one column
  const float bias = __ldg(d.bias + first_column + column);

  int64_t from[4];  // in units of 16 bytes
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = first_row + warp + 8 * j, tap = thread / 8 % 4;
    const int m = row < p.rows ? row : 0, n = p.by_image.quotient(m), rest = m - n * static_cast<int>(p.by_image.divisor);
    const int oy = p.by_row.quotient(rest), ox = rest - oy * static_cast<int>(p.by_row.divisor);
    const size_t pixel = (static_cast<size_t>(n) * d.height + 2 * oy + tap / 2) * d.width + 2 * ox + tap % 2;
    from[j] = row < p.rows ? static_cast<int64_t>(pixel) * (kC / 8) + thread % 8 : -1;
  }

  wait_for_inputs<true>();
  launch_dependents<true>();
  load_patches<T, kC>(p, patches, from);
  __syncthreads();
  float sums[4][4] = {};
  multiply_patches<T, kSteps>(sums, patches, w);
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[(warp * 4 + i) * 32 + lane] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  __syncthreads();

  float2 v = make_float2(bias, bias);
#pragma unroll
  for (int i = 0; i < kFewThreads / 32; ++i) {
    const float2 part = reinterpret_cast<const float2*>(parts)[i * 256 + thread];
    v.x += part.x, v.y += part.y;
  }
  // Threads of neighbouring columns swap a row, so that each stores a pair of columns.
  const int odd = column & 1, row = first_row + slot / 32 * 8 + slot % 4 * 2 + odd;
  const float other = __shfl_xor_sync(~0u, odd ? v.x : v.y, 8);
  const uint32_t pair = odd ? ptx::pack2<T>(other, v.y) : ptx::pack2<T>(v.x, other);
  if (row < p.rows) static_cast<uint32_t*>(d.y)[(static_cast<size_t>(row) * d.columns + first_column + column - odd) / 2] = pair;
}

}  // namespace sm90
}  // namespace convfirst::patch
