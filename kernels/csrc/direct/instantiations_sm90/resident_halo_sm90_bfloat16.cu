#include "../launch_resident_halo_sm90.cuh"

namespace convfirst::direct::sm90 {

template struct ResidentKernels<DType::kBFloat16>;

}  // namespace convfirst::direct::sm90
