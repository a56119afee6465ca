#include "../split_kernels_sm90.cuh"

namespace convfirst::direct::sm90 {

template struct SplitKernels<DType::kHalf>;

}  // namespace convfirst::direct::sm90
