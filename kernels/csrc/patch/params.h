// What lies between a network's residual blocks: stems and downsampling. What a launch is asked to do, where its data lie, and
// the table of functions that a path contributes. No CUDA types but the stream.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace convfirst::patch {

enum class DType { kHalf = 0, kBFloat16 = 1 };
enum class Activation { kRelu = 0, kSilu = 1, kGelu = 2 };

struct Device {
  int multiprocessors;
  int max_shared_memory;  // bytes a block may opt in to
};

// An image batch of three channels, any strides (in elements).
struct Image {
  const void* data;
  int batch, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// y = rms(conv2(act(rms(conv1(x)) w1 + b1))) w2 + b2, both 3x3, stride 2, padding 1; y NHWC. rms(v) divides by
// sqrt(mean of v^2 over channels + eps), or by 1 where `has_norm` is false; it is LayerNorm where the convolution's
// weights sum to zero over the output channels, as packing makes them. 16-bit tensors have one dtype; vectors are float32.
struct Stem {
  Image x;
  int dim;  // channels of y; conv1 has half
  DType dtype;
  Activation activation;
  bool has_norm;
  float eps1, eps2;
  const void* conv1_weight;    // [dim / 2, 32]: for each filter row a zero and its 9 values (column, channel), then the bias in two parts
  const float* norm1_weight;   // [dim / 2]
  const float* norm1_bias;     // [dim / 2]
  const void* conv2_weight;    // [dim, 9, dim / 2]
  const float* conv2_bias;     // [dim]
  const float* norm2_weight;   // [dim]
  const float* norm2_bias;     // [dim]
  void* y;                     // [batch, height / 4, width / 4, dim], each size rounded up twice
};

// y = rms(conv(x)) w + b, 4x4 with stride 4, y NHWC; rms as above.
struct PatchStem {
  Image x;
  int dim;
  DType dtype;
  bool has_norm;
  float eps;
  const void* weight;        // [dim, 4 rows, 4 columns, 3 channels]
  const float* bias;         // [dim]
  const float* norm_weight;  // [dim]
  const float* norm_bias;    // [dim]
  void* y;                   // [batch, height / 4, width / 4, dim], rounded down
};

// y = conv(norm(x)), 2x2 with stride 2; norm is LayerNorm over channels without its affine part, or nothing.
struct Downsample {
  const void* x;  // [batch, height, width, channels]
  int batch, height, width, channels, columns;
  DType dtype;
  bool has_norm;
  float eps;
  const void* weight;  // [columns, 2, 2, channels]
  const float* bias;   // [columns]
  void* y;             // [batch, height / 2, width / 2, columns], rounded down
};

// The same of widths whose matrix no block can keep: the norm is taken out of the product, so vectors has the taps' sums.
struct DownsampleGemm {
  const void* x;  // [batch, height, width, channels]
  int batch, height, width, channels, columns;
  DType dtype;
  bool has_norm;
  float eps;
  const void* weight;    // [columns, 2, 2, channels]
  const float* vectors;  // [5, columns]: bias, sums over channels of the taps' weights as they are in `weight`
  void* y;               // [batch, height / 2, width / 2, columns], rounded down
  int tile;              // of downsample_gemm_sm90.h's table, from 1; 0: the planner's choice
};

// patches = norm(x) in 2x2 pieces, the left operand of that convolution as a matrix product.
struct Gather {
  const void* x;
  int batch, height, width, channels;
  DType dtype;
  bool has_norm;
  float eps;
  void* patches;  // [batch, height / 2, width / 2, 2, 2, channels]
};

// y = W norm(mean of x over pixels) + bias; norm is LayerNorm over channels without its affine part.
struct Head {
  const void* x;  // [batch, pixels, channels]
  int batch, pixels, channels, classes;
  DType dtype;
  float eps;
  const void* weight;  // [classes, channels]
  const float* bias;   // [classes]
  void* y;             // [batch, classes]
};

// The functions return a cudaError_t, or kNotCovered.
constexpr int kNotCovered = -1;

struct Path {
  const char* name;
  int min_capability;
  int max_capability;  // 0: no upper bound
  bool tested;         // on a GPU; where not, only force_path(name) asks for it
  int (*stem)(const Stem&, const Device&, cudaStream_t);
  int (*patch_stem)(const PatchStem&, const Device&, cudaStream_t);
  int (*downsample)(const Downsample&, const Device&, cudaStream_t);
  int (*gather)(const Gather&, const Device&, cudaStream_t);
  int (*head)(const Head&, const Device&, cudaStream_t);
  int (*downsample_gemm)(const DownsampleGemm&, const Device&, cudaStream_t) = nullptr;  // where the path has it
};

// nullptr where the build has no kernels for the path.
const Path* sm80_path();
const Path* sm90_path();

}  // namespace convfirst::patch
