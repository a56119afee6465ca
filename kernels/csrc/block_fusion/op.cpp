#include "block_fusion/op.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

#include "block_fusion/plan.h"

// Absent from a torch without CUDA, where no tensor can lead here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace convfirst::block_fusion {
namespace {

struct Path {
  std::mutex mutex;
  std::string value;
};

Path& forced() {
  static Path path{{}, std::getenv("CONVFIRST_KERNELS_PATH") ? std::getenv("CONVFIRST_KERNELS_PATH") : ""};
  return path;
}

std::string forced_path() {
  std::lock_guard<std::mutex> lock(forced().mutex);
  return forced().value;
}

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("conv_first_block: ") + what + ": " + cudaGetErrorString(error));
}

Device query_device(int index) {
  int major = 0, minor = 0;
  Device device{};
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&device.max_shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
             "cudaDeviceGetAttribute");
  device.capability = 10 * major + minor;
  return device;
}

Device device_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(index);
  return found != known.end() ? found->second : known[index] = query_device(index);
}

cudaStream_t current_stream(int index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr || aoti_torch_get_current_cuda_stream(index, &stream) != 0) {
    throw std::runtime_error("conv_first_block: this torch gives no CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
}

const float* pointer(const MaybeTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

Tensors tensors_of(const Arguments& a, const Tensor& y) {
  return Tensors{a.x.const_data_ptr(),
                 a.conv_weight.const_data_ptr(),
                 pointer(a.conv_bias),
                 pointer(a.norm_weight),
                 pointer(a.norm_bias),
                 a.expand_weight.const_data_ptr(),
                 pointer(a.expand_bias),
                 a.project_weight.const_data_ptr(),
                 pointer(a.project_bias),
                 pointer(a.layer_scale),
                 pointer(a.sample_scale),
                 y.mutable_data_ptr(),
                 static_cast<float>(a.eps)};
}

Tensor allocate(torch::headeronly::IntHeaderOnlyArrayRef shape, torch::headeronly::ScalarType dtype, const Tensor& like,
                torch::headeronly::MemoryFormat format) {
  return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format);
}

void launch(const Arguments& arguments, const Problem& problem, const Tensor& y) {
  const int index = arguments.x.get_device_index();
  const Device device = device_of(index);
  const std::string path = forced_path();
  const Choice choice = choose(problem, device, path);
  if (choice.variant == nullptr) {
    throw std::runtime_error("conv_first_block: no kernel variant covers " + describe(problem) + " on compute capability " +
                             std::to_string(device.capability) + (path.empty() ? "" : " on path " + path) +
                             "; convfirst_kernels.explain lists the variants and why each was refused");
  }
  Tensor workspace;
  void* scratch = nullptr;
  if (choice.config.workspace > 0) {
    const int64_t bytes = choice.config.workspace;
    workspace = allocate({&bytes, 1}, torch::headeronly::ScalarType::Byte, arguments.x,
                         torch::headeronly::MemoryFormat::Contiguous);
    scratch = workspace.mutable_data_ptr();
  }
  const int error =
      choice.variant->launch(problem, tensors_of(arguments, y), choice.config, scratch, current_stream(index));
  check_cuda(static_cast<cudaError_t>(error), choice.variant->name);
}

// The library's own CUDA runtime (linked statically) must see the device that torch's guard made current.
void run(const Arguments& arguments, const Problem& problem, const Tensor& y) {
  if (arguments.x.numel() == 0) return;
  check_cuda(cudaSetDevice(arguments.x.get_device_index()), "cudaSetDevice");
  launch(arguments, problem, y);
}

}  // namespace

Tensor conv_first_block(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                        const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Tensor& expand_weight,
                        const MaybeTensor& expand_bias, const Tensor& project_weight, const MaybeTensor& project_bias,
                        const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t group_width,
                        const std::string& activation, double eps, bool has_norm) {
  const Arguments arguments{x,           conv_weight,    conv_bias,    norm_weight, norm_bias,
                            expand_weight, expand_bias,  project_weight, project_bias, layer_scale,
                            sample_scale, group_width,   activation,   eps,         has_norm};
  const Problem problem = check(arguments);
  check_device(arguments);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = allocate(x.sizes(), x.scalar_type(), x, torch::headeronly::MemoryFormat::ChannelsLast);
  run(arguments, problem, y);
  return y;
}

void conv_first_block_out(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                          const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Tensor& expand_weight,
                          const MaybeTensor& expand_bias, const Tensor& project_weight, const MaybeTensor& project_bias,
                          const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t group_width,
                          const std::string& activation, double eps, bool has_norm, Tensor out) {
  const Arguments arguments{x,           conv_weight,    conv_bias,    norm_weight, norm_bias,
                            expand_weight, expand_bias,  project_weight, project_bias, layer_scale,
                            sample_scale, group_width,   activation,   eps,         has_norm};
  const Problem problem = check(arguments);
  check_output(arguments, out);
  check_device(arguments);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  run(arguments, problem, out);
}

std::string conv_first_block_check(const Tensor& x, const Tensor& conv_weight, const MaybeTensor& conv_bias,
                                   const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                                   const Tensor& expand_weight, const MaybeTensor& expand_bias,
                                   const Tensor& project_weight, const MaybeTensor& project_bias,
                                   const MaybeTensor& layer_scale, const MaybeTensor& sample_scale, int64_t group_width,
                                   const std::string& activation, double eps, bool has_norm, const MaybeTensor& out) {
  const Arguments arguments{x,           conv_weight,    conv_bias,    norm_weight, norm_bias,
                            expand_weight, expand_bias,  project_weight, project_bias, layer_scale,
                            sample_scale, group_width,   activation,   eps,         has_norm};
  const Problem problem = check(arguments);
  if (out) check_output(arguments, *out);
  return describe(problem);
}

std::string plan_conv_first_block(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden,
                                  int64_t kernel_size, int64_t group_width, const std::string& dtype,
                                  const std::string& activation, bool has_norm, int64_t capability,
                                  int64_t multiprocessors, int64_t max_shared_memory, const std::string& path) {
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
                        parse_activation(activation),
                        has_norm};
  const Device device{static_cast<int>(capability), static_cast<int>(multiprocessors), static_cast<int>(max_shared_memory)};
  return explain_json(problem, device, path.empty() ? forced_path() : path);
}

std::string force_path(const std::string& path) {
  check_path(path);
  std::lock_guard<std::mutex> lock(forced().mutex);
  std::string former = path;
  former.swap(forced().value);
  return former;
}

}  // namespace convfirst::block_fusion
