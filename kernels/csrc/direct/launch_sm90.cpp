// From a plan to a compiled kernel.
#include "launch_sm90.h"

#include <iterator>

#include "resident_halo_sm90.h"

namespace convfirst::direct::sm90 {

int launch_gemm(const GemmProblem& q, const GemmTensors& t, const GemmPlan& plan, cudaStream_t stream) {
  return q.dtype == DType::kHalf ? Kernels<DType::kHalf>::gemm(q, t, plan, stream) : Kernels<DType::kBFloat16>::gemm(q, t, plan, stream);
}

int launch_split(const GemmProblem& q, const GemmTensors& t, const SplitPlan& plan, cudaStream_t stream) {
  return q.dtype == DType::kHalf ? SplitKernels<DType::kHalf>::split(q, t, plan, stream) : SplitKernels<DType::kBFloat16>::split(q, t, plan, stream);
}

int launch_halo(const GemmProblem& q, const GemmTensors& t, const HaloPlan& plan, cudaStream_t stream) {
  return q.dtype == DType::kHalf ? SplitKernels<DType::kHalf>::halo(q, t, plan, stream) : SplitKernels<DType::kBFloat16>::halo(q, t, plan, stream);
}

int launch_resident(const GemmProblem& q, const GemmTensors& t, const ResidentPlan& plan, cudaStream_t stream) {
  return q.dtype == DType::kHalf ? ResidentKernels<DType::kHalf>::launch(q, t, plan, stream) : ResidentKernels<DType::kBFloat16>::launch(q, t, plan, stream);
}

int launch_float(const GemmProblem& q, const FloatTensors& t, const FloatPlan& plan, cudaStream_t stream) {
  constexpr decltype(&FloatKernel<0>::launch) kLaunches[] = {FloatKernel<0>::launch, FloatKernel<1>::launch, FloatKernel<2>::launch};
  static_assert(std::size(kLaunches) == kFloatTileCount);
  return kLaunches[plan.tile](q, t, plan, stream);
}

int launch_first(const Problem& q, const Tensors& t, const FirstPlan& plan, void* workspace, cudaStream_t stream) {
  return q.dtype == DType::kHalf ? Kernels<DType::kHalf>::first(q, t, plan, workspace, stream) : Kernels<DType::kBFloat16>::first(q, t, plan, workspace, stream);
}

const void* gemm_kernel(DType dtype, int tile, bool transposed) {
  return dtype == DType::kHalf ? Kernels<DType::kHalf>::gemm_kernel(tile, transposed) : Kernels<DType::kBFloat16>::gemm_kernel(tile, transposed);
}

const void* split_kernel(DType dtype, int tile) {
  return dtype == DType::kHalf ? SplitKernels<DType::kHalf>::split_kernel(tile) : SplitKernels<DType::kBFloat16>::split_kernel(tile);
}

const void* halo_kernel(DType dtype, int columns) {
  return dtype == DType::kHalf ? SplitKernels<DType::kHalf>::halo_kernel(columns) : SplitKernels<DType::kBFloat16>::halo_kernel(columns);
}

const void* resident_kernel(DType dtype) {
  return dtype == DType::kHalf ? ResidentKernels<DType::kHalf>::kernel() : ResidentKernels<DType::kBFloat16>::kernel();
}

const void* float_kernel(int tile) {
  constexpr decltype(&FloatKernel<0>::kernel) kKernels[] = {FloatKernel<0>::kernel, FloatKernel<1>::kernel, FloatKernel<2>::kernel};
  static_assert(std::size(kKernels) == kFloatTileCount);
  return kKernels[tile]();
}

const void* first_kernel(DType dtype, int columns) {
  return dtype == DType::kHalf ? Kernels<DType::kHalf>::first_kernel(columns) : Kernels<DType::kBFloat16>::first_kernel(columns);
}

}  // namespace convfirst::direct::sm90
