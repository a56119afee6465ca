// What operators ask of the CUDA runtime and of PyTorch's streams.
#pragma once

#include <string>

typedef struct CUstream_st* cudaStream_t;

namespace convfirst {

struct DeviceInfo {
  int capability;  // 10 * major + minor
  int multiprocessors;
  int max_shared_memory;  // bytes a block may opt in to
};

// Throws std::runtime_error "<op>: <what>: <CUDA's message>" unless `error`, a cudaError_t, is success.
void check_cuda(int error, const char* op, const char* what);

// Asked once of each device.
DeviceInfo device_info(int index);

// PyTorch's current stream on the device.
cudaStream_t current_stream(int index);

// Shows this library's CUDA runtime, linked statically, the device that torch's guard made current.
void make_current(int index);

// The path that every launch is restricted to, "" for none; starts as $CONVFIRST_KERNELS_PATH.
std::string forced_path();

// Sets it and returns the former one.
std::string exchange_forced_path(const std::string& path);

}  // namespace convfirst
