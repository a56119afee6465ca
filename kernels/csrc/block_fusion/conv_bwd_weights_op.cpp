// torch.ops.convfirst.conv_weight_gradient: check -> plan -> launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "block_fusion/conv_bwd_weights.h"
#include "common/checks.h"
#include "common/runtime.h"

namespace convfirst::block_fusion {
namespace {

constexpr Checks kChecks{"conv_weight_gradient"};

WeightGradientProblem check(const Tensor& da, const Tensor& x, int64_t kernel_size, int64_t group_width) {
  kChecks.image("x", x);
  kChecks.shape("da", da, {x.size(0), x.size(1), x.size(2), x.size(3)}, "x's shape");
  if (da.scalar_type() != x.scalar_type()) {
    kChecks.refuse("da is ", show(da.scalar_type()), "; expected x's dtype ", show(x.scalar_type()));
  }
  kChecks.same_device("da", da, x);
  kChecks.image("da", da);
  if (kernel_size != 3 && kernel_size != 5 && kernel_size != 7) {
    kChecks.refuse("kernel_size is ", kernel_size, "; supported are 3, 5 and 7");
  }
  if (group_width != 1 && group_width != 8 && group_width != 16) {
    kChecks.refuse("group_width is ", group_width, "; supported are 1 (depthwise), 8 and 16");
  }
  if (x.size(1) % group_width != 0) kChecks.refuse("group_width ", group_width, " does not divide the ", x.size(1), " channels");
  return WeightGradientProblem{static_cast<int>(x.size(0)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                               static_cast<int>(x.size(1)), static_cast<int>(kernel_size), static_cast<int>(group_width),
                               x.scalar_type() == ScalarType::Half ? DType::kHalf : DType::kBFloat16};
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, type, std::nullopt, like.device());
}

std::tuple<Tensor, Tensor> conv_weight_gradient(const Tensor& da, const Tensor& x, int64_t kernel_size, int64_t group_width) {
  const WeightGradientProblem problem = check(da, x, kernel_size, group_width);
  kChecks.cuda("x", x);
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Tensor d_weight = allocate({problem.taps(), problem.channels, group_width}, ScalarType::Float, x);
  const Tensor d_bias = allocate({problem.channels}, ScalarType::Float, x);
  if (problem.batch == 0) {
    torch::stable::zero_(const_cast<Tensor&>(d_weight));
    torch::stable::zero_(const_cast<Tensor&>(d_bias));
    return {d_weight, d_bias};
  }
  make_current(index);
  const DeviceInfo device = device_info(index);
  const WeightGradientPlan plan = plan_weight_gradient(problem, {device.capability, device.multiprocessors, device.max_shared_memory});
  if (plan.stages == 0) {
    kChecks.refuse("x needs more shared memory than the ", device.max_shared_memory, " bytes that a block has on this device");
  }
  const Tensor workspace = allocate({plan.workspace(problem)}, ScalarType::Byte, x);
  const WeightGradientTensors tensors{da.const_data_ptr(), x.const_data_ptr(), static_cast<float*>(d_weight.mutable_data_ptr()),
                                      static_cast<float*>(d_bias.mutable_data_ptr())};
  check_cuda(run_weight_gradient(problem, plan, tensors, workspace.mutable_data_ptr(), current_stream(index)), "conv_weight_gradient",
             "launch");
  return {d_weight, d_bias};
}

// The checks alone, on tensors of any device.
void conv_weight_gradient_check(const Tensor& da, const Tensor& x, int64_t kernel_size, int64_t group_width) {
  check(da, x, kernel_size, group_width);
}

}  // namespace
}  // namespace convfirst::block_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(convfirst, m) {
  m.def("conv_weight_gradient(Tensor da, Tensor x, int kernel_size, int group_width) -> (Tensor, Tensor)");
  m.def("conv_weight_gradient_check(Tensor da, Tensor x, int kernel_size, int group_width) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) {
  m.impl("conv_weight_gradient", TORCH_BOX(&convfirst::block_fusion::conv_weight_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CompositeExplicitAutograd, m) {
  m.impl("conv_weight_gradient_check", TORCH_BOX(&convfirst::block_fusion::conv_weight_gradient_check));
}
