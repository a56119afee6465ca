#include "direct/op.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/planner.h"
#include "common/runtime.h"
#include "direct/params.h"
#include "mbconv/op.h"

namespace convfirst::direct {

// Found by the planner through the problem's namespace.
std::string describe(const Problem& p) {
  const char* activations[] = {"none", "relu", "silu", "gelu"};
  const char* directions[] = {"forward", "dgrad", "wgrad"};
  const char* dtypes[] = {"float16", "bfloat16", "float32"};
  std::ostringstream out;
  out << "direct_conv2d " << directions[static_cast<int>(p.direction)] << " " << p.channels << " -> " << p.filters << ", " << p.kernel_h << " x "
      << p.kernel_w << ", stride " << p.stride_h << " x " << p.stride_w << ", padding " << p.pad_h << " x " << p.pad_w << ", dilation "
      << p.dilation_h << " x " << p.dilation_w << " " << dtypes[static_cast<int>(p.dtype)] << " " << activations[static_cast<int>(p.activation)]
      << ", " << p.batch << " x " << p.height << " x " << p.width;
  return out.str();
}

Fields fields(const Problem& p) {
  return {static_cast<int>(p.direction), p.batch, p.height, p.width, p.channels, p.filters, p.kernel_h, p.kernel_w, p.stride_h, p.stride_w,
          p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, static_cast<int>(p.dtype), static_cast<int>(p.activation)};
}

namespace {

constexpr Checks kForwardChecks{"direct_conv2d"}, kDgradChecks{"direct_conv2d_dgrad"}, kWgradChecks{"direct_conv2d_wgrad"};
constexpr int64_t kMaxElements = int64_t{1} << 31;

const Table<Variant>& all_variants() {
  static const Table<Variant> rows = join<Variant>({sm90_variants, sm80_variants});
  return rows;
}

struct Geometry {
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

Activation parse_activation(const Checks& checks, const std::string& name) {
  const char* names[] = {"none", "relu", "silu", "gelu"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  checks.refuse("activation is '", name, "'; supported are 'none', 'relu', 'silu' and 'gelu'");
}

// A dense channels_last tensor of float16, bfloat16 or float32.
void check_image(const Checks& checks, const char* name, const Tensor& x, const char* meaning) {
  if (x.dim() != 4) checks.refuse(name, " has shape ", show(x.sizes()), "; expected 4 dimensions ", meaning);
  const auto type = x.scalar_type();
  if (type != ScalarType::Half && type != ScalarType::BFloat16 && type != ScalarType::Float) {
    checks.refuse(name, " is ", show(type), "; supported are torch.float16, torch.bfloat16 and torch.float32");
  }
  for (int axis = 1; axis < 4; ++axis) {
    if (x.size(axis) < 1) checks.refuse(name, " has shape ", show(x.sizes()), "; only the batch may be empty");
  }
  if (x.numel() >= kMaxElements) {
    checks.refuse(name, " has shape ", show(x.sizes()), " = ", x.numel(), " elements; supported are fewer than 2^31 = ", kMaxElements,
                  ": split the batch");
  }
  checks.channels_last(name, x);
  checks.alignment(name, x);
}

void same_dtype(const Checks& checks, const char* name, const Tensor& tensor, const Tensor& x, const char* of) {
  if (tensor.scalar_type() != x.scalar_type()) {
    checks.refuse(name, " is ", show(tensor.scalar_type()), "; expected ", of, "'s dtype ", show(x.scalar_type()));
  }
  checks.same_device(name, tensor, x);
}

void check_geometry(const Checks& checks, const Geometry& g) {
  const auto positive = [&](const char* name, int64_t h, int64_t w, int64_t least) {
    if (h < least || w < least || h > 32767 || w > 32767) {
      checks.refuse(name, " is (", h, ", ", w, "); both must be at least ", least, " and at most 32767");
    }
  };
  positive("stride", g.stride_h, g.stride_w, 1);
  positive("padding", g.pad_h, g.pad_w, 0);
  positive("dilation", g.dilation_h, g.dilation_w, 1);
}

Problem make_problem(const Checks& checks, Direction direction, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t filters,
                     int64_t kernel_h, int64_t kernel_w, const Geometry& g, ScalarType type, Activation activation) {
  check_geometry(checks, g);
  const auto fits = [&](const char* axis, int64_t size, int64_t kernel, int64_t pad, int64_t dilation) {
    if (size + 2 * pad < dilation * (kernel - 1) + 1) {
      checks.refuse("x's ", axis, " is ", size, " with padding ", pad, "; the filter of ", kernel, " with dilation ", dilation, " needs ",
                    dilation * (kernel - 1) + 1, " in all");
    }
  };
  fits("height", height, kernel_h, g.pad_h, g.dilation_h);
  fits("width", width, kernel_w, g.pad_w, g.dilation_w);
  const auto dtype = type == ScalarType::Half ? DType::kHalf : type == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat;
  const auto narrow = [](int64_t v) { return static_cast<int>(v); };
  const Problem p{direction, batch, narrow(height), narrow(width), narrow(channels), narrow(filters), narrow(kernel_h), narrow(kernel_w),
                  narrow(g.stride_h), narrow(g.stride_w), narrow(g.pad_h), narrow(g.pad_w), narrow(g.dilation_h), narrow(g.dilation_w), dtype,
                  activation};
  if (p.out_pixels() * filters >= kMaxElements || batch * height * width * channels >= kMaxElements) {
    checks.refuse("the output has ", p.out_pixels() * filters, " and x ", batch * height * width * channels,
                  " elements; supported are fewer than 2^31 = ", kMaxElements, ": split the batch");
  }
  return p;
}

Problem check_forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Geometry& g, const std::string& activation) {
  const Checks& c = kForwardChecks;
  check_image(c, "x", x, "[batch, channels, height, width]");
  check_image(c, "weight", weight, "[filters, channels, kernel height, kernel width]");
  same_dtype(c, "weight", weight, x, "x");
  c.shape("weight", weight, {-1, x.size(1), -1, -1}, "[filters, channels, kernel height, kernel width]; groups other than 1 have no kernel");
  if (weight.size(0) < 1) c.refuse("weight has shape ", show(weight.sizes()), "; there must be at least one filter");
  c.vector("bias", bias, x, weight.size(0), "[filters]");
  return make_problem(c, Direction::kForward, x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), weight.size(2), weight.size(3), g,
                      x.scalar_type(), parse_activation(c, activation));
}

void check_output_gradient(const Checks& c, const Tensor& grad, const Problem& p) {
  c.shape("grad", grad, {p.batch, p.filters, p.out_h(), p.out_w()}, "the output's shape");
}

void launch(const Checks& checks, const Problem& problem, Tensors tensors, const Tensor& on) {
  const int index = on.get_device_index();
  make_current(index);
  const DeviceInfo info = device_info(index);
  const std::string path = forced_path();
  check_path(path);
  const Device device{info.capability, info.multiprocessors, info.max_shared_memory};
  const auto choice = choose(all_variants(), problem, device, path);
  if (choice.variant == nullptr) {
    checks.refuse("no kernel variant covers ", describe(problem), " on compute capability ", info.capability,
                  path.empty() ? "" : " on path " + path);
  }
  Tensor workspace;
  void* scratch = nullptr;
  if (choice.config.workspace > 0) {
    const int64_t bytes = choice.config.workspace;
    workspace = torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, on.device());
    scratch = workspace.mutable_data_ptr();
  }
  check_cuda(choice.variant->launch(problem, tensors, choice.config, scratch, current_stream(index)), checks.op, choice.variant->name);
}

Tensor empty_channels_last(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  const int64_t sizes[4] = {n, c, h, w};
  return torch::stable::empty({sizes, 4}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace

void check_path(const std::string& path) {
  if (!names_variant(all_variants(), path)) mbconv::check_path(path);
}

Tensor direct_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                     int64_t pad_w, int64_t dilation_h, int64_t dilation_w, const std::string& activation) {
  const Problem p = check_forward(x, weight, bias, {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w}, activation);
  kForwardChecks.cuda("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_channels_last(p.batch, p.filters, p.out_h(), p.out_w(), x);
  if (p.batch > 0) {
    const float* vector = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    launch(kForwardChecks, p, {x.const_data_ptr(), weight.const_data_ptr(), nullptr, vector, y.mutable_data_ptr()}, x);
  }
  return y;
}

std::string direct_conv2d_check(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t stride_h, int64_t stride_w,
                                int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, const std::string& activation) {
  return describe(check_forward(x, weight, bias, {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w}, activation));
}

Tensor direct_conv2d_dgrad(const Tensor& grad, const Tensor& weight, int64_t height, int64_t width, int64_t stride_h, int64_t stride_w,
                           int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
  const Checks& c = kDgradChecks;
  check_image(c, "grad", grad, "[batch, filters, height, width]");
  check_image(c, "weight", weight, "[filters, channels, kernel height, kernel width]");
  same_dtype(c, "weight", weight, grad, "grad");
  const Problem p = make_problem(c, Direction::kDgrad, grad.size(0), height, width, weight.size(1), weight.size(0), weight.size(2),
                                 weight.size(3), {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w}, grad.scalar_type(), Activation::kNone);
  check_output_gradient(c, grad, p);
  c.cuda("grad", grad);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const Tensor result = empty_channels_last(p.batch, p.channels, height, width, grad);
  if (p.batch > 0) launch(c, p, {nullptr, weight.const_data_ptr(), grad.const_data_ptr(), nullptr, result.mutable_data_ptr()}, grad);
  return result;
}

Tensor direct_conv2d_wgrad(const Tensor& grad, const Tensor& x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                           int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
  const Checks& c = kWgradChecks;
  check_image(c, "grad", grad, "[batch, filters, height, width]");
  check_image(c, "x", x, "[batch, channels, height, width]");
  same_dtype(c, "grad", grad, x, "x");
  const Problem p = make_problem(c, Direction::kWgrad, x.size(0), x.size(2), x.size(3), x.size(1), grad.size(1), kernel_h, kernel_w,
                                 {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w}, x.scalar_type(), Activation::kNone);
  check_output_gradient(c, grad, p);
  c.cuda("x", x);
  if (p.batch == 0) c.refuse("x has shape ", show(x.sizes()), "; the batch must not be empty");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor result = empty_channels_last(p.filters, p.channels, kernel_h, kernel_w, x);
  launch(c, p, {x.const_data_ptr(), nullptr, grad.const_data_ptr(), nullptr, result.mutable_data_ptr()}, x);
  return result;
}

std::string plan_direct_conv2d(const std::string& direction, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t filters,
                               int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                               int64_t dilation_h, int64_t dilation_w, const std::string& dtype, const std::string& activation,
                               int64_t capability, int64_t multiprocessors, int64_t max_shared_memory, const std::string& path) {
  const Checks checks{"plan"};
  const auto type = dtype == "float16" ? ScalarType::Half : dtype == "bfloat16" ? ScalarType::BFloat16 : ScalarType::Float;
  if (dtype != "float16" && dtype != "bfloat16" && dtype != "float32") {
    checks.refuse("dtype is '", dtype, "'; supported are 'float16', 'bfloat16' and 'float32'");
  }
  if (direction != "forward" && direction != "dgrad" && direction != "wgrad") {
    checks.refuse("direction is '", direction, "'; supported are 'forward', 'dgrad' and 'wgrad'");
  }
  const auto which = direction == "forward" ? Direction::kForward : direction == "dgrad" ? Direction::kDgrad : Direction::kWgrad;
  const Problem problem = make_problem(checks, which, batch, height, width, channels, filters, kernel_h, kernel_w,
                                       {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w}, type, parse_activation(checks, activation));
  const Device device{static_cast<int>(capability), static_cast<int>(multiprocessors), static_cast<int>(max_shared_memory)};
  const std::string restriction = path.empty() ? forced_path() : path;
  check_path(restriction);
  return explain_json(all_variants(), problem, device, restriction);
}

}  // namespace convfirst::direct

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) {
  m.impl("direct_conv2d", TORCH_BOX(&convfirst::direct::direct_conv2d));
  m.impl("direct_conv2d_dgrad", TORCH_BOX(&convfirst::direct::direct_conv2d_dgrad));
  m.impl("direct_conv2d_wgrad", TORCH_BOX(&convfirst::direct::direct_conv2d_wgrad));
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CompositeExplicitAutograd, m) {
  m.impl("direct_conv2d_check", TORCH_BOX(&convfirst::direct::direct_conv2d_check));
  m.impl("plan_direct_conv2d", TORCH_BOX(&convfirst::direct::plan_direct_conv2d));
}
