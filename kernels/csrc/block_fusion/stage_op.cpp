#include "block_fusion/stage_op.h"

#include <torch/csrc/stable/library.h>

namespace convfirst::block_fusion {
namespace {

constexpr Checks kChecks{"conv_first_stage"};

}  // namespace

int64_t check_stage(const StageArguments& a) {
  kChecks.image("x", a.x);
  const int64_t channels = (a.down_weight ? 2 : 1) * a.x.size(1), hidden = 4 * channels, blocks = a.conv_weight.dim() > 0 ? a.conv_weight.size(0) : 0;
  kChecks.weight("conv_weight", a.conv_weight, a.x, {blocks, 9, channels, 8}, "[blocks, taps, channels, group width]");
  kChecks.weight("expand_weight", a.expand_weight, a.x, {blocks, hidden, channels}, "[blocks, 4 channels, channels]");
  kChecks.weight("project_weight", a.project_weight, a.x, {blocks, channels, hidden}, "[blocks, channels, 4 channels]");
  kChecks.vector("conv_bias", a.conv_bias, a.x, blocks * channels, "[blocks x channels]");
  kChecks.vector("expand_vectors", a.expand_vectors, a.x, blocks * hidden * 2, "[blocks x 4 channels x 2]");
  kChecks.vector("project_vectors", a.project_vectors, a.x, blocks * channels * 2, "[blocks x channels x 2]");
  if (a.down_weight.has_value() != a.down_vectors.has_value()) kChecks.refuse("down_weight and down_vectors come together or not at all");
  if (a.down_weight) {
    kChecks.weight("down_weight", *a.down_weight, a.x, {channels, 4 * a.x.size(1)}, "[channels, 2 x 2 x channels of x]");
    kChecks.vector("down_vectors", a.down_vectors, a.x, channels * 5, "[channels x 5]");
  }
  kChecks.same_device("workspace", a.workspace, a.x);
  kChecks.alignment("workspace", a.workspace);
  return blocks;
}

}  // namespace convfirst::block_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(convfirst, m) {
  m.def("conv_first_stage(Tensor x, Tensor conv_weight, Tensor conv_bias, Tensor expand_weight, Tensor expand_vectors, "
        "Tensor project_weight, Tensor project_vectors, Tensor? down_weight, Tensor? down_vectors, Tensor(a!) workspace, str activation, "
        "float eps, bool has_norm, float down_eps, bool down_norm) -> Tensor");
  m.def("conv_first_stage_refusal(int batch, int height, int width, int channels, int blocks, str dtype, str activation, int index) -> str");
}
