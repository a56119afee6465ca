// The kernels between residual blocks, portable. The same code ran on a GPU compiled for 9.0 (but for its stem), not for 8.0.
#include "launch.cuh"

namespace convfirst::patch {

const Path* sm80_path() {
  static const Path path = make_path<false>("sm80", 80, 0, false);
  return &path;
}

}  // namespace convfirst::patch
