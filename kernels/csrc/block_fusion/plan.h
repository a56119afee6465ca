// Shape -> candidates -> Config: which variant computes a Problem on a Device. Pure host code, printable, no GPU needed.
#pragma once

#include <string>
#include <vector>

#include "block_fusion/params.h"

namespace convfirst::block_fusion {

struct Candidate {
  const Variant* variant;
  std::string refusal;  // why it can't run; empty where it can
  Config config;        // meaningful where refusal is empty
  double cost;          // estimated microseconds, likewise
};

struct Choice {
  const Variant* variant;  // nullptr: nothing covers the problem
  Config config;
};

// All rows of all paths, in table order.
std::vector<const Variant*> all_variants();

// Every row with its configuration or its refusal. `path` restricts the choice: "" (all), "sm80", "sm90" or a variant's name.
std::vector<Candidate> candidates(const Problem& problem, const Device& device, const std::string& path);

// The candidate of least cost. Remembers its answers; safe from several threads.
Choice choose(const Problem& problem, const Device& device, const std::string& path);

// Throws std::runtime_error where `path` is neither empty nor names a path or a variant.
void check_path(const std::string& path);

// {"problem", "device", "path", "chosen", "candidates": [{"name", "refusal", "cost_us", "config", "kernel"}]}
std::string explain_json(const Problem& problem, const Device& device, const std::string& path);

// One line for messages: "C=64 hidden=256 k=3 group_width=8 float16 silu with norm, 128 x 56 x 56".
std::string describe(const Problem& problem);

}  // namespace convfirst::block_fusion
