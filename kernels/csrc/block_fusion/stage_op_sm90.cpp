// The CUDA side of conv_first_stage.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "block_fusion/check.h"
#include "block_fusion/stage_op.h"
#include "block_fusion/stage_sm90.h"
#include "common/runtime.h"

namespace convfirst::block_fusion {
namespace {

constexpr Checks kChecks{"conv_first_stage"};

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

Device device_of(int index) {
  const DeviceInfo info = device_info(index);
  return Device{info.capability, info.multiprocessors, info.max_shared_memory};
}

std::string refusal(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t blocks, const std::string& dtype,
                    const std::string& activation, int64_t index) {
  const std::string path = forced_path();
  if (!path.empty() && path != "sm90") return "launches are restricted to path " + path;
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int>(index));
  make_current(static_cast<int>(index));
  const sm90::StageProblem q{static_cast<int>(index), batch, height, width, static_cast<int>(channels), static_cast<int>(blocks),
                             dtype == "float16" ? DType::kHalf : DType::kBFloat16, parse_activation(activation)};
  const char* reason = sm90::stage_refusal(q, device_of(static_cast<int>(index)));
  return reason == nullptr ? "" : reason;
}

Tensor conv_first_stage(const Tensor& x, const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& expand_weight,
                        const Tensor& expand_vectors, const Tensor& project_weight, const Tensor& project_vectors,
                        const MaybeTensor& down_weight, const MaybeTensor& down_vectors, const Tensor& workspace,
                        const std::string& activation, double eps, bool has_norm, double down_eps, bool down_norm) {
  const int64_t blocks = check_stage({x, conv_weight, conv_bias, expand_weight, expand_vectors, project_weight, project_vectors, down_weight, down_vectors,
                                      workspace, activation, eps, has_norm});
  kChecks.cuda("x", x);
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const int64_t halved = down_weight ? 2 : 1;
  const int64_t sizes[4] = {x.size(0), x.size(1) * halved, x.size(2) / halved, x.size(3) / halved};
  const Tensor y = torch::stable::empty({sizes, 4}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                        torch::headeronly::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  make_current(index);
  const sm90::StageProblem q{index, y.size(0), y.size(2), y.size(3), static_cast<int>(y.size(1)), static_cast<int>(blocks),
                             x.scalar_type() == ScalarType::Half ? DType::kHalf : DType::kBFloat16, parse_activation(activation)};
  if (const char* reason = sm90::stage_refusal(q, device_of(index))) kChecks.refuse("x has shape ", show(x.sizes()), "; ", reason);
  if (down_weight && q.channels == 64) kChecks.refuse("a stage of 64 channels begins without a downsampling here");
  const int64_t pixels = q.batch * q.height * q.width, bytes = sm90::stage_workspace(q);
  if (workspace.scalar_type() != ScalarType::Byte || workspace.numel() < bytes) {
    kChecks.refuse("workspace has ", workspace.numel(), " elements of ", show(workspace.scalar_type()), "; needed are ", bytes, " bytes");
  }
  const sm90::StageTensors tensors{x.const_data_ptr(), y.mutable_data_ptr(), conv_weight.const_data_ptr(), floats(conv_bias),
                                   expand_weight.const_data_ptr(), floats(expand_vectors),
                                   project_weight.const_data_ptr(), floats(project_vectors), workspace.mutable_data_ptr(),
                                   static_cast<float>(eps), has_norm, static_cast<int>(q.height), static_cast<int>(q.width),
                                   static_cast<int>(pixels), q.blocks, 0, down_weight ? down_weight->const_data_ptr() : nullptr,
                                   down_vectors ? floats(*down_vectors) : nullptr, static_cast<float>(down_eps), down_norm,
                                   static_cast<int>(x.size(2)), static_cast<int>(x.size(3))};
  check_cuda(sm90::launch_stage(q, tensors, current_stream(index)), "conv_first_stage", "launch");
  return y;
}

}  // namespace
}  // namespace convfirst::block_fusion

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) { m.impl("conv_first_stage", TORCH_BOX(&convfirst::block_fusion::conv_first_stage)); }

STABLE_TORCH_LIBRARY_IMPL(convfirst, CompositeExplicitAutograd, m) {
  m.impl("conv_first_stage_refusal", TORCH_BOX(&convfirst::block_fusion::refusal));
}
