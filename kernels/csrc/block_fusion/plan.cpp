#include "block_fusion/plan.h"

#include <dlfcn.h>

#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace convfirst::block_fusion {
namespace {

const char* name_of(DType dtype) { return dtype == DType::kHalf ? "float16" : "bfloat16"; }

const char* name_of(Activation activation) {
  switch (activation) {
    case Activation::kRelu: return "relu";
    case Activation::kSilu: return "silu";
    default: return "gelu";
  }
}

bool on_path(const Variant& variant, const std::string& path) {
  if (path.empty() || path == variant.name) return true;
  return std::strncmp(variant.name, path.c_str(), path.size()) == 0 && variant.name[path.size()] == '_' &&
         path.find('_') == std::string::npos;
}

std::string refusal_of(const Variant& variant, const Problem& problem, const Device& device, const std::string& path) {
  std::ostringstream why;
  if (!on_path(variant, path)) {
    why << "not on the requested path " << path;
  } else if (device.capability < variant.min_capability || device.capability > variant.max_capability) {
    why << "needs compute capability " << variant.min_capability;
    if (variant.max_capability >= 999) why << " or newer";
    else if (variant.max_capability != variant.min_capability) why << " to " << variant.max_capability;
    why << ", the device has " << device.capability;
  } else if (!variant.supports(problem, device)) {
    why << "does not cover this width, filter, group width, expansion or norm";
  }
  return why.str();
}

Candidate examine(const Variant& variant, const Problem& problem, const Device& device, const std::string& path) {
  Candidate candidate{&variant, refusal_of(variant, problem, device, path), Config{}, 0.0};
  if (!candidate.refusal.empty()) return candidate;
  candidate.config = variant.configure(problem, device);
  if (candidate.config.shared_memory > device.max_shared_memory) {
    std::ostringstream why;
    why << "needs " << candidate.config.shared_memory << " bytes of shared memory, the device offers "
        << device.max_shared_memory;
    candidate.refusal = why.str();
    return candidate;
  }
  candidate.cost = variant.cost(problem, device, candidate.config);
  return candidate;
}

const Candidate* cheapest(const std::vector<Candidate>& rows) {
  const Candidate* best = nullptr;
  for (const Candidate& row : rows) {
    if (row.refusal.empty() && (best == nullptr || row.cost < best->cost)) best = &row;
  }
  return best;
}

// The mangled name of a kernel's entry point, as ptxas prints it.
std::string symbol(const void* kernel) {
  Dl_info info;
  if (kernel == nullptr || dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "";
  return info.dli_saddr == kernel ? info.dli_sname : "";
}

void write(std::ostringstream& out, const Config& c) {
  out << "{\"tile_height\": " << c.tile_height << ", \"tile_width\": " << c.tile_width << ", \"tile_pixels\": " << c.tile_pixels
      << ", \"hidden_chunk\": " << c.hidden_chunk << ", \"stages\": " << c.stages << ", \"threads\": " << c.threads
      << ", \"grid\": " << c.grid << ", \"shared_memory\": " << c.shared_memory << ", \"launches\": " << c.launches
      << ", \"workspace\": " << c.workspace << "}";
}

void write(std::ostringstream& out, const Candidate& row, const Problem& problem) {
  out << "{\"name\": \"" << row.variant->name << "\", \"refusal\": \"" << row.refusal << "\"";
  if (row.refusal.empty()) {
    out << ", \"cost_us\": " << row.cost << ", \"config\": ";
    write(out, row.config);
    out << ", \"kernel\": \"" << symbol(row.variant->kernel ? row.variant->kernel(problem) : nullptr) << "\"";
  }
  out << "}";
}

using Key = std::tuple<int64_t, int64_t, int64_t, int, int, int, int, int, int, bool, int, int, int, std::string>;

Key key_of(const Problem& p, const Device& d, const std::string& path) {
  return {p.batch, p.height, p.width, p.channels, p.hidden, p.kernel_size, p.group_width, static_cast<int>(p.dtype),
          static_cast<int>(p.activation), p.has_norm, d.capability, d.multiprocessors, d.max_shared_memory, path};
}

}  // namespace

std::vector<const Variant*> all_variants() {
  std::vector<const Variant*> rows;
  for (auto path : {sm90_variants, sm80_variants}) {
    int count = 0;
    const Variant* table = path(&count);
    for (int i = 0; i < count; ++i) rows.push_back(table + i);
  }
  return rows;
}

void check_path(const std::string& path) {
  if (path.empty() || path == "sm80" || path == "sm90") return;
  std::ostringstream known;
  for (const Variant* variant : all_variants()) {
    if (path == variant->name) return;
    known << ", " << variant->name;
  }
  throw std::runtime_error("CONVFIRST_KERNELS_PATH='" + path + "' names no path; known: sm80, sm90" + known.str());
}

std::vector<Candidate> candidates(const Problem& problem, const Device& device, const std::string& path) {
  check_path(path);
  std::vector<Candidate> rows;
  for (const Variant* variant : all_variants()) rows.push_back(examine(*variant, problem, device, path));
  return rows;
}

Choice choose(const Problem& problem, const Device& device, const std::string& path) {
  static std::mutex mutex;
  static std::map<Key, Choice> known;
  const Key key = key_of(problem, device, path);
  std::lock_guard<std::mutex> lock(mutex);
  if (auto found = known.find(key); found != known.end()) return found->second;
  const std::vector<Candidate> rows = candidates(problem, device, path);
  const Candidate* best = cheapest(rows);
  return known[key] = best ? Choice{best->variant, best->config} : Choice{nullptr, Config{}};
}

std::string explain_json(const Problem& problem, const Device& device, const std::string& path) {
  const std::vector<Candidate> rows = candidates(problem, device, path);
  const Candidate* best = cheapest(rows);
  std::ostringstream out;
  out << "{\"problem\": \"" << describe(problem) << "\", \"path\": \"" << path << "\", \"device\": {\"capability\": "
      << device.capability << ", \"multiprocessors\": " << device.multiprocessors << ", \"max_shared_memory\": "
      << device.max_shared_memory << "}, \"chosen\": ";
  if (best) out << "\"" << best->variant->name << "\"";
  else out << "null";
  out << ", \"candidates\": [";
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i) out << ", ";
    write(out, rows[i], problem);
  }
  out << "]}";
  return out.str();
}

std::string describe(const Problem& p) {
  std::ostringstream out;
  out << "C=" << p.channels << " hidden=" << p.hidden << " k=" << p.kernel_size << " group_width=" << p.group_width << " "
      << name_of(p.dtype) << " " << name_of(p.activation) << (p.has_norm ? " with norm" : " without norm") << ", " << p.batch
      << " x " << p.height << " x " << p.width;
  return out.str();
}

}  // namespace convfirst::block_fusion
