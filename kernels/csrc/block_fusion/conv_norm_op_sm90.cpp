// The CUDA side of conv_norm: the kernels that begin a block on the split path.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "block_fusion/conv_norm_op.h"
#include "block_fusion/split_sm90.h"
#include "common/runtime.h"

namespace convfirst::block_fusion {
namespace {

constexpr Checks kChecks{"conv_norm"};

std::tuple<Tensor, Tensor> conv_norm(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                                     const MaybeTensor& residual, int64_t group_width, bool normalise, double eps) {
  const Problem problem = check_conv_norm(x, conv_weight, conv_bias, residual, group_width, normalise, eps);
  kChecks.cuda("x", x);
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Tensor a = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                        torch::headeronly::MemoryFormat::ChannelsLast);
  const int64_t pixels = normalise ? problem.batch * problem.height * problem.width : 0;
  const Tensor rstd = torch::stable::empty({&pixels, 1}, ScalarType::Float, std::nullopt, x.device());
  if (x.numel() == 0) return {a, rstd};
  make_current(index);
  const DeviceInfo info = device_info(index);
  const Device device{info.capability, info.multiprocessors, info.max_shared_memory};
  if (info.capability != 90) kChecks.refuse("x is on a device of compute capability ", info.capability, "; supported is 90");
  if (!sm90::remembered_first_plan(problem, device).covered) {
    kChecks.refuse("no kernel covers ", problem.kernel_size, "x", problem.kernel_size, " filters on ", problem.channels,
                   " channels in groups of ", problem.group_width,
                   "; supported are 3x3 and 5x5 in groups of 8 and 16 on multiples of 32 channels up to 1024, and 7x7 depthwise up to 1536");
  }
  Tensors tensors{};
  tensors.x = x.const_data_ptr();
  tensors.conv_weight = conv_weight.const_data_ptr();
  tensors.conv_bias = conv_bias ? static_cast<const float*>(conv_bias->const_data_ptr()) : nullptr;
  tensors.eps = static_cast<float>(eps);
  const sm90::ConvNormExtras extras{residual ? residual->const_data_ptr() : nullptr,
                              normalise ? static_cast<float*>(rstd.mutable_data_ptr()) : nullptr};
  check_cuda(sm90::launch_first(problem, tensors, device, a.mutable_data_ptr(), current_stream(index), extras), "conv_norm", "launch");
  return {a, rstd};
}

}  // namespace
}  // namespace convfirst::block_fusion

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) { m.impl("conv_norm", TORCH_BOX(&convfirst::block_fusion::conv_norm)); }
