#include "../launch_float_gemm_sm90.cuh"

namespace convfirst::direct::sm90 {

template struct FloatKernel<0>;
template struct FloatKernel<1>;
template struct FloatKernel<2>;

}  // namespace convfirst::direct::sm90
