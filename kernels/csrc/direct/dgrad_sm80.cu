// Filters of the portable path's input gradient.
#include "implicit_gemm_sm80.h"
#include "transpose_filters.cuh"

namespace convfirst::direct::sm80 {

int transpose_all_filters(const Problem& q, const void* w, void* result, cudaStream_t stream) {
  const TransposedTaps taps{q.filters, q.channels, q.kernel_h, q.kernel_w, q.kernel_h, q.kernel_w, 0, 0, 1, 1, false};
  return launch_transpose_filters<80>(w, result, taps, q.dtype == DType::kFloat ? 4 : 2, stream);
}

}  // namespace convfirst::direct::sm80
