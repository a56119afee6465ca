#include "launch_downsample_gemm_sm90.cuh"

namespace convfirst::patch::sm90 {

int launch_downsample_gemm_bfloat16(const DownsampleGemm& d, const DownsampleGemmPlan& plan, cudaStream_t stream) {
  return launch_downsample_gemm_tile<direct::DType::kBFloat16>(d, plan, stream);
}

}  // namespace convfirst::patch::sm90
