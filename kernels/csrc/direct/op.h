// Direct convolution's operators, C++ side: arguments -> check -> plan -> launch. Layouts in params.h.
#pragma once

#include <string>

#include "common/checks.h"

namespace convfirst::direct {

// y = act(conv2d(x, weight) + bias): channels_last, on x's device and its current stream.
Tensor direct_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                     int64_t pad_w, int64_t dilation_h, int64_t dilation_w, const std::string& activation);

// The operator's checks alone, on tensors of any device. Returns describe() of the problem.
std::string direct_conv2d_check(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t stride_h, int64_t stride_w,
                                int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, const std::string& activation);

// Of conv2d(x, weight) without bias and activation: the gradient of x [*, *, height, width] from that of the output.
Tensor direct_conv2d_dgrad(const Tensor& grad, const Tensor& weight, int64_t height, int64_t width, int64_t stride_h, int64_t stride_w,
                           int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w);

// Likewise the gradient of weight [*, *, kernel_h, kernel_w].
Tensor direct_conv2d_wgrad(const Tensor& grad, const Tensor& x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                           int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w);

// Throws std::runtime_error where `path` is neither empty nor names a path or a variant of this or another operator.
void check_path(const std::string& path);

// explain_json of a problem on a device given by numbers; direction is "forward", "dgrad" or "wgrad".
std::string plan_direct_conv2d(const std::string& direction, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t filters,
                               int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                               int64_t dilation_h, int64_t dilation_w, const std::string& dtype, const std::string& activation,
                               int64_t capability, int64_t multiprocessors, int64_t max_shared_memory, const std::string& path);

}  // namespace convfirst::direct
