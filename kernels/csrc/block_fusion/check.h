// What the operator refuses. The one place where its arguments are checked.
#pragma once

#include <string>

#include "block_fusion/params.h"
#include "common/checks.h"

namespace convfirst::block_fusion {

// The operator's arguments as it receives them; layouts in params.h.
struct Arguments {
  Tensor x;
  Tensor conv_weight;
  MaybeTensor conv_bias;
  MaybeTensor norm_weight;
  MaybeTensor norm_bias;
  Tensor expand_weight;
  MaybeTensor expand_bias;
  Tensor project_weight;
  MaybeTensor project_bias;
  MaybeTensor layer_scale;
  MaybeTensor sample_scale;
  int64_t group_width;
  std::string activation;
  double eps;
  bool has_norm;
};

// Throws std::runtime_error naming the argument, its value and what is supported. Reads shapes, strides, dtypes, devices and
// addresses only, so it takes tensors of any device.
Problem check(const Arguments& arguments);

// Throws where the tensors are not on a CUDA device.
void check_device(const Arguments& arguments);

// Throws where `y` can't receive the result: shape, layout, dtype, device, or storage shared with an input.
void check_output(const Arguments& arguments, const Tensor& y);

Activation parse_activation(const std::string& name);

}  // namespace convfirst::block_fusion
