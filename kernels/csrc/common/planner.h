// Shape -> candidates -> Config, for any operator whose kernels lie in a table of variants. Pure host code.
//
// A variant has the fields of block_fusion::Variant; beside it stand `std::string describe(const Problem&)` and
// `Fields fields(const Problem&)`, found by argument-dependent lookup.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "block_fusion/params.h"

namespace convfirst {

using block_fusion::Config;
using block_fusion::Device;
using Fields = std::vector<int64_t>;  // a problem as numbers, for remembering answers

template <class Variant>
using Table = std::vector<const Variant*>;

template <class Variant>
struct Candidate {
  const Variant* variant;
  std::string refusal;  // why it can't run; empty where it can
  Config config;        // meaningful where refusal is empty
  double cost;          // estimated microseconds, likewise
};

template <class Variant>
struct Choice {
  const Variant* variant;  // nullptr: nothing covers the problem
  Config config;
};

// The rows that paths contribute, in order.
template <class Variant>
Table<Variant> join(std::initializer_list<const Variant* (*)(int*)> paths) {
  Table<Variant> rows;
  for (auto path : paths) {
    int count = 0;
    const Variant* first = path(&count);
    for (int i = 0; i < count; ++i) rows.push_back(first + i);
  }
  return rows;
}

template <class Variant>
bool names_variant(const Table<Variant>& table, const std::string& path) {
  for (const Variant* variant : table) {
    if (path == variant->name) return true;
  }
  return false;
}

// Throws std::runtime_error where `path` is neither empty nor names a path or a variant of the table.
template <class Variant>
void check_path(const Table<Variant>& table, const std::string& path) {
  if (path.empty() || path == "sm80" || path == "sm90" || names_variant(table, path)) return;
  std::string known = "sm80, sm90";
  for (const Variant* variant : table) known += std::string(", ") + variant->name;
  throw std::runtime_error("CONVFIRST_KERNELS_PATH='" + path + "' names no path; known: " + known);
}

// Is the variant on the path: "" (all), "sm80" (its name begins so), or its own name?
inline bool on_path(const char* variant, const std::string& path) {
  if (path.empty() || path == variant) return true;
  return path.find('_') == std::string::npos && std::strncmp(variant, path.c_str(), path.size()) == 0 &&
         variant[path.size()] == '_';
}

// The mangled name of a kernel's entry point, as ptxas prints it; empty where it is no visible symbol.
std::string symbol(const void* kernel);

std::string config_json(const Config& config);

template <class Variant, class Problem>
std::string refusal_of(const Variant& variant, const Problem& problem, const Device& device, const std::string& path) {
  std::ostringstream why;
  if (!on_path(variant.name, path)) {
    why << "not on the requested path " << path;
  } else if (device.capability < variant.min_capability || device.capability > variant.max_capability) {
    why << "needs compute capability " << variant.min_capability;
    if (variant.max_capability >= 999) {
      why << " or newer";
    } else if (variant.max_capability != variant.min_capability) {
      why << " to " << variant.max_capability;
    }
    why << ", the device has " << device.capability;
  } else if (!variant.tested && path.empty()) {
    why << "has not passed its GPU tests; it runs where its path is asked for";
  } else if (!variant.supports(problem, device)) {
    why << "does not cover this width, filter, group width, expansion or norm";
  }
  return why.str();
}

template <class Variant, class Problem>
Candidate<Variant> examine(const Variant& variant, const Problem& problem, const Device& device, const std::string& path) {
  Candidate<Variant> candidate{&variant, refusal_of(variant, problem, device, path), Config{}, 0.0};
  if (!candidate.refusal.empty()) return candidate;
  candidate.config = variant.configure(problem, device);
  if (candidate.config.shared_memory > device.max_shared_memory) {
    candidate.refusal = "needs " + std::to_string(candidate.config.shared_memory) +
                        " bytes of shared memory, the device offers " + std::to_string(device.max_shared_memory);
    return candidate;
  }
  candidate.cost = variant.cost(problem, device, candidate.config);
  return candidate;
}

// Every row with its configuration or its refusal, in table order.
template <class Variant, class Problem>
std::vector<Candidate<Variant>> candidates(const Table<Variant>& table, const Problem& problem, const Device& device,
                                           const std::string& path) {
  std::vector<Candidate<Variant>> rows;
  for (const Variant* variant : table) rows.push_back(examine(*variant, problem, device, path));
  return rows;
}

template <class Variant>
const Candidate<Variant>* cheapest(const std::vector<Candidate<Variant>>& rows) {
  const Candidate<Variant>* best = nullptr;
  for (const auto& row : rows) {
    if (row.refusal.empty() && (best == nullptr || row.cost < best->cost)) best = &row;
  }
  return best;
}

// The candidate of least cost. Remembers its answers; safe from several threads.
template <class Variant, class Problem>
Choice<Variant> choose(const Table<Variant>& table, const Problem& problem, const Device& device, const std::string& path) {
  using Key = std::tuple<Fields, int, int, int, std::string>;
  static std::mutex mutex;
  static std::map<Key, Choice<Variant>> known;
  const Key key{fields(problem), device.capability, device.multiprocessors, device.max_shared_memory, path};
  std::lock_guard<std::mutex> lock(mutex);
  if (auto found = known.find(key); found != known.end()) return found->second;
  const auto rows = candidates(table, problem, device, path);
  const auto* best = cheapest(rows);
  return known[key] = best ? Choice<Variant>{best->variant, best->config} : Choice<Variant>{nullptr, Config{}};
}

// {"problem", "device", "path", "chosen", "candidates": [{"name", "refusal", "cost_us", "config", "kernel"}]}
template <class Variant, class Problem>
std::string explain_json(const Table<Variant>& table, const Problem& problem, const Device& device, const std::string& path) {
  const auto rows = candidates(table, problem, device, path);
  const auto* best = cheapest(rows);
  std::ostringstream out;
  out << "{\"problem\": \"" << describe(problem) << "\", \"path\": \"" << path << "\", \"device\": {\"capability\": "
      << device.capability << ", \"multiprocessors\": " << device.multiprocessors << ", \"max_shared_memory\": "
      << device.max_shared_memory << "}, \"chosen\": ";
  out << (best ? "\"" + std::string(best->variant->name) + "\"" : "null") << ", \"candidates\": [";
  for (const auto& row : rows) {
    out << (&row == rows.data() ? "" : ", ") << "{\"name\": \"" << row.variant->name << "\", \"refusal\": \"" << row.refusal
        << "\"";
    if (row.refusal.empty()) {
      const void* kernel = row.variant->kernel ? row.variant->kernel(problem) : nullptr;
      out << ", \"cost_us\": " << row.cost << ", \"config\": " << config_json(row.config) << ", \"kernel\": \""
          << symbol(kernel) << "\"";
    }
    out << "}";
  }
  out << "]}";
  return out.str();
}

}  // namespace convfirst
