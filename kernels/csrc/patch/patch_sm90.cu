// The same kernels for compute capability 9.0, where a launch may begin before the one ahead of it has ended.
#define CONVFIRST_PATCH_SM90
#include "launch.cuh"

namespace convfirst::patch {

const Path* sm90_path() { return make_path<true>("sm90", 90, 90); }

}  // namespace convfirst::patch
