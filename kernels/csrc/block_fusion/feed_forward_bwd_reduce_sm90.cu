// Before and after the two kernels of the feed-forward half's backward: operands in the form that both want, and partial sums, one set a range
// of pixels, to gradients. Sums have one order, so results repeat to the bit.
//
//   prepare   W2 <- W2 * layer scale * 2^k, with 2^k max|layer scale| in [1/4, 1/2): float16 would lose a layer scale of 1e-6
//             b1 <- b1 * bias_scale(activation), zeros where absent; sample scale by pixel; 2^-k / 2, which the sums are multiplied by
//             (both kernels compute twice the slope of the activation)
//   reduce    dW1 = 2^-k / 2 sum, dW2 = layer scale * sum^T, db1 = 2^-k / 2 sum, db2 = layer scale * sum, d layer scale's sums over 8 hidden units
//   finish    d layer scale = sum over hidden units + b2 * sum of dy
#include <cuda_runtime.h>

#include "activation_sm90.cuh"
#include "feed_forward_bwd_tile_sm90.h"

namespace convfirst::block_fusion::sm90 {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float exponent_of_layer_scale(const float* layer_scale, int channels) {
  __shared__ float largest[kThreads / 32];
  float most = 0.f;
  if (layer_scale != nullptr) {
    for (int c = threadIdx.x; c < channels; c += kThreads) most = fmaxf(most, fabsf(__ldg(layer_scale + c)));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) most = fmaxf(most, largest[i]);
  const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 125;  // most in [2^(exponent - 2), 2^(exponent - 1))
  return most > 0.f ? static_cast<float>(min(max(exponent, -100), 100)) : 0.f;
}

struct PrepareParams {
  const void* project_weight;
  const float *expand_bias, *layer_scale, *sample_scale;
  void* scaled_weight;
  float *bias, *pixel_scale, *scalars;
  int channels, hidden, pixels, padded_pixels, image_pixels;
  float bias_scale;
};

template <class Element>
__global__ void __launch_bounds__(kThreads) prepare_feed_forward_bwd_sm90(const __grid_constant__ PrepareParams p) {
  wait_for_previous_launch();
  allow_next_launch();
  const float exponent = exponent_of_layer_scale(p.layer_scale, p.channels), factor = exp2f(-exponent);
  const int first = blockIdx.x * kThreads + threadIdx.x, step = gridDim.x * kThreads;
  if (p.layer_scale != nullptr) {
    const int row_vectors = p.hidden / 8;
    for (int i = first; i < p.channels * row_vectors; i += step) {
      const float scale = __ldg(p.layer_scale + i / row_vectors) * factor;
      uint4 v = __ldg(static_cast<const uint4*>(p.project_weight) + i);
      uint32_t* u = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 w = unpack2<Element>(u[k]);
        u[k] = pack2<Element>(w.x * scale, w.y * scale);
      }
      static_cast<uint4*>(p.scaled_weight)[i] = v;
    }
  }
  for (int i = first; i < p.hidden; i += step) p.bias[i] = p.expand_bias != nullptr ? __ldg(p.expand_bias + i) * p.bias_scale : 0.f;
  if (p.sample_scale != nullptr) {
    for (int i = first; i < p.padded_pixels; i += step) p.pixel_scale[i] = i < p.pixels ? __ldg(p.sample_scale + i / p.image_pixels) : 0.f;
  }
  if (first == 0) *p.scalars = 0.5f * exp2f(exponent);
}

struct ReduceParams {
  const float *d_expand_weight_parts, *d_project_weight_parts, *d_expand_bias_parts, *d_project_bias_parts, *scalars;
  const float *layer_scale, *project_bias;
  const void* project_weight;
  float* layer_scale_parts;
  float *d_expand_weight, *d_project_weight, *d_expand_bias, *d_project_bias, *d_layer_scale;
  int channels, hidden, splits, groups;
};

__device__ __forceinline__ float sum_parts(const float* parts, int64_t stride, int count) {
  float sum = 0.f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) sum += __ldcg(parts + i * stride);
  return sum;
}

// One warp, lanes over the parts.
__device__ __forceinline__ float sum_parts_of_warp(const float* parts, int64_t stride, int count) {
  float sum = 0.f;
  for (int i = threadIdx.x % 32; i < count; i += 32) sum += __ldcg(parts + i * stride);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// blockIdx.z: 0 dW1, 1 dW2 in tiles of 8 hidden units x 32 channels, 2 the biases' gradients, a warp each.
template <class Element>
__global__ void __launch_bounds__(kThreads) reduce_feed_forward_bwd_sm90(const __grid_constant__ ReduceParams p) {
  __shared__ float tile[8][33];
  wait_for_previous_launch();
  allow_next_launch();
  const int row = threadIdx.x / 32, column = threadIdx.x % 32;
  const int hidden = blockIdx.x * 8 + row, channel = blockIdx.y * 32 + column;
  const int64_t matrix = static_cast<int64_t>(p.hidden) * p.channels, at = static_cast<int64_t>(hidden) * p.channels + channel;
  const float scale = __ldg(p.scalars);
  if (blockIdx.z == 0) {
    if (channel < p.channels) p.d_expand_weight[at] = scale * sum_parts(p.d_expand_weight_parts + at, matrix, p.splits);
  } else if (blockIdx.z == 1) {
    tile[row][column] = channel < p.channels ? sum_parts(p.d_project_weight_parts + at, matrix, p.splits) : 0.f;
    __syncthreads();
    const int c = blockIdx.y * 32 + threadIdx.x / 8, j = blockIdx.x * 8 + threadIdx.x % 8;
    if (c >= p.channels) return;  // whole groups of 8 lanes
    const float g = tile[threadIdx.x % 8][threadIdx.x / 8];
    const int64_t to = static_cast<int64_t>(c) * p.hidden + j;
    p.d_project_weight[to] = p.layer_scale != nullptr ? __ldg(p.layer_scale + c) * g : g;
    if (p.layer_scale == nullptr) return;
    float product = g * static_cast<float>(__ldg(static_cast<const Element*>(p.project_weight) + to));
#pragma unroll
    for (int step = 4; step > 0; step /= 2) product += __shfl_xor_sync(0xffu << (threadIdx.x % 32 / 8 * 8), product, step);
    if (threadIdx.x % 8 == 0) p.layer_scale_parts[static_cast<int64_t>(blockIdx.x) * p.channels + c] = product;
  } else {
    const int warps = gridDim.x * gridDim.y * (kThreads / 32);
    for (int i = (blockIdx.y * gridDim.x + blockIdx.x) * (kThreads / 32) + row; i < p.hidden + p.channels; i += warps) {
      if (i < p.hidden) {
        const float sum = sum_parts_of_warp(p.d_expand_bias_parts + i, p.hidden, p.splits);
        if (column == 0) p.d_expand_bias[i] = scale * sum;
      } else {
        const int c = i - p.hidden;
        const float sum = sum_parts_of_warp(p.d_project_bias_parts + c, p.channels, p.splits * p.groups);
        if (column == 0) {
          p.d_project_bias[c] = p.layer_scale != nullptr ? __ldg(p.layer_scale + c) * sum : sum;
          if (p.d_layer_scale != nullptr) p.d_layer_scale[c] = p.project_bias != nullptr ? __ldg(p.project_bias + c) * sum : 0.f;
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_feed_forward_bwd_sm90(const float* parts, float* d_layer_scale, int count, int channels) {
  wait_for_previous_launch();
  allow_next_launch();
  const int c = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (c >= channels) return;
  const float sum = sum_parts_of_warp(parts + c, channels, count);
  if (threadIdx.x % 32 == 0) d_layer_scale[c] += sum;
}

template <typename... Params, typename... Args>
int start(void (*kernel)(Params...), dim3 grid, cudaStream_t stream, Args... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = kThreads, config.stream = stream;
  config.attrs = &overlap, config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

float* at(char* workspace, int64_t offset) { return reinterpret_cast<float*>(workspace + offset); }

}  // namespace

int launch_backward_prepare(const FeedForwardBackwardProblem& q, const FeedForwardBackwardTensors& t, const FeedForwardBackwardPlan& plan,
                            char* workspace, cudaStream_t stream) {
  PrepareParams p{};
  p.project_weight = t.project_weight, p.expand_bias = t.expand_bias, p.layer_scale = t.layer_scale, p.sample_scale = t.sample_scale;
  p.scaled_weight = workspace + plan.scaled_weight, p.bias = at(workspace, plan.bias), p.pixel_scale = at(workspace, plan.pixel_scale);
  p.scalars = at(workspace, plan.scalars), p.channels = q.channels, p.hidden = q.hidden, p.pixels = static_cast<int>(q.pixels);
  p.padded_pixels = plan.tiles * kTilePixels, p.image_pixels = static_cast<int>(q.image_pixels);
  p.bias_scale = q.activation == Activation::kSilu ? 0.5f : 1.f;
  const int64_t work = std::max<int64_t>({q.has_layer_scale ? q.channels * int64_t{q.hidden} / 8 : 0, q.hidden,
                                          q.has_sample_scale ? p.padded_pixels / 4 : 0});
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(ceil_div(work, kThreads), 528)));
  return q.dtype == DType::kHalf ? start(prepare_feed_forward_bwd_sm90<__half>, grid, stream, p)
                                 : start(prepare_feed_forward_bwd_sm90<__nv_bfloat16>, grid, stream, p);
}

int launch_backward_reduce(const FeedForwardBackwardProblem& q, const FeedForwardBackwardTensors& t, const FeedForwardBackwardPlan& plan,
                           char* workspace, cudaStream_t stream) {
  ReduceParams p{};
  p.d_expand_weight_parts = at(workspace, plan.d_expand_weight), p.d_project_weight_parts = at(workspace, plan.d_project_weight);
  p.d_expand_bias_parts = at(workspace, plan.d_expand_bias), p.d_project_bias_parts = at(workspace, plan.d_project_bias);
  p.scalars = at(workspace, plan.scalars), p.layer_scale = t.layer_scale, p.project_bias = t.project_bias, p.project_weight = t.project_weight;
  p.layer_scale_parts = at(workspace, plan.d_layer_scale), p.d_expand_weight = t.d_expand_weight, p.d_project_weight = t.d_project_weight;
  p.d_expand_bias = t.d_expand_bias, p.d_project_bias = t.d_project_bias, p.d_layer_scale = q.has_layer_scale ? t.d_layer_scale : nullptr;
  p.channels = q.channels, p.hidden = q.hidden, p.splits = plan.splits, p.groups = plan.groups;
  const dim3 grid(q.hidden / 8, static_cast<unsigned>(ceil_div(q.channels, 32)), 3);
  const int error = q.dtype == DType::kHalf ? start(reduce_feed_forward_bwd_sm90<__half>, grid, stream, p)
                                            : start(reduce_feed_forward_bwd_sm90<__nv_bfloat16>, grid, stream, p);
  if (error != 0 || !q.has_layer_scale) return error;
  const dim3 blocks(static_cast<unsigned>(ceil_div(q.channels, kThreads / 32)));
  return start(finish_feed_forward_bwd_sm90, blocks, stream, static_cast<const float*>(p.layer_scale_parts), t.d_layer_scale, q.hidden / 8,
               q.channels);
}

}  // namespace convfirst::block_fusion::sm90
