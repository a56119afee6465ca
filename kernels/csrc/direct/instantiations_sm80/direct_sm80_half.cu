#include "../implicit_gemm_sm80.cuh"

namespace convfirst::direct::sm80 {

template struct Gemm<DType::kHalf, Copying::kVector>;
template struct Gemm<DType::kHalf, Copying::kVectorDivide>;
template struct Gemm<DType::kHalf, Copying::kScalar>;

}  // namespace convfirst::direct::sm80
