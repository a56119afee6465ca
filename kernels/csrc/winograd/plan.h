// Chooses how a Winograd convolution runs. Pure functions of the problem and the device.
#pragma once

#include <string>

#include "winograd/params.h"

namespace convfirst::winograd {

Plan make_plan(const Problem& problem, int m, int multiprocessors, int max_shared_memory);

GradientPlan plan_weight_gradient(const Problem& problem, int multiprocessors);
int64_t workspace_bytes(const Problem& problem, const GradientPlan& plan);

// Bytes of the workspace beside the transformed filters.
int64_t workspace_bytes(const Problem& problem, int m, const Plan& plan);

// "fused" or "split <block_rows> <block_columns> <splits> <chunk>".
std::string describe(const Plan& plan);

// Reads what describe() writes; throws std::runtime_error.
Plan parse_plan(const std::string& text);

}  // namespace convfirst::winograd
