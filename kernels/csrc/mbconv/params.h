// What an MBConv block launch is asked to do (Problem), where its data lie (Tensors), and the table row that a kernel
// variant contributes to the planner (Variant). As block_fusion/params.h, with which it shares Config and Device.
#pragma once

#include "block_fusion/params.h"

namespace convfirst::mbconv {

using block_fusion::Activation;
using block_fusion::Config;
using block_fusion::Device;
using block_fusion::DType;

// y = x + sample_scale * project(act(conv(act(expand(x))))), x and y NHWC; norms folded; stride 1.
struct Problem {
  int64_t batch;
  int64_t height;
  int64_t width;
  int channels;
  int hidden;       // channels of the convolution
  int kernel_size;  // 3; padding 1
  int group_width;  // input channels of one convolution group; 1 is depthwise
  DType dtype;
  Activation activation;
};

// Device pointers. 16-bit tensors have the problem's dtype and 16-byte alignment; vectors are float32. nullptr: absent.
struct Tensors {
  const void* x;               // [batch, height, width, channels]
  const void* expand_weight;   // [hidden, channels]
  const float* expand_bias;    // [hidden] or nullptr
  const void* conv_weight;     // [kernel_size * kernel_size, hidden, group_width]
  const float* conv_bias;      // [hidden] or nullptr
  const void* project_weight;  // [channels, hidden]
  const float* project_bias;   // [channels] or nullptr
  const float* sample_scale;   // [batch] or nullptr
  void* y;                     // [batch, height, width, channels], never overlaps x
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

}  // namespace convfirst::mbconv
