// What a direct convolution is asked to do (Problem), where its data lie (Tensors), and the table row that a kernel variant
// contributes to the planner (Variant). As block_fusion/params.h, with which it shares Config and Device.
#pragma once

#include "block_fusion/params.h"

namespace convfirst::direct {

using block_fusion::Config;
using block_fusion::Device;

enum class DType : int { kHalf = 0, kBFloat16 = 1, kFloat = 2 };
enum class Activation : int { kNone = 0, kRelu = 1, kSilu = 2, kGelu = 3 };

// forward: y = act(conv(x, weight) + bias)
// dgrad:   x = gradient of conv's input, from y = the gradient of its output
// wgrad:   weight = gradient of conv's weight, from x and y
enum class Direction : int { kForward = 0, kDgrad = 1, kWgrad = 2 };

struct Problem {
  Direction direction;
  int64_t batch;
  int height, width;  // of x
  int channels;       // of x
  int filters;        // channels of y
  int kernel_h, kernel_w;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  DType dtype;
  Activation activation;  // of the forward pass

  constexpr int out_h() const { return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  constexpr int out_w() const { return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
  constexpr int taps() const { return kernel_h * kernel_w; }
  constexpr int64_t out_pixels() const { return batch * out_h() * out_w(); }
  constexpr double macs() const { return double(out_pixels()) * filters * taps() * channels; }
};

// Device pointers; dense, of the problem's dtype, 16-byte aligned. In the gradients one of the first three is the result.
struct Tensors {
  const void* x;       // [batch, height, width, channels]
  const void* weight;  // [filters, kernel_h, kernel_w, channels]
  const void* y;       // [batch, out_h, out_w, filters]
  const float* bias;   // [filters] or nullptr, of the forward pass
  void* result;        // y, x or weight, by the direction; overlaps nothing
};

// One compiled kernel variant; fields as of block_fusion::Variant.
struct Variant {
  const char* name;
  int min_capability;
  int max_capability;
  bool (*supports)(const Problem&, const Device&);
  Config (*configure)(const Problem&, const Device&);
  double (*cost)(const Problem&, const Device&, const Config&);
  int (*launch)(const Problem&, const Tensors&, const Config&, void* workspace, cudaStream_t);
  const void* (*kernel)(const Problem&);
  bool tested = true;
};

// Each path contributes its rows; `count` receives how many.
const Variant* sm80_variants(int* count);
const Variant* sm90_variants(int* count);

}  // namespace convfirst::direct
