// The input gradient on Hopper: transposes the filters of each phase of the stride and launches its implicit matrix product.
#include "dgrad_sm90.h"
#include "launch_sm90.h"
#include "transpose_filters.cuh"

namespace convfirst::direct::sm90 {

int launch_dgrad(const Problem& q, const Tensors& t, const Device& device, void* workspace, cudaStream_t stream) {
  bool empty = false;
  for_each_phase(q, [&](int, int, const Phase& h, const Phase& w) { empty = empty || h.taps == 0 || w.taps == 0; });
  int error = 0;
  if (empty) error = cudaMemsetAsync(t.result, 0, 2 * q.batch * q.height * q.width * q.channels, stream);
  char* filters = static_cast<char*>(workspace);
  for_each_phase(q, [&](int a, int b, const Phase& h, const Phase& w) {
    if (error != 0 || h.taps == 0 || w.taps == 0) return;
    const TransposedTaps taps{q.filters, q.channels, q.kernel_h, q.kernel_w, h.taps, w.taps, h.first, w.first, q.stride_h, q.stride_w, true};
    error = launch_transpose_filters<90>(t.weight, filters, taps, 2, stream);
    if (error != 0) return;
    const GemmProblem g = dgrad_problem(q, a, b, h, w);
    char* first = static_cast<char*>(t.result) + 2 * (static_cast<int64_t>(a) * q.width + b) * q.channels;
    error = launch_gemm(g, {t.y, filters, nullptr, first}, plan_gemm(g, device), stream);
    filters += int64_t{2} * q.filters * h.taps * w.taps * q.channels;
  });
  return error;
}

}  // namespace convfirst::direct::sm90
