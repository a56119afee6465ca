#include "../implicit_gemm_sm80.cuh"

namespace convfirst::direct::sm80 {

template struct Gemm<DType::kFloat, Copying::kVector>;
template struct Gemm<DType::kFloat, Copying::kVectorDivide>;
template struct Gemm<DType::kFloat, Copying::kScalar>;

}  // namespace convfirst::direct::sm80
