#include "../kernels_sm90.cuh"

namespace convfirst::direct::sm90 {

template struct Kernels<DType::kHalf>;

}  // namespace convfirst::direct::sm90
