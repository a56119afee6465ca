#include "mbconv/op.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "block_fusion/plan.h"
#include "common/planner.h"
#include "common/runtime.h"
#include "mbconv/params.h"

namespace convfirst::mbconv {

// Found by the planner through the problem's namespace.
std::string describe(const Problem& p) {
  const char* activations[] = {"relu", "silu", "gelu"};
  std::ostringstream out;
  out << "mbconv C=" << p.channels << " hidden=" << p.hidden << " k=" << p.kernel_size << " group_width=" << p.group_width
      << " " << (p.dtype == DType::kHalf ? "float16" : "bfloat16") << " " << activations[static_cast<int>(p.activation)]
      << ", " << p.batch << " x " << p.height << " x " << p.width;
  return out.str();
}

Fields fields(const Problem& p) {
  return {p.batch,       p.height,      p.width,
          p.channels,    p.hidden,      p.kernel_size,
          p.group_width, static_cast<int>(p.dtype), static_cast<int>(p.activation)};
}

namespace {

constexpr Checks kChecks{"mbconv_block"};
constexpr int kWidestTried = 1024;

const Table<Variant>& all_variants() {
  static const Table<Variant> rows = join<Variant>({sm90_variants, sm80_variants});
  return rows;
}

struct Arguments {
  const Tensor& x;
  const Tensor& expand_weight;
  const MaybeTensor& expand_bias;
  const Tensor& conv_weight;
  const MaybeTensor& conv_bias;
  const Tensor& project_weight;
  const MaybeTensor& project_bias;
  const MaybeTensor& sample_scale;
  int64_t group_width;
  const std::string& activation;
};

Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  kChecks.refuse("activation is '", name, "'; supported are 'relu', 'silu' and 'gelu'");
}

Problem check(const Arguments& a) {
  kChecks.image("x", a.x);
  const int64_t batch = a.x.size(0), channels = a.x.size(1);
  kChecks.shape("expand_weight", a.expand_weight, {-1, channels}, "[hidden, channels]");
  const int64_t hidden = a.expand_weight.size(0);
  if (hidden < 16 || hidden % 16 != 0) {
    kChecks.refuse("expand_weight has ", hidden, " hidden units; supported are multiples of 16");
  }
  if (a.group_width != 1 && a.group_width != 8 && a.group_width != 16) {
    kChecks.refuse("group_width is ", a.group_width, "; supported are 1 (depthwise), 8 and 16");
  }
  kChecks.weight("expand_weight", a.expand_weight, a.x, {hidden, channels}, "[hidden, channels]");
  kChecks.weight("conv_weight", a.conv_weight, a.x, {9, hidden, a.group_width}, "[9 taps, hidden, group_width]");
  kChecks.weight("project_weight", a.project_weight, a.x, {channels, hidden}, "[channels, hidden]");
  kChecks.vector("expand_bias", a.expand_bias, a.x, hidden, "[hidden]");
  kChecks.vector("conv_bias", a.conv_bias, a.x, hidden, "[hidden]");
  kChecks.vector("project_bias", a.project_bias, a.x, channels, "[channels]");
  kChecks.vector("sample_scale", a.sample_scale, a.x, batch, "[batch]");
  return Problem{batch,
                 a.x.size(2),
                 a.x.size(3),
                 static_cast<int>(channels),
                 static_cast<int>(hidden),
                 3,
                 static_cast<int>(a.group_width),
                 a.x.scalar_type() == ScalarType::Half ? DType::kHalf : DType::kBFloat16,
                 parse_activation(a.activation)};
}

const float* pointer(const MaybeTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// The most channels that a problem like this one may have on the device.
int widest(Problem problem, const Device& device, const std::string& path) {
  int most = 0;
  for (problem.channels = 8; problem.channels <= kWidestTried; problem.channels += 8) {
    if (cheapest(candidates(all_variants(), problem, device, path)) != nullptr) most = problem.channels;
  }
  return most;
}

void launch(const Arguments& a, const Problem& problem, const Tensor& y) {
  const int index = a.x.get_device_index();
  const DeviceInfo info = device_info(index);
  const std::string path = forced_path();
  check_path(path);
  const Device device{info.capability, info.multiprocessors, info.max_shared_memory};
  const auto choice = choose(all_variants(), problem, device, path);
  if (choice.variant == nullptr) {
    kChecks.refuse("no kernel variant covers ", describe(problem), " on compute capability ", info.capability,
                   path.empty() ? "" : " on path " + path,
                   "; with ", problem.hidden, " hidden units the kernels take up to ", widest(problem, device, path), " channels there");
  }
  Tensor workspace;
  void* scratch = nullptr;
  if (choice.config.workspace > 0) {
    const int64_t bytes = choice.config.workspace;
    workspace = torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, a.x.device());
    scratch = workspace.mutable_data_ptr();
  }
  const Tensors tensors{a.x.const_data_ptr(),
                        a.expand_weight.const_data_ptr(),
                        pointer(a.expand_bias),
                        a.conv_weight.const_data_ptr(),
                        pointer(a.conv_bias),
                        a.project_weight.const_data_ptr(),
                        pointer(a.project_bias),
                        pointer(a.sample_scale),
                        y.mutable_data_ptr()};
  check_cuda(choice.variant->launch(problem, tensors, choice.config, scratch, current_stream(index)), "mbconv_block",
             choice.variant->name);
}

}  // namespace

void check_path(const std::string& path) {
  if (!names_variant(all_variants(), path)) block_fusion::check_path(path);
}

Tensor mbconv_block(const Tensor& x, const Tensor& expand_weight, const MaybeTensor& expand_bias, const Tensor& conv_weight,
                    const MaybeTensor& conv_bias, const Tensor& project_weight, const MaybeTensor& project_bias,
                    const MaybeTensor& sample_scale, int64_t group_width, const std::string& activation) {
  const Arguments arguments{x, expand_weight, expand_bias, conv_weight, conv_bias, project_weight, project_bias, sample_scale,
                            group_width, activation};
  const Problem problem = check(arguments);
  kChecks.cuda("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                        torch::headeronly::MemoryFormat::ChannelsLast);
  if (x.numel() != 0) {
    make_current(x.get_device_index());
    launch(arguments, problem, y);
  }
  return y;
}

std::string mbconv_block_check(const Tensor& x, const Tensor& expand_weight, const MaybeTensor& expand_bias,
                               const Tensor& conv_weight, const MaybeTensor& conv_bias, const Tensor& project_weight,
                               const MaybeTensor& project_bias, const MaybeTensor& sample_scale, int64_t group_width,
                               const std::string& activation) {
  return describe(check({x, expand_weight, expand_bias, conv_weight, conv_bias, project_weight, project_bias, sample_scale,
                         group_width, activation}));
}

std::string plan_mbconv_block(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden,
                              int64_t kernel_size, int64_t group_width, const std::string& dtype,
                              const std::string& activation, int64_t capability, int64_t multiprocessors,
                              int64_t max_shared_memory, const std::string& path) {
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
                        parse_activation(activation)};
  const Device device{static_cast<int>(capability), static_cast<int>(multiprocessors), static_cast<int>(max_shared_memory)};
  const std::string restriction = path.empty() ? forced_path() : path;
  check_path(restriction);
  return explain_json(all_variants(), problem, device, restriction);
}

}  // namespace convfirst::mbconv
