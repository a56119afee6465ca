// The empty table of a build without MBConv kernels for the sm_80 path.
#include "mbconv/params.h"

namespace convfirst::mbconv {

const Variant* sm80_variants(int* count) {
  *count = 0;
  return nullptr;
}

}  // namespace convfirst::mbconv
