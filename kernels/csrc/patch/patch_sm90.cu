// The same kernels for compute capability 9.0: the stem by wgmma, and a launch may begin before the one ahead of it has ended.
#define CONVFIRST_PATCH_SM90
#include "launch.cuh"

namespace convfirst::patch {

namespace sm90 {
int downsample_gemm(const DownsampleGemm&, const Device&, cudaStream_t);  // downsample_gemm_sm90.cpp
}

const Path* sm90_path() {
  static const Path path = [] {
    Path all = make_path<true>("sm90", 90, 90, true);
    all.downsample_gemm = &sm90::downsample_gemm;
    return all;
  }();
  return &path;
}

}  // namespace convfirst::patch
