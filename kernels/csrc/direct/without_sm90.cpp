// The empty table of a build without direct convolution kernels for the sm_90 path.
#include "direct/params.h"

namespace convfirst::direct {

const Variant* sm90_variants(int* count) {
  *count = 0;
  return nullptr;
}

}  // namespace convfirst::direct
