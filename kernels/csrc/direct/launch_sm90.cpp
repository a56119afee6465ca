// From a plan to a compiled kernel.
#include "launch_sm90.h"

namespace convfirst::direct::sm90 {

int launch_gemm(const GemmProblem& q, const GemmTensors& t, const GemmPlan& plan, cudaStream_t stream) {
  return q.dtype == DType::kHalf ? Kernels<DType::kHalf>::gemm(q, t, plan, stream) : Kernels<DType::kBFloat16>::gemm(q, t, plan, stream);
}

int launch_float(const GemmProblem& q, const FloatTensors& t, const FloatPlan& plan, cudaStream_t stream) {
  static_assert(kFloatTileCount == 3);
  return plan.tile == 0   ? FloatKernel<0>::launch(q, t, plan, stream)
         : plan.tile == 1 ? FloatKernel<1>::launch(q, t, plan, stream)
                          : FloatKernel<2>::launch(q, t, plan, stream);
}

int launch_first(const Problem& q, const Tensors& t, const FirstPlan& plan, void* workspace, cudaStream_t stream) {
  return q.dtype == DType::kHalf ? Kernels<DType::kHalf>::first(q, t, plan, workspace, stream) : Kernels<DType::kBFloat16>::first(q, t, plan, workspace, stream);
}

const void* gemm_kernel(DType dtype, int tile, bool transposed) {
  return dtype == DType::kHalf ? Kernels<DType::kHalf>::gemm_kernel(tile, transposed) : Kernels<DType::kBFloat16>::gemm_kernel(tile, transposed);
}

const void* float_kernel(int tile) {
  return tile == 0 ? FloatKernel<0>::kernel() : tile == 1 ? FloatKernel<1>::kernel() : FloatKernel<2>::kernel();
}

const void* first_kernel(DType dtype, int columns) {
  return dtype == DType::kHalf ? Kernels<DType::kHalf>::first_kernel(columns) : Kernels<DType::kBFloat16>::first_kernel(columns);
}

}  // namespace convfirst::direct::sm90
