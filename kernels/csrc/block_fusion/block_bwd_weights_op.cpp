// torch.ops.convfirst.{absorb_affine, release_affine, transpose_filter}: what the block's backward does to weights and their gradients.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "block_fusion/block_bwd_weights.h"
#include "common/checks.h"
#include "common/runtime.h"

namespace convfirst::block_fusion {
namespace {

DType dtype_of(const Checks& checks, const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Half) return DType::kHalf;
  if (tensor.scalar_type() == ScalarType::BFloat16) return DType::kBFloat16;
  checks.refuse(name, " is ", show(tensor.scalar_type()), "; supported are torch.float16 and torch.bfloat16");
}

const float* pointer(const MaybeTensor& tensor) { return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr; }

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, type, std::nullopt, like.device());
}

// A contiguous float32 gradient of any shape whose size is a multiple of 8.
const float* gradient(const Checks& checks, const char* name, const Tensor& tensor, const Tensor& weight) {
  if (tensor.scalar_type() != ScalarType::Float) checks.refuse(name, " is ", show(tensor.scalar_type()), "; expected torch.float32");
  if (!tensor.is_contiguous()) checks.refuse(name, " of shape ", show(tensor.sizes()), " must be contiguous");
  if (tensor.numel() % 8 != 0) checks.refuse(name, " has ", tensor.numel(), " values; supported are multiples of 8");
  checks.same_device(name, tensor, weight);
  checks.alignment(name, tensor);
  return static_cast<const float*>(tensor.const_data_ptr());
}

AffineTensors check_affine(const Checks& checks, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& scale,
                           const MaybeTensor& shift) {
  checks.shape("expand_weight", weight, {-1, -1}, "[hidden, channels]");
  const int64_t hidden = weight.size(0), channels = weight.size(1);
  if (channels % 8 != 0 || hidden < 1) checks.refuse("expand_weight has ", channels, " channels; supported are multiples of 8");
  checks.weight("expand_weight", weight, weight, {hidden, channels}, "[hidden, channels]");
  checks.vector("expand_bias", bias, weight, hidden, "[hidden]");
  checks.vector("norm_weight", scale, weight, channels, "[channels]");
  checks.vector("norm_bias", shift, weight, channels, "[channels]");
  checks.cuda("expand_weight", weight);
  return {weight.const_data_ptr(), pointer(bias), pointer(scale), pointer(shift), static_cast<int>(hidden), static_cast<int>(channels)};
}

std::tuple<Tensor, Tensor> absorb(const Tensor& expand_weight, const MaybeTensor& expand_bias, const MaybeTensor& norm_weight,
                                  const MaybeTensor& norm_bias) {
  constexpr Checks kChecks{"absorb_affine"};
  const DType dtype = dtype_of(kChecks, "expand_weight", expand_weight);
  const AffineTensors from = check_affine(kChecks, expand_weight, expand_bias, norm_weight, norm_bias);
  const int index = expand_weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  const Tensor matrix = allocate({from.hidden, from.channels}, expand_weight.scalar_type(), expand_weight);
  const Tensor bias = allocate({from.hidden}, ScalarType::Float, expand_weight);
  check_cuda(absorb_affine(dtype, from, matrix.mutable_data_ptr(), static_cast<float*>(bias.mutable_data_ptr()), current_stream(index)),
             "absorb_affine", "launch");
  return {matrix, bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> release(const Tensor& d_matrix, const Tensor& d_bias, const Tensor& expand_weight,
                                                           const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                                                           const Tensor& d_project, const Tensor& d_conv) {
  constexpr Checks kChecks{"release_affine"};
  const DType dtype = dtype_of(kChecks, "expand_weight", expand_weight);
  const AffineTensors of = check_affine(kChecks, expand_weight, std::nullopt, norm_weight, norm_bias);
  kChecks.shape("d_matrix", d_matrix, {of.hidden, of.channels}, "[hidden, channels]");
  kChecks.vector("d_bias", d_bias, expand_weight, of.hidden, "[hidden]");
  const int index = expand_weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  const auto rounded = [&](const Tensor& gradient) {
    return torch::stable::empty(gradient.sizes(), expand_weight.scalar_type(), std::nullopt, gradient.device());
  };
  const Tensor d_expand = rounded(d_matrix), project = rounded(d_project), conv = rounded(d_conv);
  const Tensor d_scale = allocate({of.channels}, ScalarType::Float, expand_weight);
  const Tensor d_shift = allocate({of.channels}, ScalarType::Float, expand_weight);
  const Tensor workspace = allocate({release_workspace(of)}, ScalarType::Byte, expand_weight);
  const ReleasedTensors to{gradient(kChecks, "d_matrix", d_matrix, expand_weight),
                           static_cast<const float*>(d_bias.const_data_ptr()),
                           {gradient(kChecks, "d_project", d_project, expand_weight), gradient(kChecks, "d_conv", d_conv, expand_weight)},
                           d_expand.mutable_data_ptr(),
                           {project.mutable_data_ptr(), conv.mutable_data_ptr()},
                           {d_project.numel(), d_conv.numel()},
                           static_cast<float*>(d_scale.mutable_data_ptr()),
                           static_cast<float*>(d_shift.mutable_data_ptr())};
  check_cuda(release_affine(dtype, of, to, workspace.mutable_data_ptr(), current_stream(index)), "release_affine", "launch");
  return {d_scale, d_shift, d_expand, project, conv};
}

Tensor transpose(const Tensor& conv_weight) {
  constexpr Checks kChecks{"transpose_filter"};
  kChecks.shape("conv_weight", conv_weight, {-1, -1, -1}, "[taps, channels, group_width]");
  dtype_of(kChecks, "conv_weight", conv_weight);
  const int64_t taps = conv_weight.size(0), channels = conv_weight.size(1), group_width = conv_weight.size(2);
  if (group_width < 1 || channels % group_width != 0) kChecks.refuse("group_width ", group_width, " does not divide the ", channels, " channels");
  kChecks.weight("conv_weight", conv_weight, conv_weight, {taps, channels, group_width}, "[taps, channels, group_width]");
  kChecks.cuda("conv_weight", conv_weight);
  const int index = conv_weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  const Tensor result = allocate({taps, channels, group_width}, conv_weight.scalar_type(), conv_weight);
  check_cuda(transpose_filter(conv_weight.const_data_ptr(), result.mutable_data_ptr(), static_cast<int>(taps), static_cast<int>(channels),
                              static_cast<int>(group_width), current_stream(index)),
             "transpose_filter", "launch");
  return result;
}

}  // namespace
}  // namespace convfirst::block_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(convfirst, m) {
  m.def("absorb_affine(Tensor expand_weight, Tensor? expand_bias, Tensor? norm_weight, Tensor? norm_bias) -> (Tensor, Tensor)");
  m.def("release_affine(Tensor d_matrix, Tensor d_bias, Tensor expand_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor d_project, "
        "Tensor d_conv) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("transpose_filter(Tensor conv_weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) {
  m.impl("absorb_affine", TORCH_BOX(&convfirst::block_fusion::absorb));
  m.impl("release_affine", TORCH_BOX(&convfirst::block_fusion::release));
  m.impl("transpose_filter", TORCH_BOX(&convfirst::block_fusion::transpose));
}
