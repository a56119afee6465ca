// First launch of the portable split path for depthwise 7x7 filters on maps 7 or 14 pixels wide: A = LayerNorm(conv(x) + bias), an image a
// block, on the float32 units. image_conv_norm_fwd_sm90.cuh, which draws it, with cp.async in the place of bulk copies.
//
//   what                        where                                          written by              released when
//   x                           shared, whole image                            cp.async, in batches    its row was read, per thread
//   filter of a channel         42 registers, float32; its first row in L1     before the first row    channel done
//   sums of seven rows          7 kWidth registers, float32                    multiply-adds           row complete
//   convolution + bias, 16 bit  shared, in x's place: three rows behind it     the channel's thread    normalised
#pragma once

#include "image_conv_norm_fwd_sm90.cuh"

namespace convfirst::block_fusion::sm80 {

// x arrives in batches of rows, 1, 2 and the rest, each with a barrier of the whole block: the first products wait for one row alone.
constexpr int kImageBatches = 3;
CONVFIRST_HOST_DEVICE constexpr int image_batch_begin(int batch) { return batch == 0 ? 0 : batch == 1 ? 1 : 3; }

__device__ __forceinline__ void image_load(const sm90::ImageParams& p, unsigned char* image, int row_bytes) {
  const char* x = static_cast<const char*>(p.x) + static_cast<int64_t>(blockIdx.x) * p.height * row_bytes;
#pragma unroll
  for (int batch = 0; batch < kImageBatches; ++batch) {
    const int end = (batch + 1 < kImageBatches ? min(image_batch_begin(batch + 1), p.height) : p.height) * row_bytes;
    const uint32_t to = ptx::smem_address(image);
#pragma unroll 4
    for (int at = min(image_batch_begin(batch), p.height) * row_bytes + threadIdx.x * 16; at < end; at += blockDim.x * 16)
      ptx::cp_async16(to + at, x + at, true);
    ptx::cp_async_commit();
  }
}

// Before row r is read: where a batch begins, it is there for all threads.
__device__ __forceinline__ void image_wait(int r) {
  if (r == image_batch_begin(0)) {
    ptx::cp_async_wait<2>();
  } else if (r == image_batch_begin(1)) {
    ptx::cp_async_wait<1>();
  } else if (r == image_batch_begin(2)) {
    ptx::cp_async_wait<0>();
  } else {
    return;
  }
  __syncthreads();
}

template <class Traits>
struct ImageChannel : sm90::ImageChannel<Traits> {
  using Element = typename Traits::Element;
  static constexpr int kWidth = Traits::kWidth, kK = Traits::kK, kPad = Traits::kPad;

  // In place. What follows from the channel is worked out in each row: no register is left to keep it. kWait: x is still on its way.
  template <bool kWait>
  __device__ __forceinline__ void run(const sm90::ImageParams& p, unsigned char* image, int first_channel) {
    const int stride = p.channels * 2, row_bytes = kWidth * stride, kept = kPad * row_bytes;
    const float start = sm90::load_bias(p, first_channel + again::thread_index());
#pragma unroll
    for (int i = 0; i < kK; ++i)
#pragma unroll
      for (int c = 0; c < kWidth; ++c) this->sums[i][c] = start;
#pragma unroll 1
    for (int r = 0; r < p.height; ++r) {
      if (kWait) image_wait(r);
      const int channel = first_channel + again::thread_index();
      const uint32_t at = ptx::smem_address(image) + 2 * channel + r * row_bytes;
      float x[kWidth];
#pragma unroll
      for (int c = 0; c < kWidth; ++c) x[c] = sm90::to_float<Element>(again::load_shared_16(at + c * stride));
      this->add_rows(x, p, channel, r);
      if (r >= kPad) this->template store<0>(at - kept, stride);
    }
    const int channel = first_channel + again::thread_index();
    const uint32_t at = ptx::smem_address(image) + 2 * channel + (p.height - kPad) * row_bytes;
    if (p.height >= 3) this->template store<1>(at, stride);
    if (p.height >= 2) this->template store<2>(at + row_bytes, stride);
    this->template store<3>(at + 2 * row_bytes, stride);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kMostThreads, 1) image_conv_norm_fwd_sm80(const __grid_constant__ sm90::ImageParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  image_load(p, smem, Traits::kWidth * p.channels * 2);
  if (static_cast<int>(threadIdx.x) < p.channels) {
    ImageChannel<Traits> work;
    work.load_filter(p, threadIdx.x);
    work.template run<true>(p, smem, 0);
  } else {
#pragma unroll 1
    for (int r = 0; r < min(p.height, image_batch_begin(kImageBatches - 1) + 1); ++r) image_wait(r);
  }
  if constexpr (!Traits::kOnePass) {
#pragma unroll 1
    for (int first = blockDim.x; first < p.channels; first += blockDim.x) {
      if (first + static_cast<int>(threadIdx.x) >= p.channels) break;
      ImageChannel<Traits> work;
      work.load_filter(p, first + threadIdx.x);
      work.template run<false>(p, smem, first);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  sm90::normalise<Traits>(p, reinterpret_cast<const uint4*>(smem));
}

}  // namespace convfirst::block_fusion::sm80
