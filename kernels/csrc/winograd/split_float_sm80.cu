#include "winograd/split_sm80.cuh"

namespace convfirst::winograd {

int split_float(int m, const Problem& problem, const SplitPlan& plan, const Tensors& tensors, void* workspace, cudaStream_t stream) {
  return (m == 2 ? sm80::split<2, float> : sm80::split<4, float>)(problem, plan, tensors, workspace, stream);
}

int filter_float(int m, const FilterView& view, void* filter, cudaStream_t stream) {
  return (m == 2 ? sm80::filter_transform<2, float> : sm80::filter_transform<4, float>)(view, filter, stream);
}

}  // namespace convfirst::winograd
