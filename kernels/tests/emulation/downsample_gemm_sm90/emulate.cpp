// Runs downsample_gemm_sm90 on a CPU: fibers for threads, the library's own tensor maps read by loads in C++. Compiled with -Dsm90=sm80,
// since the emulation's shared memory lives in a namespace of that name.
#include "../engine.h"
#include "patch/launch_downsample_gemm_sm90.cuh"
#include "patch/downsample_gemm_sm90.cpp"

namespace {

emulation::TensorMap* start_map(CUtensorMap* map, int rank, void* data, const cuuint64_t* sizes, const cuuint64_t* strides) {
  auto* m = new emulation::TensorMap{};
  m->rank = rank, m->data = static_cast<const char*>(data);
  for (int i = 0; i < rank; ++i) m->sizes[i] = sizes[i], m->strides[i] = i == 0 ? 2 : strides[i - 1];
  std::memcpy(map, &m, sizeof(m));
  return m;
}

CUresult encode_im2col(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                       const int* lower, const int* upper, cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps,
                       CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  emulation::TensorMap* m = start_map(map, rank, data, sizes, strides);
  m->channels = channels, m->pixels = pixels;
  for (int i = 0; i < 2; ++i) m->lower[i] = lower[i], m->upper[i] = upper[i], m->steps[i] = steps[i + 1];
  return CUDA_SUCCESS;
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                      const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill) {
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  emulation::TensorMap* m = start_map(map, rank, data, sizes, strides);
  for (cuuint32_t i = 0; i < rank; ++i) m->box[i] = box[i];
  m->row_bytes = 128;
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
  *entry = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 ? reinterpret_cast<void*>(&encode_tiled) : reinterpret_cast<void*>(&encode_im2col);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

namespace convfirst::patch::sm90 {

int launch_downsample_gemm_half(const DownsampleGemm& d, const DownsampleGemmPlan& plan, cudaStream_t stream) {
  return launch_downsample_gemm_tile<direct::DType::kHalf>(d, plan, stream);
}
int launch_downsample_gemm_bfloat16(const DownsampleGemm& d, const DownsampleGemmPlan& plan, cudaStream_t stream) {
  return launch_downsample_gemm_tile<direct::DType::kBFloat16>(d, plan, stream);
}

}  // namespace convfirst::patch::sm90

// 0: done; else not covered. Products at once, or as late as the waits allow.
extern "C" int run(const convfirst::patch::DownsampleGemm* arguments, int multiprocessors, int at_once, int backwards) {
  emulation::copies_at_once = at_once, emulation::backwards = backwards;
  return convfirst::patch::sm90::downsample_gemm(*arguments, {multiprocessors, 232448}, nullptr);
}
