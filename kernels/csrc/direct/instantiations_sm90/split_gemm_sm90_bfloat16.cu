#include "../split_kernels_sm90.cuh"

namespace convfirst::direct::sm90 {

template struct SplitKernels<DType::kBFloat16>;

}  // namespace convfirst::direct::sm90
