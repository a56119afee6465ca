// The problem of a Winograd convolution, how its kernels divide it, and what launches them. Plain C++: shared by host and device.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace convfirst::winograd {

enum class DType { kFloat, kHalf, kBFloat16 };
enum class Activation { kNone, kRelu, kSilu, kGelu };

// Words of 4 bytes of a step of the products, 16 channels in float32 and 32 in 16 bits; transformed data and filters are padded to
// whole slices.
constexpr int kSlice = 16;
constexpr int kOutputGrain = 64;   // output channels are padded to a multiple of it
constexpr int kRowGrain = 128;     // tiles are padded to a multiple of it, in the workspace alone

constexpr int bytes_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A 3x3 convolution of stride 1, images NHWC.
struct Problem {
  int batch, height, width, channels, outputs, padding;
  DType dtype;
  Activation activation;

  constexpr int out_height() const { return height + 2 * padding - 2; }
  constexpr int out_width() const { return width + 2 * padding - 2; }
  constexpr int tile_rows(int m) const { return static_cast<int>(ceil_div(out_height(), m)); }
  constexpr int tile_columns(int m) const { return static_cast<int>(ceil_div(out_width(), m)); }
  constexpr int64_t tiles(int m) const { return int64_t{batch} * tile_rows(m) * tile_columns(m); }
  constexpr int channel_pitch() const { return static_cast<int>(round_up(channels, kSlice * 4 / bytes_of(dtype))); }
  constexpr int output_pitch() const { return static_cast<int>(round_up(outputs, kOutputGrain)); }
};

// How the split path (transform, batched products, inverse) runs a problem.
struct SplitPlan {
  int block_rows, block_columns;  // tiles and output channels of a block of the products
  int splits;                     // of the channels; the inverse transform adds the parts in order
  int64_t chunk;                  // tiles whose transformed data lie in the workspace at once, a multiple of block_rows
};

// How a problem runs: in one kernel, or by the split path.
struct Plan {
  bool fused;
  SplitPlan split;
};

// How the filter's gradient is computed.
struct GradientPlan {
  int64_t chunk;  // tiles whose transformed data lie in the workspace at once, a multiple of kSlice * splits
  int splits;     // of a chunk's tiles; the inverse transform adds the parts in order

  constexpr int channels(const Problem& p) const { return static_cast<int>(round_up(p.channels, kOutputGrain)); }
};

// What a block of the fused kernel takes, of F(m x m, 3x3).
constexpr int fused_shared_bytes(int m) { return m == 2 ? 147456 : 165888; }

// Element (k, c, r, s) of the filter lies at weight[k * k_stride + c * c_stride + r * r_stride + s * s_stride].
struct FilterView {
  const void* weight;
  int outputs, channels;
  int64_t k_stride, c_stride, r_stride, s_stride;
};

struct Tensors {
  const void* x;       // [batch, height, width, channels]
  const void* filter;  // transformed: [points, output_pitch, channel_pitch], in the problem's dtype
  const float* bias;   // [outputs] or null
  void* y;             // [batch, out_height, out_width, outputs]
};

// Each returns cudaError_t as int. `m`: 2 or 4, of F(m x m, 3x3).
int transform_filter(int m, DType dtype, const FilterView& view, void* filter, cudaStream_t stream);
// In float16 and bfloat16 m is 2.
int run_split(int m, const Problem& problem, const SplitPlan& plan, const Tensors& tensors, void* workspace, cudaStream_t stream);
int run_fused(int m, const Problem& problem, const Tensors& tensors, cudaStream_t stream);
// In float16 and bfloat16, F(2x2, 3x3) on Hopper; fused_sm90.h tells which problems.
int run_fused_sm90(const Problem& problem, const Tensors& tensors, int multiprocessors, cudaStream_t stream);
bool has_fused_sm90();  // whether the library was built with it
// By F(3x3, 2x2): x and grad NHWC, result contiguous [outputs, channels, 3, 3]; `problem` is the forward one.
int run_weight_gradient(const Problem& problem, const GradientPlan& plan, const void* x, const void* grad, void* result, void* workspace,
                        cudaStream_t stream);

}  // namespace convfirst::winograd
