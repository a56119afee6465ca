// Filters for the input gradient: w[k, r, s, c] -> result[c, t, u, k], all taps or those of one phase of the stride.
//
//   w of one tap                  shared, 32 x 33              result of one tap
//   k | c c c ...  ---read--->    [k][c]       ---write--->    c | k k k ...
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace convfirst::direct {

// Tap t of the result is row first_h + t * step_h of w, or with `backwards` the last such row minus t steps; columns likewise.
struct TransposedTaps {
  int filters, channels, kernel_h, kernel_w;
  int taps_h, taps_w, first_h, first_w, step_h, step_w;
  bool backwards;
};

// kArch keeps the paths' copies apart.
template <class Bits, int kArch>
__global__ void transpose_filters(const Bits* __restrict__ w, Bits* __restrict__ result, const __grid_constant__ TransposedTaps q) {
  __shared__ Bits tile[32][33];
  const int t = blockIdx.z / q.taps_w, u = blockIdx.z - t * q.taps_w;
  const int r = q.first_h + (q.backwards ? q.taps_h - 1 - t : t) * q.step_h, s = q.first_w + (q.backwards ? q.taps_w - 1 - u : u) * q.step_w;
  const int first_k = blockIdx.x * 32, first_c = blockIdx.y * 32;
  for (int i = threadIdx.y; i < 32; i += 8) {
    const int k = first_k + i, c = first_c + threadIdx.x;
    if (k < q.filters && c < q.channels) tile[i][threadIdx.x] = w[((static_cast<int64_t>(k) * q.kernel_h + r) * q.kernel_w + s) * q.channels + c];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += 8) {
    const int k = first_k + threadIdx.x, c = first_c + i;
    if (k < q.filters && c < q.channels) result[(static_cast<int64_t>(c) * q.taps_h * q.taps_w + blockIdx.z) * q.filters + k] = tile[threadIdx.x][i];
  }
}

template <int kArch>
int launch_transpose_filters(const void* w, void* result, const TransposedTaps& q, int element_bytes, cudaStream_t stream) {
  const dim3 grid((q.filters + 31) / 32, (q.channels + 31) / 32, q.taps_h * q.taps_w), threads(32, 8);
  if (element_bytes == 2) {
    transpose_filters<uint16_t, kArch><<<grid, threads, 0, stream>>>(static_cast<const uint16_t*>(w), static_cast<uint16_t*>(result), q);
  } else {
    transpose_filters<uint32_t, kArch><<<grid, threads, 0, stream>>>(static_cast<const uint32_t*>(w), static_cast<uint32_t*>(result), q);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace convfirst::direct
