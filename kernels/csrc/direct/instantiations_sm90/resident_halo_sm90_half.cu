#include "../launch_resident_halo_sm90.cuh"

namespace convfirst::direct::sm90 {

template struct ResidentKernels<DType::kHalf>;

}  // namespace convfirst::direct::sm90
