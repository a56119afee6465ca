// The Winograd operators' C++ side: arguments -> check -> plan -> launch. Python (convfirst_kernels/winograd) calls them for tensors
// on a CUDA device; checks of values that it has made already are not repeated.
#pragma once

#include <string>

#include "common/checks.h"

namespace convfirst::winograd {

// weight [outputs, channels, 3, 3] of any strides -> [points, outputs, channels], both padded with zeros. `rotated`: the filters
// of the gradient of the input, channels and outputs exchanged and taps turned round.
Tensor winograd_filter(const Tensor& weight, const std::string& algorithm, bool rotated);

// act(conv2d(x, filter) + bias), channels_last. `plan`: as plan_winograd writes it, or "" for its choice.
Tensor winograd_conv2d_filtered(const Tensor& x, const Tensor& filter, const MaybeTensor& bias, int64_t outputs, int64_t padding,
                                const std::string& algorithm, const std::string& activation, const std::string& plan);

// The gradient of weight [outputs, channels, 3, 3] by F(3x3, 2x2), contiguous; x and grad channels_last.
Tensor winograd_weight_gradient(const Tensor& x, const Tensor& grad, int64_t padding);

// How a problem would run on a device: "fused" or "split <block_rows> <block_columns> <splits> <chunk>". Under force_path("sm90") a device
// with as much shared memory as Hopper's is one.
std::string plan_winograd(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t padding,
                          const std::string& dtype, const std::string& algorithm, int64_t multiprocessors, int64_t max_shared_memory);

}  // namespace convfirst::winograd
