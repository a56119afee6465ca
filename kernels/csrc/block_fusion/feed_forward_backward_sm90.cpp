// torch.ops.convfirst.feed_forward_backward_sm90: the backward of a block's feed-forward half in four or five launches, up to 256 channels.
// convfirst_kernels/feed_forward_backward.py tells what it computes and takes it where it can.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "block_fusion/check.h"
#include "common/runtime.h"
#include "feed_forward_bwd_tile_sm90.h"

namespace convfirst::block_fusion {
namespace {

using sm90::FeedForwardBackwardPlan;
using sm90::FeedForwardBackwardProblem;
using sm90::FeedForwardBackwardTensors;

constexpr Checks kChecks{"feed_forward_backward"};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor allocate(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::Contiguous);
}

const float* pointer(const MaybeTensor& tensor) { return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr; }

template <DType kDType, Activation kActivation, int kIndex = 0>
int launch_width(const FeedForwardBackwardProblem& q, const FeedForwardBackwardTensors& t, const FeedForwardBackwardPlan& plan, char* workspace,
                 int multiprocessors, cudaStream_t stream) {
  if constexpr (kIndex == std::size(sm90::kBackwardWidths)) {
    return 1;  // cudaErrorInvalidValue
  } else {
    constexpr int kWidth = sm90::kBackwardWidths[kIndex];
    if (plan.width != kWidth) return launch_width<kDType, kActivation, kIndex + 1>(q, t, plan, workspace, multiprocessors, stream);
    using Kernels = sm90::FeedForwardBackwardKernels<kDType, kWidth, kActivation>;
    if (const int error = Kernels::launch_data(q, t, plan, workspace, multiprocessors, stream)) return error;
    return Kernels::launch_weights(q, t, plan, workspace, stream);
  }
}

template <DType kDType>
int launch_dtype(const FeedForwardBackwardProblem& q, const FeedForwardBackwardTensors& t, const FeedForwardBackwardPlan& plan, char* workspace,
                 int multiprocessors, cudaStream_t stream) {
  if (q.activation == Activation::kRelu) return launch_width<kDType, Activation::kRelu>(q, t, plan, workspace, multiprocessors, stream);
  if (q.activation == Activation::kSilu) return launch_width<kDType, Activation::kSilu>(q, t, plan, workspace, multiprocessors, stream);
  return launch_width<kDType, Activation::kGelu>(q, t, plan, workspace, multiprocessors, stream);
}

int launch(const FeedForwardBackwardProblem& q, const FeedForwardBackwardTensors& t, const FeedForwardBackwardPlan& plan, char* workspace,
           int multiprocessors, cudaStream_t stream) {
  if (const int error = sm90::launch_backward_prepare(q, t, plan, workspace, stream)) return error;
  const int error = q.dtype == DType::kHalf ? launch_dtype<DType::kHalf>(q, t, plan, workspace, multiprocessors, stream)
                                            : launch_dtype<DType::kBFloat16>(q, t, plan, workspace, multiprocessors, stream);
  return error != 0 ? error : sm90::launch_backward_reduce(q, t, plan, workspace, stream);
}

void check_arguments(const Tensor& a, const Tensor& dy, const MaybeTensor& rstd, const Tensor& expand_weight, const MaybeTensor& expand_bias,
                     const Tensor& project_weight, const MaybeTensor& project_bias, const MaybeTensor& layer_scale,
                     const MaybeTensor& sample_scale) {
  const Checks& c = kChecks;
  c.image("a", a);
  c.image("dy", dy);
  c.same_device("dy", dy, a);
  c.shape("dy", dy, {a.size(0), a.size(1), a.size(2), a.size(3)}, "a's shape");
  if (dy.scalar_type() != a.scalar_type()) c.refuse("dy is ", show(dy.scalar_type()), "; expected a's dtype ", show(a.scalar_type()));
  const int64_t channels = a.size(1);
  if (sm90::backward_width(static_cast<int>(channels)) == 0) c.refuse("a has ", channels, " channels; the Hopper kernels have at most 256");
  c.weight("expand_weight", expand_weight, a, {-1, channels}, "[hidden, channels]");
  const int64_t hidden = expand_weight.size(0);
  if (hidden < 64 || hidden % 64 != 0) c.refuse("expand_weight has ", hidden, " rows; the Hopper kernels want a multiple of 64");
  c.weight("project_weight", project_weight, a, {channels, hidden}, "[channels, hidden]");
  c.vector("expand_bias", expand_bias, a, hidden, "[hidden]");
  c.vector("project_bias", project_bias, a, channels, "[channels]");
  c.vector("layer_scale", layer_scale, a, channels, "[channels]");
  c.vector("sample_scale", sample_scale, a, a.size(0), "[batch]");
  c.vector("rstd", rstd, a, a.size(0) * a.size(2) * a.size(3), "[pixels]");
  c.cuda("a", a);
}

Gradients feed_forward_backward_sm90(const Tensor& a, const Tensor& dy, const MaybeTensor& rstd, const Tensor& expand_weight,
                                     const MaybeTensor& expand_bias, const Tensor& project_weight, const MaybeTensor& project_bias,
                                     const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, const std::string& activation) {
  check_arguments(a, dy, rstd, expand_weight, expand_bias, project_weight, project_bias, layer_scale, sample_scale);
  const int64_t channels = a.size(1), hidden = expand_weight.size(0), image_pixels = a.size(2) * a.size(3);
  FeedForwardBackwardProblem q{};
  q.pixels = a.size(0) * image_pixels, q.image_pixels = image_pixels;
  q.channels = static_cast<int>(channels), q.hidden = static_cast<int>(hidden);
  q.dtype = a.scalar_type() == ScalarType::Half ? DType::kHalf : DType::kBFloat16;
  q.activation = parse_activation(activation);
  q.has_norm = rstd.has_value(), q.has_layer_scale = layer_scale.has_value(), q.has_sample_scale = sample_scale.has_value();
  const int index = a.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  Gradients result{allocate({q.pixels, channels}, a.scalar_type(), a), allocate({hidden, channels}, ScalarType::Float, a),
                   allocate({hidden}, ScalarType::Float, a),           allocate({channels, hidden}, ScalarType::Float, a),
                   allocate({channels}, ScalarType::Float, a),         allocate({layer_scale ? channels : 0}, ScalarType::Float, a)};
  auto& [da, d_expand_weight, d_expand_bias, d_project_weight, d_project_bias, d_layer_scale] = result;
  if (q.pixels == 0) {
    for (Tensor* sum : {&d_expand_weight, &d_expand_bias, &d_project_weight, &d_project_bias, &d_layer_scale}) torch::stable::zero_(*sum);
    return result;
  }
  make_current(index);
  const DeviceInfo device = device_info(index);
  if (device.capability != 90) kChecks.refuse("the device has compute capability ", device.capability, "; the Hopper kernels want 90");
  FeedForwardBackwardTensors t{};
  t.a = a.const_data_ptr(), t.dy = dy.const_data_ptr(), t.rstd = pointer(rstd);
  t.expand_weight = expand_weight.const_data_ptr(), t.expand_bias = pointer(expand_bias);
  t.project_weight = project_weight.const_data_ptr(), t.project_bias = pointer(project_bias);
  t.layer_scale = pointer(layer_scale), t.sample_scale = pointer(sample_scale), t.da = da.mutable_data_ptr();
  const auto data = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  t.d_expand_weight = data(d_expand_weight), t.d_expand_bias = data(d_expand_bias), t.d_project_weight = data(d_project_weight);
  t.d_project_bias = data(d_project_bias), t.d_layer_scale = data(d_layer_scale);
  const FeedForwardBackwardPlan plan = sm90::plan_feed_forward_backward(q, device.multiprocessors);
  const Tensor workspace = allocate({plan.workspace}, ScalarType::Byte, a);
  check_cuda(launch(q, t, plan, static_cast<char*>(workspace.mutable_data_ptr()), device.multiprocessors, current_stream(index)),
             "feed_forward_backward", "launch");
  return result;
}

}  // namespace
}  // namespace convfirst::block_fusion

// clang-format off
#define FEED_FORWARD_BACKWARD_ARGUMENTS                                                                                   \
  "Tensor a, Tensor dy, Tensor? rstd, Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, "                 \
  "Tensor? project_bias, Tensor? layer_scale, Tensor? sample_scale, str activation"
// clang-format on

STABLE_TORCH_LIBRARY_FRAGMENT(convfirst, m) {
  m.def("feed_forward_backward_sm90(" FEED_FORWARD_BACKWARD_ARGUMENTS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) {
  m.impl("feed_forward_backward_sm90", TORCH_BOX(&convfirst::block_fusion::feed_forward_backward_sm90));
}
