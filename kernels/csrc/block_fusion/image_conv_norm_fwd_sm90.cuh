// First launch of the split path on Hopper for depthwise 7x7 filters on narrow maps: A = LayerNorm(conv(x) + bias), an image a block,
// on the float32 units: every tap that lies outside the map is left out, which the tensor cores' Toeplitz matrices can't.
//
//   x, one image [rows][kWidth][channels]        convolution, a thread a channel            LayerNorm, in place -> A
//   +---------------------------+   row r        +--------------------------------+         eight lanes a pixel,
//   | contiguous in NHWC: a     |  ----------->  | sums of output rows r - 3 ...  |  ---->  16-byte loads and stores
//   | bulk copy a row, each     |  read once     | r + 3, kWidth of each;         |  row
//   | with a barrier of its own |                | filter in 42 registers         |  r - 3
//   +---------------------------+                +--------------------------------+
//
//   what                        where                                          written by              released when
//   x                           shared, whole image                            bulk copies, a thread   its row was read, per thread
//   filter of a channel         42 registers, float32; its first row in L1     before the first row    channel done
//   sums of seven rows          7 kWidth registers, float32                    multiply-adds           row complete
//   convolution + bias, 16 bit  shared, in x's place: three rows behind it     the channel's thread    normalised
//
//   Sums move one row down in the register file for nothing: a row's first multiply-add reads the register of the row above.
#pragma once

#include "../common/again.cuh"
#include "../common/grid_sm90.cuh"
#include "../common/ptx.cuh"
#include "../common/sm90.cuh"
#include "image_conv_norm_sm90.h"

namespace convfirst::block_fusion::sm90 {

using convfirst::sm90::bulk_load;
using convfirst::sm90::TransactionBarrier;

template <DType kDType, int kWidth_>
struct ImageTraits {
  using Element = std::conditional_t<kDType == DType::kHalf, __half, __nv_bfloat16>;
  static constexpr int kWidth = kWidth_, kK = kImageKernel, kPad = kK / 2;
  static constexpr int kMostThreads = image_most_threads(kWidth);
  static constexpr bool kOnePass = image_one_pass(kWidth);
};

template <class Element>
__device__ __forceinline__ float to_float(uint16_t bits) {
  return ptx::unpack2<Element>(bits).x;
}

// Read where it is used, not kept: from L1 after the first time. 0 where there is none.
__device__ __forceinline__ float load_bias(const ImageParams& p, int channel) {
  return p.bias != nullptr ? __uint_as_float(again::load_32(p.bias + channel)) : 0.f;
}
template <class Element>
__device__ __forceinline__ float load_tap(const ImageParams& p, int channel, int tap) {
  return to_float<Element>(again::load_16(static_cast<const uint16_t*>(p.weight) + tap * p.channels + channel));
}

// A channel of the image, from its first row to its last.
template <class Traits>
struct ImageChannel {
  using Element = typename Traits::Element;
  static constexpr int kWidth = Traits::kWidth, kK = Traits::kK, kPad = Traits::kPad;
  float filter[kK - 1][kK];  // of the rows but the first, which is read where it is used: it would not fit beside 14 columns
  float sums[kK][kWidth];  // [i]: of output row r - 3 + i

  __device__ __forceinline__ void load_filter(const ImageParams& p, int channel) {
#pragma unroll
    for (int i = 0; i < (kK - 1) * kK; ++i) filter[i / kK][i % kK] = load_tap<Element>(p, channel, kK + i);
  }

  // sums[i] of the row after = sums[i + 1] + the products of input row x with the filter's row 6 - i.
  template <int kSlot>
  __device__ __forceinline__ void add_row(const float (&x)[kWidth], const ImageParams& p, int channel) {
    constexpr int kRow = kK - 1 - kSlot;
    constexpr bool kNew = kSlot + 1 == kK;
    float w[kK];
#pragma unroll
    for (int tap = 0; tap < kK; ++tap) w[tap] = kNew ? load_tap<Element>(p, channel, tap) : filter[kNew ? 0 : kRow - 1][tap];
    const float start = kNew ? load_bias(p, channel) : 0.f;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sums[kSlot][c] = fmaf(x[c], w[kPad], kNew ? start : sums[kNew ? kSlot : kSlot + 1][c]);
#pragma unroll
    for (int tap = 0; tap < kK; ++tap) {
      if (tap == kPad) continue;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const int from = c + tap - kPad;
        if (from >= 0 && from < kWidth) sums[kSlot][c] = fmaf(x[from], w[tap], sums[kSlot][c]);
      }
    }
  }

  // Rows outside the map are left as they are: nothing reads them.
  template <int kSlot = 0>
  __device__ __forceinline__ void add_rows(const float (&x)[kWidth], const ImageParams& p, int channel, int row) {
    if constexpr (kSlot < kK) {
      if (static_cast<unsigned>(row - kPad + kSlot) < static_cast<unsigned>(p.height)) add_row<kSlot>(x, p, channel);
      add_rows<kSlot + 1>(x, p, channel, row);
    }
  }

  // The complete row, kWidth pixels `stride` bytes apart.
  template <int kSlot>
  __device__ __forceinline__ void store(uint32_t to, int stride) const {
#pragma unroll
    for (int c = 0; c < kWidth; c += 2) {
      const bool two = c + 1 < kWidth;
      const uint32_t pair = ptx::pack2<Element>(sums[kSlot][c], sums[kSlot][two ? c + 1 : c]);
      again::store_shared_16(to + c * stride, pair);
      if (two) again::store_shared_16(to + (c + 1) * stride, pair >> 16);
    }
  }

  // In place. What follows from the channel is worked out in each row:
  // no register is left to keep it.
  __device__ __forceinline__ void run(const ImageParams& p, unsigned char* smem, int first_channel) {
    const int stride = p.channels * 2, row_bytes = kWidth * stride, kept = kPad * row_bytes;
    const float start = load_bias(p, first_channel + again::thread_index());
#pragma unroll
    for (int i = 0; i < kK; ++i)
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sums[i][c] = start;
#pragma unroll 1
    for (int r = 0; r < p.height; ++r) {
      reinterpret_cast<const TransactionBarrier*>(smem)[r].wait(0);
      const int channel = first_channel + again::thread_index();
      const uint32_t at = ptx::smem_address(smem) + kImageBarrierBytes + 2 * channel + r * row_bytes;
      float x[kWidth];
#pragma unroll
      for (int c = 0; c < kWidth; ++c) x[c] = to_float<Element>(again::load_shared_16(at + c * stride));
      add_rows(x, p, channel, r);
      if (r >= kPad) store<0>(at - kept, stride);
    }
    const int channel = first_channel + again::thread_index();
    const uint32_t at = ptx::smem_address(smem) + kImageBarrierBytes + 2 * channel + (p.height - kPad) * row_bytes;
    if (p.height >= 3) store<1>(at, stride);
    if (p.height >= 2) store<2>(at + row_bytes, stride);
    store<3>(at + 2 * row_bytes, stride);
  }
};

// 8 elements, to and from float32.
template <class Element>
__device__ __forceinline__ void unpack8(float (&v)[8], const uint4& from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = ptx::unpack2<Element>(words[j]);
    v[2 * j] = pair.x, v[2 * j + 1] = pair.y;
  }
}
template <class Element>
__device__ __forceinline__ uint4 pack8(const float (&v)[8]) {
  return make_uint4(ptx::pack2<Element>(v[0], v[1]), ptx::pack2<Element>(v[2], v[3]), ptx::pack2<Element>(v[4], v[5]),
                    ptx::pack2<Element>(v[6], v[7]));
}

__device__ __forceinline__ void load8(float (&v)[8], const float* from) {
  const float4 low = __ldg(reinterpret_cast<const float4*>(from)), high = __ldg(reinterpret_cast<const float4*>(from) + 1);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// Scale and shift of a pixel's norm: its eight lanes share the sums.
template <class Element>
__device__ __forceinline__ float2 scale_and_shift(const ImageParams& p, const uint4* pixel, int lane) {
  const int chunks = p.channels / 8;
  float sum = 0.f, square = 0.f;
#pragma unroll 3
  for (int chunk = lane; chunk < chunks; chunk += 8) {
    float v[8];
    unpack8<Element>(v, pixel[chunk]);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j], square = fmaf(v[j], v[j], square);
  }
#pragma unroll
  for (int d = 1; d < 8; d *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, d);
    square += __shfl_xor_sync(0xffffffffu, square, d);
  }
  const float mean = sum / p.channels, scale = rsqrtf(fmaxf(square / p.channels - mean * mean, 0.f) + p.eps);
  return make_float2(scale, -mean * scale);
}

// The staged image into A.
template <class Traits>
__device__ __forceinline__ void normalise(const ImageParams& p, const uint4* image) {
  using Element = typename Traits::Element;
  const int chunks = p.channels / 8, pixels = p.height * Traits::kWidth, lane = threadIdx.x % 8;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * pixels;
#pragma unroll 1
  for (int i = threadIdx.x / 8; i - static_cast<int>(threadIdx.x % 32 / 8) < pixels; i += blockDim.x / 8) {
    const bool exists = i < pixels;
    const uint4* pixel = image + (exists ? i : 0) * chunks;
    float2 norm = make_float2(1.f, 0.f);
    if (p.has_norm) norm = scale_and_shift<Element>(p, pixel, lane);
    if (!exists) continue;
    if (p.has_norm && p.rstd != nullptr && lane == 0) p.rstd[first + i] = norm.x;
    uint4* out = static_cast<uint4*>(p.a) + (first + i) * chunks;
#pragma unroll 3
    for (int chunk = lane; chunk < chunks; chunk += 8) {
      float v[8], w[8];
      unpack8<Element>(v, pixel[chunk]);
      if (p.has_norm) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = fmaf(v[j], norm.x, norm.y);
        if (p.norm_weight != nullptr) {
          load8(w, p.norm_weight + 8 * chunk);
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] *= w[j];
        }
        if (p.norm_bias != nullptr) {
          load8(w, p.norm_bias + 8 * chunk);
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] += w[j];
        }
      } else if (p.residual != nullptr) {
        unpack8<Element>(w, __ldg(static_cast<const uint4*>(p.residual) + (first + i) * chunks + chunk));
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] += w[j];
      }
      out[chunk] = pack8<Element>(v);
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kMostThreads, 1) image_conv_norm_fwd_sm90(const __grid_constant__ ImageParams p) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(128) unsigned char smem[];
  const int row_bytes = Traits::kWidth * p.channels * 2;
  TransactionBarrier* full = reinterpret_cast<TransactionBarrier*>(smem);
  unsigned char* const image = smem + kImageBarrierBytes;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int r = 0; r < p.height; ++r) full[r].init(1);
    grid::fence_barrier_init();
  }
  __syncthreads();
  grid::wait_for_inputs();
  grid::launch_dependents();  // after the wait: the next launch may count on what came before this one
  if (threadIdx.x == 0) {
    const char* x = static_cast<const char*>(p.x) + static_cast<int64_t>(blockIdx.x) * p.height * row_bytes;
#pragma unroll 1
    for (int r = 0; r < p.height; ++r) {
      full[r].arrive_and_expect_tx(row_bytes);
      bulk_load(x + r * row_bytes, full + r, image + r * row_bytes, row_bytes);
    }
  }
  __syncwarp();
  const auto convolve = [&](int first) {
    if (first + static_cast<int>(threadIdx.x) >= p.channels) return;
    ImageChannel<Traits> work;
    work.load_filter(p, first + threadIdx.x);
    work.run(p, smem, first);
  };
  if constexpr (Traits::kOnePass) {
    convolve(0);
  } else {
#pragma unroll 1
    for (int first = 0; first < p.channels; first += blockDim.x) convolve(first);
  }
  __syncthreads();
  normalise<Traits>(p, reinterpret_cast<const uint4*>(image));
}

}  // namespace convfirst::block_fusion::sm90
