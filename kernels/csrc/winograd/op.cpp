#include "winograd/op.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/runtime.h"
#include "winograd/fused_sm90.h"
#include "winograd/plan.h"

namespace convfirst::winograd {
namespace {

constexpr Checks kChecks{"winograd_conv2d"};
constexpr int64_t kMaxElements = int64_t{1} << 31;

int outputs_of_tile(const std::string& algorithm) {
  if (algorithm == "f2") return 2;
  if (algorithm == "f4") return 4;
  kChecks.refuse("algorithm is '", algorithm, "'; supported are 'f2' and 'f4'");
}

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  kChecks.refuse("activation is '", name, "'; supported are 'none', 'relu', 'silu' and 'gelu'");
}

DType parse_dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: kChecks.refuse(name, " is ", show(tensor.scalar_type()), "; the kernels take torch.float32, torch.float16 and torch.bfloat16");
  }
}

// F(4x4, 3x3) is float32's alone: in 16 bits its error is above the bound.
void check_algorithm(DType dtype, int m) {
  if (dtype != DType::kFloat && m != 2) kChecks.refuse("algorithm is 'f4'; in 16 bits the kernels know 'f2'");
}

Problem check_problem(const Tensor& x, int64_t outputs, int64_t padding, const std::string& activation) {
  if (x.dim() != 4) kChecks.refuse("x has shape ", show(x.sizes()), "; expected [batch, channels, height, width]");
  const DType dtype = parse_dtype("x", x);
  if (padding < 0 || padding > 2) kChecks.refuse("padding is ", padding, "; supported are 0, 1 and 2");
  if (x.numel() >= kMaxElements) {
    kChecks.refuse("x has shape ", show(x.sizes()), " = ", x.numel(), " elements; supported are fewer than 2^31: split the batch");
  }
  const Problem p{static_cast<int>(x.size(0)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)), static_cast<int>(x.size(1)),
                  static_cast<int>(outputs), static_cast<int>(padding), dtype, parse_activation(activation)};
  if (p.out_height() < 1 || p.out_width() < 1) kChecks.refuse("x with padding is smaller than the filter, 3 x 3");
  if (int64_t{p.batch} * p.out_height() * p.out_width() * p.outputs >= kMaxElements) {
    kChecks.refuse("the result has 2^31 elements or more; split the batch");
  }
  kChecks.channels_last("x", x);
  kChecks.alignment("x", x);
  return p;
}

Problem check(const Tensor& x, const Tensor& filter, const MaybeTensor& bias, int64_t outputs, int64_t padding, int m,
              const std::string& activation) {
  const Problem p = check_problem(x, outputs, padding, activation);
  kChecks.weight("filter", filter, x, {int64_t{m + 2} * (m + 2), p.output_pitch(), p.channel_pitch()},
                 "[points, padded outputs, padded channels] of winograd_filter");
  kChecks.vector("bias", bias, x, outputs, "[output channels]");
  return p;
}

// Hopper's fused kernel of 16 bits runs where its path is asked for.
bool takes_hopper() { return has_fused_sm90() && forced_path() == "sm90"; }

void check_fused(const Problem& p, int m, const DeviceInfo& device) {
  if (p.dtype == DType::kFloat) {
    if (device.max_shared_memory >= fused_shared_bytes(m)) return;
    kChecks.refuse("plan 'fused' takes ", fused_shared_bytes(m), " bytes of shared memory; the device has ", device.max_shared_memory);
  }
  if (!has_fused_sm90() || device.capability != 90) kChecks.refuse("plan 'fused' in 16 bits is for compute capability 9.0; the device has ", device.capability);
  if (!sm90::fused_supports(p)) {
    kChecks.refuse("plan 'fused' in 16 bits takes channels and outputs that are multiples of 8 and images of at least 2 columns; they are ", p.channels, ", ",
                   p.outputs, " and ", p.width);
  }
}

int run(const Problem& p, int m, const Plan& plan, const Tensors& tensors, const Tensor& workspace, int multiprocessors, cudaStream_t stream) {
  if (!plan.fused) return run_split(m, p, plan.split, tensors, workspace.mutable_data_ptr(), stream);
  return p.dtype == DType::kFloat ? run_fused(m, p, tensors, stream) : run_fused_sm90(p, tensors, multiprocessors, stream);
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, type, std::nullopt, like.device());
}

}  // namespace

Tensor winograd_filter(const Tensor& weight, const std::string& algorithm, bool rotated) {
  const int m = outputs_of_tile(algorithm);
  kChecks.shape("weight", weight, {-1, -1, 3, 3}, "[output channels, channels, 3, 3]");
  kChecks.cuda("weight", weight);
  const DType dtype = parse_dtype("weight", weight);
  check_algorithm(dtype, m);
  FilterView view{weight.const_data_ptr(), static_cast<int>(weight.size(0)), static_cast<int>(weight.size(1)),
                  weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  if (rotated) {
    const int64_t last = 2 * (view.r_stride + view.s_stride) * weight.element_size();
    view = {static_cast<const char*>(view.weight) + last, view.channels, view.outputs, view.c_stride, view.k_stride, -view.r_stride,
            -view.s_stride};
  }
  const int64_t points = int64_t{m + 2} * (m + 2);
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  make_current(weight.get_device_index());
  const Tensor filter = empty({points, round_up(view.outputs, kOutputGrain), round_up(view.channels, kSlice * 4 / bytes_of(dtype))}, weight.scalar_type(), weight);
  check_cuda(transform_filter(m, dtype, view, filter.mutable_data_ptr(), current_stream(weight.get_device_index())), "winograd_filter",
             "launch");
  return filter;
}

Tensor winograd_conv2d_filtered(const Tensor& x, const Tensor& filter, const MaybeTensor& bias, int64_t outputs, int64_t padding,
                                const std::string& algorithm, const std::string& activation, const std::string& plan) {
  const int m = outputs_of_tile(algorithm);
  const Problem problem = check(x, filter, bias, outputs, padding, m, activation);
  check_algorithm(problem.dtype, m);
  kChecks.cuda("x", x);
  const int index = x.get_device_index();
  const DeviceInfo device = device_info(index);
  const bool hopper = takes_hopper() && device.capability == 90;
  const Plan chosen = plan.empty() ? make_plan(problem, m, device.multiprocessors, device.max_shared_memory, hopper) : parse_plan(plan);
  if (chosen.fused) check_fused(problem, m, device);
  if (!chosen.fused && problem.output_pitch() % chosen.split.block_columns != 0) kChecks.refuse("plan '", plan, "' does not divide ", problem.output_pitch(), " outputs");
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  const int64_t sizes[4] = {problem.batch, problem.outputs, problem.out_height(), problem.out_width()};
  const Tensor y = torch::stable::empty({sizes, 4}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                        torch::headeronly::MemoryFormat::ChannelsLast);
  const Tensor workspace = empty({workspace_bytes(problem, m, chosen)}, ScalarType::Byte, x);
  const Tensors tensors{x.const_data_ptr(), filter.const_data_ptr(), bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                        y.mutable_data_ptr()};
  check_cuda(run(problem, m, chosen, tensors, workspace, device.multiprocessors, current_stream(index)), "winograd_conv2d", "launch");
  return y;
}

Tensor winograd_weight_gradient(const Tensor& x, const Tensor& grad, int64_t padding) {
  const Problem problem = check_problem(x, grad.size(1), padding, "none");
  kChecks.shape("grad", grad, {problem.batch, problem.outputs, problem.out_height(), problem.out_width()},
                "[batch, output channels, height + 2 padding - 2, width + 2 padding - 2]");
  if (x.scalar_type() != ScalarType::Float || grad.scalar_type() != ScalarType::Float) {
    kChecks.refuse("x is ", show(x.scalar_type()), " and grad ", show(grad.scalar_type()), "; the weight's gradient takes torch.float32");
  }
  kChecks.channels_last("grad", grad);
  kChecks.alignment("grad", grad);
  kChecks.same_device("grad", grad, x);
  kChecks.cuda("x", x);
  const int index = x.get_device_index();
  const GradientPlan plan = plan_weight_gradient(problem, device_info(index).multiprocessors);
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  const Tensor result = empty({problem.outputs, problem.channels, 3, 3}, x.scalar_type(), x);
  const Tensor workspace = empty({workspace_bytes(problem, plan)}, ScalarType::Byte, x);
  check_cuda(run_weight_gradient(problem, plan, x.const_data_ptr(), grad.const_data_ptr(), result.mutable_data_ptr(),
                                 workspace.mutable_data_ptr(), current_stream(index)),
             "winograd_weight_gradient", "launch");
  return result;
}

std::string plan_winograd(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t padding,
                          const std::string& dtype, const std::string& algorithm, int64_t multiprocessors, int64_t max_shared_memory) {
  const Problem problem{static_cast<int>(batch), static_cast<int>(height), static_cast<int>(width), static_cast<int>(channels),
                        static_cast<int>(outputs), static_cast<int>(padding), dtype == "float32" ? DType::kFloat : DType::kHalf, Activation::kNone};
  return describe(make_plan(problem, outputs_of_tile(algorithm), static_cast<int>(multiprocessors), static_cast<int>(max_shared_memory),
                            takes_hopper()));
}

}  // namespace convfirst::winograd

// Their schemas are defined in Python (convfirst_kernels/winograd/operators.py), beside those of the operators built on them.
STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) {
  m.impl("winograd_filter", TORCH_BOX(&convfirst::winograd::winograd_filter));
  m.impl("winograd_weight_gradient", TORCH_BOX(&convfirst::winograd::winograd_weight_gradient));
  m.impl("winograd_conv2d_filtered", TORCH_BOX(&convfirst::winograd::winograd_conv2d_filtered));
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CompositeExplicitAutograd, m) {
  m.impl("plan_winograd", TORCH_BOX(&convfirst::winograd::plan_winograd));
}
