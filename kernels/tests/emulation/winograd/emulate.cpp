// Lets a test run Winograd's kernels on a CPU, through C.
#include "../engine.h"
#include "winograd/split_float_sm80.cu"
#include "winograd/split_half_sm80.cu"
#include "winograd/split_bfloat16_sm80.cu"
#include "winograd/dispatch_sm80.cpp"
#include "winograd/fused_float_sm80.cu"
#include "winograd/weight_gradient_float_sm80.cu"
#include "winograd/plan.cpp"

using namespace convfirst::winograd;

namespace {

void* aligned(std::vector<unsigned char>& memory) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256);
}

}  // namespace

extern "C" {

void emulate_order(bool copies_at_once, bool backwards) {
  emulation::copies_at_once = copies_at_once;
  emulation::backwards = backwards;
}

int emulate_filter(int m, int dtype, const FilterView* view, void* filter) {
  return transform_filter(m, static_cast<DType>(dtype), *view, filter, nullptr);
}

int emulate_conv(int m, const Problem* problem, const char* plan, const Tensors* tensors) {
  const Plan chosen = *plan == 0 ? make_plan(*problem, m, 132, 232448, false) : parse_plan(plan);
  if (chosen.fused) return run_fused(m, *problem, *tensors, nullptr);
  std::vector<unsigned char> workspace(workspace_bytes(*problem, m, chosen) + 256, 0xff);
  return run_split(m, *problem, chosen.split, *tensors, aligned(workspace), nullptr);
}

// chunk = 0: the planner's choice for a device of `multiprocessors`.
int emulate_weight_gradient(const Problem* problem, int64_t chunk, int splits, const float* x, const float* grad, float* result) {
  const GradientPlan plan = chunk == 0 ? plan_weight_gradient(*problem, splits) : GradientPlan{chunk, splits};
  std::vector<unsigned char> workspace(workspace_bytes(*problem, plan) + 256, 0xff);
  return run_weight_gradient(*problem, plan, x, grad, result, aligned(workspace), nullptr);
}

}  // extern "C"
