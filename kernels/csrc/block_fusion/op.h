// The operator's C++ side: arguments -> check -> plan -> launch.
#pragma once

#include <string>

#include "block_fusion/check.h"

namespace convfirst::block_fusion {

// y of x's shape, channels_last, on x's device and its current stream.
Tensor conv_first_block(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                        const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Tensor& expand_weight,
                        const MaybeTensor& expand_bias, const Tensor& project_weight, const MaybeTensor& project_bias,
                        const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t group_width,
                        const std::string& activation, double eps, bool has_norm);

// The same into `out`.
void conv_first_block_out(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                          const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Tensor& expand_weight,
                          const MaybeTensor& expand_bias, const Tensor& project_weight, const MaybeTensor& project_bias,
                          const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t group_width,
                          const std::string& activation, double eps, bool has_norm, Tensor out);

// The operator's checks alone, on tensors of any device; `out` optional. Returns describe() of the problem.
std::string conv_first_block_check(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                                   const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                                   const Tensor& expand_weight, const MaybeTensor& expand_bias,
                                   const Tensor& project_weight, const MaybeTensor& project_bias,
                                   const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t group_width,
                                   const std::string& activation, double eps, bool has_norm, const MaybeTensor& out);

// explain_json of a problem on a device given by numbers; dtype is "float16" or "bfloat16".
std::string plan_conv_first_block(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden,
                                  int64_t kernel_size, int64_t group_width, const std::string& dtype,
                                  const std::string& activation, bool has_norm, int64_t capability,
                                  int64_t multiprocessors, int64_t max_shared_memory, const std::string& path);

}  // namespace convfirst::block_fusion
