#include "winograd/split_sm80.cuh"

namespace convfirst::winograd {

int transform_filter(int m, DType, const FilterView& view, void* filter, cudaStream_t stream) {
  const auto transform = m == 2 ? sm80::filter_transform<2, float> : sm80::filter_transform<4, float>;
  return transform(view, filter, stream);
}

int run_split(int m, const Problem& problem, const SplitPlan& plan, const Tensors& tensors, void* workspace, cudaStream_t stream) {
  return (m == 2 ? sm80::split<2> : sm80::split<4>)(problem, plan, tensors, workspace, stream);
}

}  // namespace convfirst::winograd
