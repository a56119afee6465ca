#include "../implicit_gemm_sm80.cuh"

namespace convfirst::direct::sm80 {

template struct Gemm<DType::kBFloat16, Copying::kVector>;
template struct Gemm<DType::kBFloat16, Copying::kVectorDivide>;
template struct Gemm<DType::kBFloat16, Copying::kScalar>;

}  // namespace convfirst::direct::sm80
