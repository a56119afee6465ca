// Picks the compiled kernel of a grouped convolution and LayerNorm and hands it its parameters.
#include "grouped_conv_norm_sm90.h"

namespace convfirst::block_fusion::sm90 {
namespace {

template <DType kDType, int kKernel, int kGroupWidth, class Body>
auto with_m_tiles(int m_tiles, Body&& body) {
  if (m_tiles == 1) return body(GroupedKernel<kDType, kKernel, kGroupWidth, 1>{});
  if (m_tiles == 2) return body(GroupedKernel<kDType, kKernel, kGroupWidth, 2>{});
  if (m_tiles == 3) return body(GroupedKernel<kDType, kKernel, kGroupWidth, 3>{});
  return body(GroupedKernel<kDType, kKernel, kGroupWidth, 4>{});
}

template <DType kDType, class Body>
auto with_filter(const Problem& q, int m_tiles, Body&& body) {
  if (q.kernel_size == 3) return q.group_width == 8 ? with_m_tiles<kDType, 3, 8>(m_tiles, body) : with_m_tiles<kDType, 3, 16>(m_tiles, body);
  return q.group_width == 8 ? with_m_tiles<kDType, 5, 8>(m_tiles, body) : with_m_tiles<kDType, 5, 16>(m_tiles, body);
}

// Calls `body` with the problem's kernel.
template <class Body>
auto with_kernel(const Problem& q, int m_tiles, Body&& body) {
  if (q.dtype == DType::kHalf) return with_filter<DType::kHalf>(q, m_tiles, body);
  return with_filter<DType::kBFloat16>(q, m_tiles, body);
}

}  // namespace

int grouped_launch(const Problem& q, const Tensors& t, const GroupedPlan& plan, void* a, bool dependent, cudaStream_t stream,
                   const ConvNormExtras& extras) {
  GroupedParams p{};
  p.x = t.x, p.weight = t.conv_weight, p.bias = t.conv_bias, p.norm_weight = t.norm_weight, p.norm_bias = t.norm_bias, p.a = a;
  p.residual = extras.residual, p.rstd = extras.rstd;
  p.eps = t.eps, p.has_norm = q.has_norm;
  p.batch = static_cast<int>(q.batch), p.height = static_cast<int>(q.height), p.width = static_cast<int>(q.width);
  p.channels = q.channels;
  p.plan = plan;
  p.layout = grouped_layout(plan.tile, q.channels, q.kernel_size);
  return with_kernel(q, plan.tile.m_tiles, [&](auto kernel) { return kernel.launch(p, dependent, stream); });
}

const void* grouped_pointer(const Problem& q, const GroupedPlan& plan) {
  return with_kernel(q, plan.tile.m_tiles, [](auto kernel) { return kernel.pointer(); });
}

}  // namespace convfirst::block_fusion::sm90
