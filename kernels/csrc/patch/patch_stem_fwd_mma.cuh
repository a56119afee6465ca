// ConvNeXt's stem in one launch, for sm_80 and newer: ldmatrix, mma.sync m16n8k16. Every warp is on its own.
//
//      x, 16 patches of 4 x 4 pixels             y, 16 pixels
//    +----+----+----+----                      +-------------+
//    | 12 |    |    |  ...    x  W [N x 48]    | rms w + b   |----> NHWC
//    | in |    |    |        ------------->    |             |
//    | a  |    |    |            K = 48        +-------------+
//    | row|    |    |
//    +----+----+----+----
//
//   what                 where                                size
//   W, bias, w, b        shared, for all tiles                N x 48, 3 N floats
//   patches              registers: this tile and the next    12 words a thread each
//   sums                 registers, fp32                      16 x N a warp
//
// The 12 values of a patch's row lie in a row in channels_last memory, so a word of the A operand is a word of x.
#pragma once

#include "../block_fusion/matmul_stage_sm80.cuh"
#include "../common/ptx.cuh"
#include "fragments.cuh"
#include "sync.cuh"
#include "tile.h"

namespace convfirst::patch {

struct PatchStemParams {
  PatchStem s;
  int pixels;  // of y
  Divider by_image, by_row;
  int warps;     // of the grid
  bool aligned;  // the words of a patch's rows are words of x
};

namespace sm80 {

extern __shared__ __align__(128) unsigned char smem[];

// Words of the A operand of 16 pixels from `first` on; zeros beyond the last.
template <typename T>
__device__ __forceinline__ void load_patches(const PatchStemParams& p, int first, uint32_t (&a)[3][4]) {
  const Image& x = p.s.x;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int pixel = first + half * 8 + g;
    const bool valid = pixel < p.pixels;
    const int n = p.by_image.quotient(valid ? pixel : 0), rest = (valid ? pixel : 0) - n * static_cast<int>(p.by_image.divisor);
    const int row = p.by_row.quotient(rest), column = rest - row * static_cast<int>(p.by_row.divisor);
    const T* from = static_cast<const T*>(x.data) + n * x.stride_n + 4 * row * x.stride_h + 4 * column * x.stride_w;
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      const int word = i * 4 + t, dy = word / 6, j = word % 6;
      uint32_t value = 0;
      if (valid && p.aligned) {
        value = __ldg(reinterpret_cast<const uint32_t*>(from + dy * x.stride_h) + j);
      } else if (valid) {
        T pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)
          pair[e] = from[dy * x.stride_h + (2 * j + e) / 3 * x.stride_w + (2 * j + e) % 3 * x.stride_c];
        value = ptx::pack2<T>(static_cast<float>(pair[0]), static_cast<float>(pair[1]));
      }
      a[i / 2][i % 2 * 2 + half] = value;
    }
  }
}

template <typename T, int kDim, bool kHopper>
__global__ void __launch_bounds__(kPatchThreads, kDim <= 96 ? 3 : 2) patch_stem_fwd(const __grid_constant__ PatchStemParams p) {
  constexpr int kBlocks = kDim / 8, kVector = vector_blocks(kBlocks), kPitch = row_bytes(kPatchValues);
  const PatchStem& s = p.s;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* vectors = reinterpret_cast<float*>(smem + kDim * kPitch);
  wait_for_inputs<kHopper>();
  launch_dependents<kHopper>();
  for (int i = threadIdx.x; i < kDim * (kPatchValues / 8); i += kPatchThreads) {
    const int row = i / (kPatchValues / 8), piece = i % (kPatchValues / 8);
    ptx::cp_async16(ptx::smem_address(smem + row * kPitch + piece * 16),
                    static_cast<const T*>(s.weight) + channel_of(row / 8, row % 8, kVector) * kPatchValues + piece * 8, true);
  }
  for (int i = threadIdx.x; i < kDim; i += kPatchThreads) {
    vectors[i] = s.bias[i];
    vectors[kDim + i] = s.norm_weight[i];
    vectors[2 * kDim + i] = s.norm_bias[i];
  }
  int first = (blockIdx.x * (kPatchThreads / 32) + threadIdx.x / 32) * 16;
  uint32_t next[3][4];
  load_patches<T>(p, first, next);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  const uint32_t b_base = ptx::smem_address(smem) + block_fusion::sm80::b_lane_offset(kPitch);
  for (; first < p.pixels; first += p.warps * 16) {
    uint32_t a[3][4];
#pragma unroll
    for (int i = 0; i < 12; ++i) a[i / 4][i % 4] = next[i / 4][i % 4];
    load_patches<T>(p, first + p.warps * 16, next);
    float acc[kBlocks][4];
    float squares[2] = {};
    const float* mine = vectors + t * 2 * kVector;  // a thread's channels: groups of 2 kVector in a row, from here on
#pragma unroll
    for (int n = 0; n < kBlocks; n += kVector) {
      float bias[2 * kVector];
      load_floats(bias, mine + n * 8);
#pragma unroll
      for (int j = 0; j < 2 * kVector; ++j) acc[n + j / 2][j % 2] = acc[n + j / 2][2 + j % 2] = bias[j];
    }
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2)
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, b_base + n * 8 * kPitch + k * 32);
        ptx::mma_16816<T>(acc[n], a[k], b[0], b[1]);
        ptx::mma_16816<T>(acc[n + 1], a[k], b[2], b[3]);
      }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) squares[i / 2] = fmaf(acc[n][i], acc[n][i], squares[i / 2]);
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      inverse[half] = s.has_norm ? rsqrtf(quad_sum(squares[half]) * (1.f / kDim) + s.eps) : 1.f;
    T* y = static_cast<T*>(s.y) + static_cast<size_t>(first + g) * kDim + t * 2 * kVector;
#pragma unroll
    for (int n = 0; n < kBlocks; n += kVector) {
      float scale[2 * kVector], shift[2 * kVector];
      load_floats(scale, mine + kDim + n * 8);
      load_floats(shift, mine + 2 * kDim + n * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t packed[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          packed[j] = ptx::pack2<T>(fmaf(acc[n + j][2 * half] * inverse[half], scale[2 * j], shift[2 * j]),
                                    fmaf(acc[n + j][2 * half + 1] * inverse[half], scale[2 * j + 1], shift[2 * j + 1]));
        if (first + half * 8 + g < p.pixels) store_words<kVector>(y + half * 8 * kDim + n * 8, packed);
      }
    }
  }
}

}  // namespace sm80
}  // namespace convfirst::patch
