// The weights that the block's backward multiplies by, and what becomes of their gradients; both small beside the rest.
//   s = n W'^T + b' with the norm's affine part in it: W' = W diag(g), b' = b + W beta;
//   so dg = column sums of dW' * W, dbeta = W^T db', dW = dW' diag(g) + db' beta^T.
#pragma once

#include <cstdint>

#include "params.h"

namespace convfirst::block_fusion {

struct AffineTensors {
  const void* matrix;    // W, [hidden, channels], 16 bit
  const float* bias;     // b, [hidden] or nullptr
  const float* scale;    // g, [channels] or nullptr
  const float* shift;    // beta, [channels] or nullptr
  int hidden, channels;  // multiples of 8
};

// W' rounded once, and b', which is not written where it is nullptr.
int absorb_affine(DType dtype, const AffineTensors& from, void* matrix, float* bias, cudaStream_t stream);

struct ReleasedTensors {
  const float* d_matrix;   // dW', [hidden, channels]
  const float* d_bias;     // db', [hidden]
  const float* others[2];  // further gradients in float32, only rounded: multiples of 8 values
  void* d_expand;          // dW, 16 bit, as the others
  void* rounded[2];
  int64_t counts[2];
  float* d_scale;  // dg, [channels]
  float* d_shift;  // dbeta, [channels]
};

// Bytes of the workspace that release_affine needs.
int64_t release_workspace(const AffineTensors& tensors);
int release_affine(DType dtype, const AffineTensors& of, const ReleasedTensors& to, void* workspace, cudaStream_t stream);

// The filter, [taps, channels, group_width], whose convolution is the transpose of `filter`'s: taps reversed, channels swapped.
int transpose_filter(const void* filter, void* result, int taps, int channels, int group_width, cudaStream_t stream);

}  // namespace convfirst::block_fusion
