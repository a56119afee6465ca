// Hopper's fused kernel by dtype; each dtype is a translation unit.
#include "winograd/fused_sm90.h"

namespace convfirst::winograd {

bool has_fused_sm90() { return true; }

int run_fused_sm90(const Problem& problem, const Tensors& tensors, int multiprocessors, cudaStream_t stream) {
  const sm90::FusedPlan plan = sm90::plan_fused(problem, multiprocessors);
  return (problem.dtype == DType::kHalf ? sm90::launch_fused_half : sm90::launch_fused_bfloat16)(problem, tensors, plan, stream);
}

}  // namespace convfirst::winograd
