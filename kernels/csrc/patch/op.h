// The operators between residual blocks, C++ side: arguments -> check -> the path that the device runs -> launch. Layouts and
// formulas in params.h.
#pragma once

#include <string>

#include "common/checks.h"

namespace convfirst::patch {

Tensor stem(const Tensor& x, const Tensor& conv1_weight, const Tensor& norm1_weight, const Tensor& norm1_bias,
            const Tensor& conv2_weight, const Tensor& conv2_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
            const std::string& activation, double eps1, double eps2, bool has_norm);

Tensor patch_stem(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias,
                  double eps, bool has_norm);

Tensor downsample(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool has_norm);

// tile: of the kernel's table, from 1; 0 for the planner's choice.
Tensor downsample_gemm(const Tensor& x, const Tensor& weight, const Tensor& vectors, double eps, bool has_norm, int64_t tile);

Tensor head(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps);

Tensor normalised_patches(const Tensor& x, double eps, bool has_norm);

// The same operators' checks alone, on tensors of any device; they return a line that describes the problem.
std::string stem_check(const Tensor& x, const Tensor& conv1_weight, const Tensor& norm1_weight, const Tensor& norm1_bias,
                       const Tensor& conv2_weight, const Tensor& conv2_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
                       const std::string& activation, double eps1, double eps2, bool has_norm);

std::string patch_stem_check(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& norm_weight,
                             const Tensor& norm_bias, double eps, bool has_norm);

std::string downsample_check(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool has_norm);

std::string downsample_gemm_check(const Tensor& x, const Tensor& weight, const Tensor& vectors, double eps, bool has_norm, int64_t tile);

// How downsample_gemm multiplies `pixels` rows of its result, as JSON: tile, steps, grid, rounds, shared memory, estimated time; "" for
// widths that it does not take.
std::string plan_downsample_gemm(int64_t pixels, int64_t channels, int64_t columns, int64_t multiprocessors);

// Why no kernel of this build computes operator `op` ("stem", "patch_stem", "downsample", "downsample_gemm", "head", "normalised_patches") of
// such channels on a device of such a capability and shared memory; "" where one does.
std::string refusal(const std::string& op, int64_t channels, int64_t columns, int64_t capability, int64_t max_shared_memory);

}  // namespace convfirst::patch
