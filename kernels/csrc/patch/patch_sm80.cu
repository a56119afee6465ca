// The kernels between residual blocks, portable.
#include "launch.cuh"

namespace convfirst::patch {

const Path* sm80_path() { return make_path<false>("sm80", 80, 0); }

}  // namespace convfirst::patch
