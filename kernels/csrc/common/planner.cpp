#include "common/planner.h"

#include <dlfcn.h>

namespace convfirst {

std::string symbol(const void* kernel) {
  Dl_info info;
  if (kernel == nullptr || dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "";
  return info.dli_saddr == kernel ? info.dli_sname : "";
}

std::string config_json(const Config& c) {
  std::ostringstream out;
  out << "{\"tile_height\": " << c.tile_height << ", \"tile_width\": " << c.tile_width << ", \"tile_pixels\": " << c.tile_pixels
      << ", \"hidden_chunk\": " << c.hidden_chunk << ", \"stages\": " << c.stages << ", \"threads\": " << c.threads
      << ", \"grid\": " << c.grid << ", \"shared_memory\": " << c.shared_memory << ", \"launches\": " << c.launches
      << ", \"workspace\": " << c.workspace << "}";
  return out.str();
}

}  // namespace convfirst
