// Host face of the Hopper path: launches of compiled kernels by number. No CUDA types beyond the stream.
#pragma once

#include "first_layer_sm90.h"
#include "first_layer_wgrad_sm90.h"
#include "float_gemm_sm90.h"
#include "halo_gemm_sm90.h"
#include "implicit_gemm_sm90.h"
#include "split_gemm_sm90.h"
#include "wgrad_sm90.h"

namespace convfirst::direct::sm90 {

// Each returns cudaError_t as int and never synchronises.
int launch_gemm(const GemmProblem&, const GemmTensors&, const GemmPlan&, cudaStream_t);
int launch_split(const GemmProblem&, const GemmTensors&, const SplitPlan&, cudaStream_t);
int launch_halo(const GemmProblem&, const GemmTensors&, const HaloPlan&, cudaStream_t);
int launch_float(const GemmProblem&, const FloatTensors&, const FloatPlan&, cudaStream_t);
int launch_first(const Problem&, const Tensors&, const FirstPlan&, void* workspace, cudaStream_t);
int launch_dgrad(const Problem&, const Tensors&, const Device&, void* workspace, cudaStream_t);
int launch_float_dgrad(const Problem&, const Tensors&, const FloatPlan&, void* workspace, cudaStream_t);
int launch_wgrad(const Problem&, const Tensors&, const WgradPlan&, void* workspace, cudaStream_t);
int launch_first_wgrad(const Problem&, const Tensors&, const FirstWgradPlan&, void* workspace, cudaStream_t);

const void* gemm_kernel(DType dtype, int tile, bool transposed);
const void* split_kernel(DType dtype, int tile);
const void* halo_kernel(DType dtype, int columns);
const void* float_kernel(int tile);
const void* first_kernel(DType dtype, int columns);
const void* wgrad_kernel(DType dtype, int tile, int panel);
const void* first_wgrad_kernel(DType dtype);

// Of one dtype, defined in instantiations_sm90/.
template <DType kDType>
struct SplitKernels {
  static int split(const GemmProblem&, const GemmTensors&, const SplitPlan&, cudaStream_t);
  static int halo(const GemmProblem&, const GemmTensors&, const HaloPlan&, cudaStream_t);
  static const void* split_kernel(int tile);
  static const void* halo_kernel(int columns);
};

template <DType kDType>
struct Kernels {
  static int gemm(const GemmProblem&, const GemmTensors&, const GemmPlan&, cudaStream_t);
  static int first(const Problem&, const Tensors&, const FirstPlan&, void* workspace, cudaStream_t);
  static const void* gemm_kernel(int tile, bool transposed);
  static const void* first_kernel(int columns);
};

}  // namespace convfirst::direct::sm90
