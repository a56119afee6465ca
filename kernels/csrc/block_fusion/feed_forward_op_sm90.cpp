// torch.ops.convfirst.feed_forward: what follows conv_norm on the split path, for a forward pass that keeps the normalised convolution.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "block_fusion/check.h"
#include "block_fusion/split_sm90.h"
#include "common/runtime.h"

namespace convfirst::block_fusion {
namespace {

constexpr Checks kChecks{"feed_forward"};

// The second half of a row of the planner's table.
struct FeedForwardRow {
  bool (*supports)(const Problem&, const Device&);
  Config (*configure)(const Problem&, const Device&);
  double (*cost)(const Problem&, const Device&, const Config&);
  int (*launch)(const Problem&, const Tensors&, const Config&, const void* a, void* hidden, cudaStream_t);
  bool stores_hidden;
};

template <class Row>
constexpr FeedForwardRow feed_forward_row(bool stores_hidden = false) {
  return {Row::supports, Row::configure, Row::cost, Row::launch_second, stores_hidden};
}

constexpr FeedForwardRow kRows[] = {
    feed_forward_row<sm90::SplitRow<64>>(),  feed_forward_row<sm90::SplitRow<96>>(),  feed_forward_row<sm90::SplitRow<128>>(),
    feed_forward_row<sm90::SplitRow<192>>(), feed_forward_row<sm90::SplitRow<256>>(), feed_forward_row<sm90::SplitLinearRow>(true),
};

// The cheapest row, and its configuration; nullptr where none covers the problem.
const FeedForwardRow* choose_row(const Problem& q, const Device& device, Config* config) {
  const FeedForwardRow* best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const FeedForwardRow& row : kRows) {
    if (!row.supports(q, device)) continue;
    const Config c = row.configure(q, device);
    if (c.shared_memory > device.max_shared_memory) continue;
    const double cost = row.cost(q, device, c);
    if (cost < least) best = &row, least = cost, *config = c;
  }
  return best;
}

const float* pointer(const MaybeTensor& tensor) { return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr; }

Tensor feed_forward(const Tensor& a, const Tensor& x, const Tensor& expand_weight, const MaybeTensor& expand_bias, const Tensor& project_weight,
                    const MaybeTensor& project_bias, const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t kernel_size,
                    int64_t group_width, const std::string& activation) {
  const Checks& c = kChecks;
  c.image("x", x);
  c.image("a", a);
  c.same_device("a", a, x);
  c.shape("a", a, {x.size(0), x.size(1), x.size(2), x.size(3)}, "x's shape");
  if (a.scalar_type() != x.scalar_type()) c.refuse("a is ", show(a.scalar_type()), "; expected x's dtype ", show(x.scalar_type()));
  const int64_t channels = x.size(1);
  c.weight("expand_weight", expand_weight, x, {-1, channels}, "[hidden, channels]");
  const int64_t hidden = expand_weight.size(0);
  if (hidden < 16 || hidden % 16 != 0) c.refuse("expand_weight has ", hidden, " hidden units; supported are multiples of 16");
  c.weight("project_weight", project_weight, x, {channels, hidden}, "[channels, hidden]");
  c.vector("expand_bias", expand_bias, x, hidden, "[hidden]");
  c.vector("project_bias", project_bias, x, channels, "[channels]");
  c.vector("layer_scale", layer_scale, x, channels, "[channels]");
  c.vector("sample_scale", sample_scale, x, x.size(0), "[batch]");
  c.cuda("x", x);
  const DType dtype = x.scalar_type() == ScalarType::Half ? DType::kHalf : DType::kBFloat16;
  const Problem q{x.size(0),
                  x.size(2),
                  x.size(3),
                  static_cast<int>(channels),
                  static_cast<int>(hidden),
                  static_cast<int>(kernel_size),
                  static_cast<int>(group_width),
                  dtype,
                  parse_activation(activation),
                  false};
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Tensor y = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                        torch::headeronly::MemoryFormat::ChannelsLast);
  if (x.numel() == 0) return y;
  make_current(index);
  const DeviceInfo info = device_info(index);
  if (info.capability != 90) c.refuse("x is on a device of compute capability ", info.capability, "; supported is 90");
  const Device device{info.capability, info.multiprocessors, info.max_shared_memory};
  Config config{};
  const FeedForwardRow* row = choose_row(q, device, &config);
  if (row == nullptr) c.refuse("no kernel covers ", channels, " channels with ", hidden, " hidden units");
  Tensors t{};
  t.x = x.const_data_ptr(), t.y = y.mutable_data_ptr();
  t.expand_weight = expand_weight.const_data_ptr(), t.expand_bias = pointer(expand_bias);
  t.project_weight = project_weight.const_data_ptr(), t.project_bias = pointer(project_bias);
  t.layer_scale = pointer(layer_scale), t.sample_scale = pointer(sample_scale);
  const int64_t bytes = row->stores_hidden ? sm90::pixels_of(q) * hidden * 2 : 0;
  const Tensor workspace = torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, x.device());
  check_cuda(row->launch(q, t, config, a.const_data_ptr(), bytes > 0 ? workspace.mutable_data_ptr() : nullptr, current_stream(index)),
             "feed_forward", "launch");
  return y;
}

}  // namespace
}  // namespace convfirst::block_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(convfirst, m) {
  m.def("feed_forward(Tensor a, Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, Tensor? project_bias, "
        "Tensor? layer_scale, Tensor? sample_scale, int kernel_size, int group_width, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) { m.impl("feed_forward", TORCH_BOX(&convfirst::block_fusion::feed_forward)); }
