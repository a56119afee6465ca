// Chooses how a Winograd convolution runs. Pure functions of the problem and the device.
#pragma once

#include <string>

#include "winograd/params.h"

namespace convfirst::winograd {

// `hopper`: Hopper's fused kernel of 16 bits was asked for and can run on the device; it is taken where it covers the problem.
Plan make_plan(const Problem& problem, int m, int multiprocessors, int max_shared_memory, bool hopper);

GradientPlan plan_weight_gradient(const Problem& problem, int multiprocessors);
int64_t workspace_bytes(const Problem& problem, const GradientPlan& plan);

// Bytes of the workspace beside the transformed filters.
int64_t workspace_bytes(const Problem& problem, int m, const Plan& plan);

// "fused" or "split <block_rows> <block_columns> <splits> <chunk>".
std::string describe(const Plan& plan);

// Reads what describe() writes; throws std::runtime_error.
Plan parse_plan(const std::string& text);

}  // namespace convfirst::winograd
