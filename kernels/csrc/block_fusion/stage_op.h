// torch.ops.convfirst.conv_first_stage: several blocks of one width, one after another, in one launch.
#pragma once

#include <string>

#include "block_fusion/params.h"
#include "common/checks.h"

namespace convfirst::block_fusion {

struct StageArguments {
  Tensor x;
  Tensor conv_weight;
  Tensor conv_bias;
  Tensor expand_weight;
  Tensor expand_vectors;
  Tensor project_weight;
  Tensor project_vectors;
  MaybeTensor down_weight;
  MaybeTensor down_vectors;
  Tensor workspace;
  std::string activation;
  double eps;
  bool has_norm;
};

// Throws std::runtime_error, naming the argument, its value and what is supported. Returns how many blocks there are.
int64_t check_stage(const StageArguments& a);

}  // namespace convfirst::block_fusion
