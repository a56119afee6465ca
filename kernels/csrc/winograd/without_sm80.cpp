// What a build without portable kernels answers: no kernel image for the device.
#include "winograd/params.h"

namespace convfirst::winograd {
namespace {

constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice

}  // namespace

int transform_filter(int, DType, const FilterView&, void*, cudaStream_t) { return kNoKernelImage; }
int run_split(int, const Problem&, const SplitPlan&, const Tensors&, void*, cudaStream_t) { return kNoKernelImage; }
int run_fused(int, const Problem&, const Tensors&, cudaStream_t) { return kNoKernelImage; }
int run_weight_gradient(const Problem&, const GradientPlan&, const void*, const void*, void*, void*, cudaStream_t) {
  return kNoKernelImage;
}

}  // namespace convfirst::winograd
