#include "block_fusion/conv_norm_op.h"

#include <torch/csrc/stable/library.h>

namespace convfirst::block_fusion {
namespace {

constexpr Checks kChecks{"conv_norm"};

int side_of(int64_t taps) {
  if (taps == 9) return 3;
  if (taps == 25) return 5;
  if (taps == 49) return 7;
  kChecks.refuse("conv_weight has ", taps, " taps; supported are 9, 25 and 49");
}

void conv_norm_check(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias, const MaybeTensor& residual,
                     int64_t group_width, bool normalise, double eps) {
  check_conv_norm(x, conv_weight, conv_bias, residual, group_width, normalise, eps);
}

}  // namespace

Problem check_conv_norm(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias, const MaybeTensor& residual,
                        int64_t group_width, bool normalise, double eps) {
  kChecks.image("x", x);
  const int64_t channels = x.size(1);
  if (group_width != 1 && group_width != 8 && group_width != 16) {
    kChecks.refuse("group_width is ", group_width, "; supported are 1 (depthwise), 8 and 16");
  }
  if (channels % group_width != 0) kChecks.refuse("group_width ", group_width, " does not divide the ", channels, " channels");
  kChecks.shape("conv_weight", conv_weight, {-1, channels, group_width}, "[taps, channels, group_width]");
  const int side = side_of(conv_weight.size(0));
  kChecks.weight("conv_weight", conv_weight, x, {side * side, channels, group_width}, "[taps, channels, group_width]");
  kChecks.vector("conv_bias", conv_bias, x, channels, "[channels]");
  if (residual) {
    if (normalise) kChecks.refuse("residual is given with normalise=True; it is added where there is no norm");
    kChecks.shape("residual", *residual, {x.size(0), channels, x.size(2), x.size(3)}, "x's shape");
    if (residual->scalar_type() != x.scalar_type()) {
      kChecks.refuse("residual is ", show(residual->scalar_type()), "; expected x's dtype ", show(x.scalar_type()));
    }
    kChecks.same_device("residual", *residual, x);
    kChecks.image("residual", *residual);
  }
  if (!(eps >= 0)) kChecks.refuse("eps is ", eps, "; it must not be negative");
  return Problem{x.size(0),
                 x.size(2),
                 x.size(3),
                 static_cast<int>(channels),
                 static_cast<int>(channels),
                 side,
                 static_cast<int>(group_width),
                 x.scalar_type() == ScalarType::Half ? DType::kHalf : DType::kBFloat16,
                 Activation::kRelu,
                 normalise};
}

}  // namespace convfirst::block_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(convfirst, m) {
  m.def("conv_norm(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor? residual, int group_width, bool normalise, float eps) -> "
        "(Tensor, Tensor)");
  m.def("conv_norm_check(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor? residual, int group_width, bool normalise, "
        "float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CompositeExplicitAutograd, m) {
  m.impl("conv_norm_check", TORCH_BOX(&convfirst::block_fusion::conv_norm_check));
}
