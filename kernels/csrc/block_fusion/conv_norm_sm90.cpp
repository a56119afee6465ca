// Picks the compiled kernel of a convolution and LayerNorm on Hopper and hands it its parameters.
#include "conv_norm_sm90.h"

namespace convfirst::block_fusion::sm90 {
namespace {

template <DType kDType, class Body>
auto with_filter(const Problem& q, Body&& body) {
  const bool three = q.kernel_size == 3;
  if (q.group_width == 8) return three ? body(ConvNormKernel<kDType, 3, 8, false>{}) : body(ConvNormKernel<kDType, 5, 8, false>{});
  if (q.group_width == 16) return three ? body(ConvNormKernel<kDType, 3, 16, false>{}) : body(ConvNormKernel<kDType, 5, 16, false>{});
  return q.width <= 8 ? body(ConvNormKernel<kDType, 7, 1, true>{}) : body(ConvNormKernel<kDType, 7, 1, false>{});
}

// Calls `body` with the problem's kernel.
template <class Body>
auto with_kernel(const Problem& q, Body&& body) {
  if (q.dtype == DType::kHalf) return with_filter<DType::kHalf>(q, body);
  return with_filter<DType::kBFloat16>(q, body);
}

}  // namespace

int conv_norm_launch(const Problem& q, const Tensors& t, const ConvNormPlan& plan, void* a, bool dependent, cudaStream_t stream) {
  ConvNormParams p{};
  p.x = t.x, p.weight = t.conv_weight, p.bias = t.conv_bias, p.norm_weight = t.norm_weight, p.norm_bias = t.norm_bias, p.a = a;
  p.eps = t.eps, p.has_norm = q.has_norm;
  p.batch = static_cast<int>(q.batch), p.height = static_cast<int>(q.height), p.width = static_cast<int>(q.width);
  p.channels = q.channels;
  p.plan = plan;
  p.layout = conv_norm_layout(plan.tile, plan.slab, plan.cluster, plan.buffers, q.kernel_size, q.group_width);
  return with_kernel(q, [&](auto kernel) { return kernel.launch(p, dependent, stream); });
}

const void* conv_norm_pointer(const Problem& q) {
  return with_kernel(q, [](auto kernel) { return kernel.pointer(); });
}

}  // namespace convfirst::block_fusion::sm90
