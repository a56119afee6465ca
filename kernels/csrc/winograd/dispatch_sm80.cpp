// The split path and the transform of the filters, by dtype; each dtype is a translation unit.
#include "winograd/params.h"

namespace convfirst::winograd {

int split_float(int m, const Problem&, const SplitPlan&, const Tensors&, void* workspace, cudaStream_t);
int split_half(const Problem&, const SplitPlan&, const Tensors&, void* workspace, cudaStream_t);
int split_bfloat16(const Problem&, const SplitPlan&, const Tensors&, void* workspace, cudaStream_t);
int filter_float(int m, const FilterView&, void* filter, cudaStream_t);
int filter_half(const FilterView&, void* filter, cudaStream_t);
int filter_bfloat16(const FilterView&, void* filter, cudaStream_t);

int transform_filter(int m, DType dtype, const FilterView& view, void* filter, cudaStream_t stream) {
  if (dtype == DType::kFloat) return filter_float(m, view, filter, stream);
  return (dtype == DType::kHalf ? filter_half : filter_bfloat16)(view, filter, stream);
}

int run_split(int m, const Problem& problem, const SplitPlan& plan, const Tensors& tensors, void* workspace, cudaStream_t stream) {
  if (problem.dtype == DType::kFloat) return split_float(m, problem, plan, tensors, workspace, stream);
  return (problem.dtype == DType::kHalf ? split_half : split_bfloat16)(problem, plan, tensors, workspace, stream);
}

}  // namespace convfirst::winograd
