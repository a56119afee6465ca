// Host face of image_conv_norm_fwd_sm90, the split path's first launch for depthwise 7x7 filters on maps 7 or 14 pixels wide:
// A = LayerNorm(conv(x) + bias), an image a block.
//
//   image_plan(problem, device, &plan)    false: not covered
//   image_cost(problem, device, plan)     estimated microseconds
//   image_launch(problem, tensors, plan, a, dependent, stream)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "conv_norm_extras.h"
#include "params.h"

namespace convfirst::block_fusion::sm90 {

constexpr int kImageKernel = 7;
constexpr int kImageMostRows = 64;  // a barrier each, ahead of the image in shared memory
constexpr int kImageBarrierBytes = kImageMostRows * 8;

// Threads that a block may have: what a thread keeps of `width` columns in registers decides.
constexpr int image_most_threads(int width) { return width == 7 ? 512 : 384; }

// Whether they are all channels that the kernel can do: another register, and it spills.
constexpr bool image_one_pass(int width) { return width == 14; }
constexpr int image_most_channels(int width) { return image_one_pass(width) ? image_most_threads(width) : 1536; }

struct ImagePlan {
  int threads;  // a channel each, `passes` times
  int passes;
  int grid;
  int shared_memory;
};

// What the kernel receives.
struct ImageParams {
  const void* x;
  const void* weight;
  const float* bias;
  const float* norm_weight;
  const float* norm_bias;
  const void* residual;  // added to the convolution where there is no norm, or nullptr
  void* a;
  float* rstd;  // of each pixel, or nullptr
  float eps;
  int has_norm, height, channels;
};

inline int image_shared_memory(const Problem& q) {
  return static_cast<int>(q.height * q.width * q.channels * 2 + kImageBarrierBytes);
}

inline bool image_covers(const Problem& q, const Device& device) {
  return device.capability == 90 && q.batch > 0 && q.height > 0 && q.height <= kImageMostRows && (q.width == 7 || q.width == 14) &&
         q.group_width == 1 && q.kernel_size == kImageKernel && q.channels % 8 == 0 && q.channels >= 8 &&
         q.channels <= image_most_channels(static_cast<int>(q.width)) && q.batch < (int64_t{1} << 31) &&
         image_shared_memory(q) <= device.max_shared_memory;
}

inline bool image_plan(const Problem& q, const Device& device, ImagePlan* plan) {
  if (!image_covers(q, device)) return false;
  const int most = image_most_threads(static_cast<int>(q.width));
  plan->passes = (q.channels + most - 1) / most;
  plan->threads = ((q.channels + plan->passes - 1) / plan->passes + 31) / 32 * 32;
  plan->grid = static_cast<int>(q.batch);
  plan->shared_memory = image_shared_memory(q);
  return true;
}

// Of rows or columns of a map that many pixels long: taps of all outputs that lie inside.
inline int image_taps(int64_t length) {
  int taps = 0;
  for (int i = 0; i < length; ++i)
    for (int tap = -kImageKernel / 2; tap <= kImageKernel / 2; ++tap) taps += i + tap >= 0 && i + tap < length;
  return taps;
}

// Instructions issued by a multiprocessor's four schedulers, image after image, and a pass's wait for its filter; two thirds of the time at the
// memory's bandwidth are not hidden under them. Fitted to measured times (NOTES.md).
inline double image_cost(const Problem& q, const Device& device, const ImagePlan& plan) {
  const double warps = std::max(1.0, plan.threads / 128.0);
  const double products = plan.passes * (1.2 * warps * (image_taps(q.width) * image_taps(q.height) + 120.0 * q.height) + 1700);
  const double norm = 75.0 * q.height * q.width * q.channels / 1024;
  const double images = std::ceil(static_cast<double>(q.batch) / device.multiprocessors);
  const double memory = q.batch * q.height * q.width * q.channels * 4.0 / 3.5e6;
  return 4 + images * (products + norm) / 1700 + 0.7 * memory;
}

// The compiled kernel of one dtype and width; defined in launch_image_conv_norm_sm90.cuh, instantiated in instantiations_sm90/.
// launch returns cudaError_t as int. dependent: by programmatic dependent launch; the kernel waits for its inputs itself.
template <DType kDType, int kWidth>
struct ImageKernel {
  static int launch(const ImageParams& params, const ImagePlan& plan, bool dependent, cudaStream_t stream);
  static const void* pointer();
};

// a: [batch * height * width, channels] of the problem's dtype, 16-byte aligned, as x is. Of the tensors only x, conv_weight, conv_bias,
// norm_weight, norm_bias and eps are read. Returns cudaError_t as int; never synchronises.
int image_launch(const Problem& q, const Tensors& t, const ImagePlan& plan, void* a, bool dependent, cudaStream_t stream,
                 const ConvNormExtras& extras = {});

// The kernel's entry point, for cudaFuncGetAttributes.
const void* image_pointer(const Problem& q);

}  // namespace convfirst::block_fusion::sm90
