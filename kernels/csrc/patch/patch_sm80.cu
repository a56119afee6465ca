// The kernels between residual blocks, portable. The same code ran on a GPU compiled for 9.0 (but for its stem), not for 8.0.
#include "launch.cuh"

namespace convfirst::patch {

const Path* sm80_path() { return make_path<false>("sm80", 80, 0, false); }

}  // namespace convfirst::patch
