#include "../kernels_sm90.cuh"

namespace convfirst::direct::sm90 {

template struct Kernels<DType::kBFloat16>;

}  // namespace convfirst::direct::sm90
