// The MBConv operator's C++ side: arguments -> check -> plan -> launch.
#pragma once

#include <string>

#include "common/checks.h"

namespace convfirst::mbconv {

// y of x's shape, channels_last, on x's device and its current stream. Layouts in params.h.
Tensor mbconv_block(const Tensor& x, const Tensor& expand_weight, const MaybeTensor& expand_bias, const Tensor& conv_weight,
                    const MaybeTensor& conv_bias, const Tensor& project_weight, const MaybeTensor& project_bias,
                    const MaybeTensor& sample_scale, int64_t group_width, const std::string& activation);

// The operator's checks alone, on tensors of any device. Returns describe() of the problem.
std::string mbconv_block_check(const Tensor& x, const Tensor& expand_weight, const MaybeTensor& expand_bias,
                               const Tensor& conv_weight, const MaybeTensor& conv_bias, const Tensor& project_weight,
                               const MaybeTensor& project_bias, const MaybeTensor& sample_scale, int64_t group_width,
                               const std::string& activation);

// Throws std::runtime_error where `path` is neither empty nor names a path or a variant of this operator or the conv-first block.
void check_path(const std::string& path);

// explain_json of a problem on a device given by numbers; dtype is "float16" or "bfloat16".
std::string plan_mbconv_block(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden,
                              int64_t kernel_size, int64_t group_width, const std::string& dtype,
                              const std::string& activation, int64_t capability, int64_t multiprocessors,
                              int64_t max_shared_memory, const std::string& path);

}  // namespace convfirst::mbconv
