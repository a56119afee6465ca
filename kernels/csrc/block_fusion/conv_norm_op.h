// torch.ops.convfirst.conv_norm: convolution and LayerNorm of a block alone, as its backward wants them.
#pragma once

#include "block_fusion/params.h"
#include "common/checks.h"

namespace convfirst::block_fusion {

// Throws std::runtime_error, naming the argument, its value and what is supported. Of the problem, hidden and activation mean nothing.
Problem check_conv_norm(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias, const MaybeTensor& residual,
                        int64_t group_width, bool normalise, double eps);

}  // namespace convfirst::block_fusion
