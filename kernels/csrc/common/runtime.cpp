#include "common/runtime.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

// Absent from a torch without CUDA, where no tensor can lead to a call.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace convfirst {
namespace {

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, index), "convfirst_kernels", "cudaDeviceGetAttribute");
  return value;
}

struct Path {
  std::mutex mutex;
  std::string value;
};

Path& path() {
  static Path instance{{}, std::getenv("CONVFIRST_KERNELS_PATH") ? std::getenv("CONVFIRST_KERNELS_PATH") : ""};
  return instance;
}

}  // namespace

void check_cuda(int error, const char* op, const char* what) {
  if (error == cudaSuccess) return;
  const char* message = cudaGetErrorString(static_cast<cudaError_t>(error));
  throw std::runtime_error(std::string(op) + ": " + what + ": " + message);
}

DeviceInfo device_info(int index) {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;
  std::lock_guard<std::mutex> lock(mutex);
  if (auto found = known.find(index); found != known.end()) return found->second;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  return known[index] = DeviceInfo{10 * major + minor, attribute(cudaDevAttrMultiProcessorCount, index),
                                   attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
}

cudaStream_t current_stream(int index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr || aoti_torch_get_current_cuda_stream(index, &stream) != 0) {
    throw std::runtime_error("convfirst_kernels: this torch gives no CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
}

void make_current(int index) { check_cuda(cudaSetDevice(index), "convfirst_kernels", "cudaSetDevice"); }

std::string forced_path() {
  std::lock_guard<std::mutex> lock(path().mutex);
  return path().value;
}

std::string exchange_forced_path(const std::string& value) {
  std::lock_guard<std::mutex> lock(path().mutex);
  std::string former = value;
  former.swap(path().value);
  return former;
}

}  // namespace convfirst
