// The same kernels for compute capability 9.0: the stem by wgmma, and a launch may begin before the one ahead of it has ended.
#define CONVFIRST_PATCH_SM90
#include "launch.cuh"

namespace convfirst::patch {

const Path* sm90_path() {
  static const Path path = make_path<true>("sm90", 90, 90, true);
  return &path;
}

}  // namespace convfirst::patch
