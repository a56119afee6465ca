// The conv-first block's side of the planner (common/planner.h): its variants and its problem in words and numbers.
#pragma once

#include <string>

#include "block_fusion/params.h"
#include "common/planner.h"

namespace convfirst::block_fusion {

// All rows of all paths.
const Table<Variant>& all_variants();

// Throws std::runtime_error where `path` is neither empty nor names a path or a variant.
void check_path(const std::string& path);

// One line for messages: "C=64 hidden=256 k=3 group_width=8 float16 silu with norm, 128 x 56 x 56".
std::string describe(const Problem& problem);

Fields fields(const Problem& problem);

}  // namespace convfirst::block_fusion
