// Runs Winograd's fused Hopper kernel on a CPU: fibers for threads, the library's own tensor maps read by loads in C++. Compiled with
// -Dsm90=sm80, since the emulation's shared memory lives in a namespace of that name.
#include "../engine.h"
#include "winograd/fused_half_sm90.cu"
#include "winograd/fused_bfloat16_sm90.cu"

using namespace convfirst::winograd;

namespace {

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                      const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill) {
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_64B || reinterpret_cast<uintptr_t>(data) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  auto* m = new emulation::TensorMap{};
  m->rank = rank, m->data = static_cast<const char*>(data), m->row_bytes = 64;
  for (cuuint32_t i = 0; i < rank; ++i) {
    m->sizes[i] = sizes[i], m->strides[i] = i == 0 ? 2 : strides[i - 1], m->box[i] = box[i];
    if (sizes[i] == 0 || (i > 0 && m->strides[i] % 16 != 0)) return CUDA_ERROR_INVALID_VALUE;
  }
  std::memcpy(map, &m, sizeof(m));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
  *entry = reinterpret_cast<void*>(&encode_tiled), *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// 0: done. Products at once, or as late as the waits allow.
extern "C" int run(const Problem* problem, const Tensors* tensors, int multiprocessors, int at_once, int backwards) {
  emulation::copies_at_once = at_once, emulation::backwards = backwards;
  const sm90::FusedPlan plan = sm90::plan_fused(*problem, multiprocessors);
  return (problem->dtype == DType::kHalf ? sm90::launch_fused_half : sm90::launch_fused_bfloat16)(*problem, *tensors, plan, nullptr);
}

// Slices, blocks, groups and grid of the plan.
extern "C" void plan(const Problem* problem, int multiprocessors, int* numbers) {
  const sm90::FusedPlan p = sm90::plan_fused(*problem, multiprocessors);
  for (const int n : {p.slices, p.blocks, p.groups, p.grid}) *numbers++ = n;
}
