// The input gradient on Hopper: launches the implicit matrix products of each phase of the stride, and before them, where the filters are
// not read transposed, what transposes those of the phase.
#include "dgrad_sm90.h"
#include "launch_sm90.h"
#include "transpose_filters.cuh"

namespace convfirst::direct::sm90 {

int launch_dgrad(const Problem& q, const Tensors& t, const Device& device, void* workspace, cudaStream_t stream) {
  bool empty = false;
  for_each_phase(q, [&](int, int, const Phase& h, const Phase& w) { empty = empty || h.taps == 0 || w.taps == 0; });
  int error = 0;
  if (empty) error = cudaMemsetAsync(t.result, 0, 2 * q.batch * q.height * q.width * q.channels, stream);
  char* transposed = static_cast<char*>(workspace);
  for_each_phase(q, [&](int a, int b, const Phase& h, const Phase& w) {
    if (error != 0 || h.taps == 0 || w.taps == 0) return;
    const void* filters = t.weight;
    if (!reads_transposed(q)) {
      const TransposedTaps taps{q.filters, q.channels, q.kernel_h, q.kernel_w, h.taps, w.taps, h.first, w.first, q.stride_h, q.stride_w, true};
      error = launch_transpose_filters<90>(t.weight, transposed, taps, 2, stream);
      if (error != 0) return;
      filters = transposed;
      transposed += int64_t{2} * q.filters * h.taps * w.taps * q.channels;
    }
    const DgradPlan plan = plan_dgrad(dgrad_problem(q, h, w), device);
    const GemmProblem& g = plan.first_problem;
    char* x = static_cast<char*>(t.result) + 2 * (static_cast<int64_t>(a) * q.width + b) * q.channels;
    error = launch_gemm(g, {t.y, filters, nullptr, x}, plan.first, stream);
    if (error != 0 || plan.rest_problem.batch == 0) return;
    const char* y = static_cast<const char*>(t.y) + 2 * g.batch * g.height * g.width * g.channels;
    error = launch_gemm(plan.rest_problem, {y, filters, nullptr, x + 2 * g.batch * g.y_stride_n}, plan.rest, stream);
  });
  return error;
}

// The transposed filters lie behind the plan's own workspace.
int launch_float_dgrad(const Problem& q, const Tensors& t, const FloatPlan& plan, void* workspace, cudaStream_t stream) {
  float* filters = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.workspace);
  const TransposedTaps taps{q.filters, q.channels, q.kernel_h, q.kernel_w, q.kernel_h, q.kernel_w, 0, 0, 1, 1, true};
  if (const int error = launch_transpose_filters<90>(t.weight, filters, taps, 4, stream)) return error;
  return launch_float(float_dgrad_problem(q), {static_cast<const float*>(t.y), filters, nullptr, static_cast<float*>(t.result), workspace}, plan, stream);
}

}  // namespace convfirst::direct::sm90
