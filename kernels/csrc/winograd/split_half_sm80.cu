#include "winograd/split_sm80.cuh"

namespace convfirst::winograd {

int split_half(const Problem& problem, const SplitPlan& plan, const Tensors& tensors, void* workspace, cudaStream_t stream) {
  return sm80::split<2, __half>(problem, plan, tensors, workspace, stream);
}

int filter_half(const FilterView& view, void* filter, cudaStream_t stream) {
  return sm80::filter_transform<2, __half>(view, filter, stream);
}

}  // namespace convfirst::winograd
