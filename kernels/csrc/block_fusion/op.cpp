#include "block_fusion/op.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "block_fusion/plan.h"
#include "common/runtime.h"

namespace convfirst::block_fusion {
namespace {

Device device_of(int index) {
  const DeviceInfo info = device_info(index);
  return Device{info.capability, info.multiprocessors, info.max_shared_memory};
}

const float* pointer(const MaybeTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

Tensors tensors_of(const Arguments& a, const Tensor& y) {
  return Tensors{a.x.const_data_ptr(),
                 a.conv_weight.const_data_ptr(),
                 pointer(a.conv_bias),
                 pointer(a.norm_weight),
                 pointer(a.norm_bias),
                 a.expand_weight.const_data_ptr(),
                 pointer(a.expand_bias),
                 a.project_weight.const_data_ptr(),
                 pointer(a.project_bias),
                 pointer(a.layer_scale),
                 pointer(a.sample_scale),
                 y.mutable_data_ptr(),
                 static_cast<float>(a.eps)};
}

Tensor allocate(torch::headeronly::IntHeaderOnlyArrayRef shape, torch::headeronly::ScalarType dtype, const Tensor& like,
                torch::headeronly::MemoryFormat format) {
  return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format);
}

void launch(const Arguments& arguments, const Problem& problem, const Tensor& y) {
  const int index = arguments.x.get_device_index();
  const Device device = device_of(index);
  const std::string path = forced_path();
  check_path(path);
  const Choice<Variant> choice = choose(all_variants(), problem, device, path);
  if (choice.variant == nullptr) {
    throw std::runtime_error("conv_first_block: no kernel variant covers " + describe(problem) + " on compute capability " +
                             std::to_string(device.capability) + (path.empty() ? "" : " on path " + path) +
                             "; convfirst_kernels.explain lists the variants and why each was refused");
  }
  Tensor workspace;
  void* scratch = nullptr;
  if (choice.config.workspace > 0) {
    const int64_t bytes = choice.config.workspace;
    workspace = allocate({&bytes, 1}, torch::headeronly::ScalarType::Byte, arguments.x,
                         torch::headeronly::MemoryFormat::Contiguous);
    scratch = workspace.mutable_data_ptr();
  }
  const int error =
      choice.variant->launch(problem, tensors_of(arguments, y), choice.config, scratch, current_stream(index));
  check_cuda(error, "conv_first_block", choice.variant->name);
}

void run(const Arguments& arguments, const Problem& problem, const Tensor& y) {
  if (arguments.x.numel() == 0) return;
  make_current(arguments.x.get_device_index());
  launch(arguments, problem, y);
}

}  // namespace

Tensor conv_first_block(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                        const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Tensor& expand_weight,
                        const MaybeTensor& expand_bias, const Tensor& project_weight, const MaybeTensor& project_bias,
                        const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t group_width,
                        const std::string& activation, double eps, bool has_norm) {
  const Arguments arguments{x,           conv_weight,    conv_bias,    norm_weight, norm_bias,
                            expand_weight, expand_bias,  project_weight, project_bias, layer_scale,
                            sample_scale, group_width,   activation,   eps,         has_norm};
  const Problem problem = check(arguments);
  check_device(arguments);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = allocate(x.sizes(), x.scalar_type(), x, torch::headeronly::MemoryFormat::ChannelsLast);
  run(arguments, problem, y);
  return y;
}

void conv_first_block_out(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                          const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Tensor& expand_weight,
                          const MaybeTensor& expand_bias, const Tensor& project_weight, const MaybeTensor& project_bias,
                          const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t group_width,
                          const std::string& activation, double eps, bool has_norm, Tensor out) {
  const Arguments arguments{x,           conv_weight,    conv_bias,    norm_weight, norm_bias,
                            expand_weight, expand_bias,  project_weight, project_bias, layer_scale,
                            sample_scale, group_width,   activation,   eps,         has_norm};
  const Problem problem = check(arguments);
  check_output(arguments, out);
  check_device(arguments);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  run(arguments, problem, out);
}

std::string conv_first_block_check(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                                   const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                                   const Tensor& expand_weight, const MaybeTensor& expand_bias,
                                   const Tensor& project_weight, const MaybeTensor& project_bias,
                                   const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t group_width,
                                   const std::string& activation, double eps, bool has_norm, const MaybeTensor& out) {
  const Arguments arguments{x,           conv_weight,    conv_bias,    norm_weight, norm_bias,
                            expand_weight, expand_bias,  project_weight, project_bias, layer_scale,
                            sample_scale, group_width,   activation,   eps,         has_norm};
  const Problem problem = check(arguments);
  if (out) check_output(arguments, *out);
  return describe(problem);
}

std::string plan_conv_first_block(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden,
                                  int64_t kernel_size, int64_t group_width, const std::string& dtype,
                                  const std::string& activation, bool has_norm, int64_t capability,
                                  int64_t multiprocessors, int64_t max_shared_memory, const std::string& path) {
  if (dtype != "float16" && dtype != "bfloat16") {
    throw std::runtime_error("plan: dtype is '" + dtype + "'; supported are 'float16' and 'bfloat16'");
  }
  const Problem problem{batch,
                        height,
                        width,
                        static_cast<int>(channels),
                        static_cast<int>(hidden),
                        static_cast<int>(kernel_size),
                        static_cast<int>(group_width),
                        dtype == "float16" ? DType::kHalf : DType::kBFloat16,
                        parse_activation(activation),
                        has_norm};
  const Device device{static_cast<int>(capability), static_cast<int>(multiprocessors), static_cast<int>(max_shared_memory)};
  const std::string restriction = path.empty() ? forced_path() : path;
  check_path(restriction);
  return explain_json(all_variants(), problem, device, restriction);
}

}  // namespace convfirst::block_fusion
