#include "block_fusion/check.h"

namespace convfirst::block_fusion {
namespace {

constexpr Checks kChecks{"conv_first_block"};

int check_kernel_size(const Tensor& conv_weight) {
  if (conv_weight.dim() != 3) {
    kChecks.refuse("conv_weight has shape ", show(conv_weight.sizes()),
                   "; expected the packed [kernel_size * kernel_size, channels, group_width] (pack_conv_weight makes it)");
  }
  for (int size : {3, 5, 7}) {
    if (conv_weight.size(0) == size * size) return size;
  }
  kChecks.refuse("conv_weight has ", conv_weight.size(0), " taps; supported are 9, 25 and 49 (kernel size 3, 5, 7)");
}

void check_group_width(int64_t group_width, int64_t channels) {
  if (group_width != 1 && group_width != 8 && group_width != 16) {
    kChecks.refuse("group_width is ", group_width, "; supported are 1 (depthwise), 8 and 16");
  }
  if (channels % group_width != 0) {
    kChecks.refuse("group_width ", group_width, " does not divide the ", channels, " channels");
  }
}

int64_t check_hidden(const Tensor& expand_weight, int64_t channels) {
  kChecks.shape("expand_weight", expand_weight, {-1, channels}, "[hidden, channels]");
  const int64_t hidden = expand_weight.size(0);
  if (hidden < 16 || hidden % 16 != 0) {
    kChecks.refuse("expand_weight has ", hidden, " hidden units; supported are multiples of 16");
  }
  return hidden;
}

}  // namespace

Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  kChecks.refuse("activation is '", name, "'; supported are 'relu', 'silu' and 'gelu'");
}

Problem check(const Arguments& a) {
  kChecks.image("x", a.x);
  const int64_t batch = a.x.size(0), channels = a.x.size(1);
  const int kernel_size = check_kernel_size(a.conv_weight);
  check_group_width(a.group_width, channels);
  const int64_t hidden = check_hidden(a.expand_weight, channels);
  kChecks.weight("conv_weight", a.conv_weight, a.x, {kernel_size * kernel_size, channels, a.group_width},
                 "[kernel_size * kernel_size, channels, group_width]");
  kChecks.weight("expand_weight", a.expand_weight, a.x, {hidden, channels}, "[hidden, channels]");
  kChecks.weight("project_weight", a.project_weight, a.x, {channels, hidden}, "[channels, hidden]");
  kChecks.vector("conv_bias", a.conv_bias, a.x, channels, "[channels]");
  kChecks.vector("norm_weight", a.norm_weight, a.x, channels, "[channels]");
  kChecks.vector("norm_bias", a.norm_bias, a.x, channels, "[channels]");
  kChecks.vector("expand_bias", a.expand_bias, a.x, hidden, "[hidden]");
  kChecks.vector("project_bias", a.project_bias, a.x, channels, "[channels]");
  kChecks.vector("layer_scale", a.layer_scale, a.x, channels, "[channels]");
  kChecks.vector("sample_scale", a.sample_scale, a.x, batch, "[batch]");
  if (!a.has_norm && (a.norm_weight || a.norm_bias)) {
    kChecks.refuse(a.norm_weight ? "norm_weight" : "norm_bias",
                   " is given and has_norm is false; fold the norm or set has_norm");
  }
  if (a.has_norm && !(a.eps > 0)) kChecks.refuse("eps is ", a.eps, "; it must be positive");
  return Problem{batch,
                 a.x.size(2),
                 a.x.size(3),
                 static_cast<int>(channels),
                 static_cast<int>(hidden),
                 kernel_size,
                 static_cast<int>(a.group_width),
                 a.x.scalar_type() == ScalarType::Half ? DType::kHalf : DType::kBFloat16,
                 parse_activation(a.activation),
                 a.has_norm};
}

void check_device(const Arguments& a) { kChecks.cuda("x", a.x); }

void check_output(const Arguments& a, const Tensor& y) {
  kChecks.output(y, a.x,
                 {{"x", a.x},
                  {"conv_weight", a.conv_weight},
                  {"conv_bias", a.conv_bias},
                  {"norm_weight", a.norm_weight},
                  {"norm_bias", a.norm_bias},
                  {"expand_weight", a.expand_weight},
                  {"expand_bias", a.expand_bias},
                  {"project_weight", a.project_weight},
                  {"project_bias", a.project_bias},
                  {"layer_scale", a.layer_scale},
                  {"sample_scale", a.sample_scale}});
}

}  // namespace convfirst::block_fusion
