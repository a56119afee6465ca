// What a conv-first block launch is asked to do (Problem), where its data lie (Tensors), how it will be done (Config), and
// the table row that a kernel variant contributes to the planner (Variant). Host code only: no CUDA types beyond the stream.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace convfirst::block_fusion {

enum class DType : int { kHalf = 0, kBFloat16 = 1 };
enum class Activation : int { kRelu = 0, kSilu = 1, kGelu = 2 };

// y = x + sample_scale * layer_scale * (act(norm(conv(x)) W1^T + b1) W2^T + b2), x and y NHWC.
struct Problem {
  int64_t batch;
  int64_t height;
  int64_t width;
  int channels;
  int hidden;       // channels * expansion
  int kernel_size;  // 3, 5 or 7; padding = kernel_size / 2, stride 1
  int group_width;  // input channels of one convolution group; 1 is depthwise
  DType dtype;
  Activation activation;
  bool has_norm;  // LayerNorm over channels after the convolution
};

// Device pointers. 16-bit tensors have the problem's dtype and 16-byte alignment; vectors are float32. nullptr: absent.
struct Tensors {
  const void* x;               // [batch, height, width, channels]
  const void* conv_weight;     // [kernel_size * kernel_size, channels, group_width]: tap, output channel, input channel of the group
  const float* conv_bias;      // [channels] or nullptr
  const float* norm_weight;    // [channels] or nullptr when the norm has no affine part or there is no norm
  const float* norm_bias;      // [channels] or nullptr
  const void* expand_weight;   // [hidden, channels]
  const float* expand_bias;    // [hidden] or nullptr
  const void* project_weight;  // [channels, hidden]
  const float* project_bias;   // [channels] or nullptr
  const float* layer_scale;    // [channels] or nullptr
  const float* sample_scale;   // [batch] or nullptr
  void* y;                     // [batch, height, width, channels], never overlaps x
  float eps;                   // of the norm
};

struct Device {
  int capability;          // 80, 86, 89, 90 ...
  int multiprocessors;
  int max_shared_memory;   // bytes a block may opt in to
};

// One launch, fully decided; every field is printable.
struct Config {
  int tile_images;  // images one tile spans; 0 where the path does not say
  int tile_height;
  int tile_width;
  int tile_pixels;   // rows of the matrix product a block holds at once
  int hidden_chunk;  // hidden units a mainloop step computes
  int stages;
  int threads;
  int grid;
  int shared_memory;  // bytes
  int launches;       // 1: the whole block in one kernel
  int64_t workspace;  // bytes of device memory the launch needs beside its tensors
  int multiprocessors;  // of the device that the grid was made for; 0 where the path does not say
};

// One compiled kernel variant. The planner asks each row in turn and takes the supported one of least cost.
struct Variant {
  const char* name;  // e.g. "sm80_gw8_k3_c64"
  int min_capability;
  int max_capability;  // inclusive; 999 where every later device runs it too
  bool (*supports)(const Problem&, const Device&);
  Config (*configure)(const Problem&, const Device&);
  double (*cost)(const Problem&, const Device&, const Config&);  // estimated microseconds
  // Returns cudaError_t as int. workspace may be nullptr when Config::workspace is 0. Never synchronises.
  int (*launch)(const Problem&, const Tensors&, const Config&, void* workspace, cudaStream_t);
  const void* (*kernel)(const Problem&);  // for cudaFuncGetAttributes
  bool tested = true;                     // false: did not pass its GPU tests; runs only where its path or name is asked for
};

// Each path contributes its rows; `count` receives how many.
const Variant* sm80_variants(int* count);
const Variant* sm90_variants(int* count);

}  // namespace convfirst::block_fusion
