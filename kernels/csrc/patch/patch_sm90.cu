// The same kernels for compute capability 9.0: the stem by wgmma, and a launch may begin before the one ahead of it has ended.
#include "launch.cuh"

namespace convfirst::patch {

const Path* sm90_path() { return make_path<true>("sm90", 90, 90, true); }

}  // namespace convfirst::patch
