// The Hopper downsampling layer as one matrix product, of both element types.
#include "downsample_gemm_sm90.h"

#include "params.h"

namespace convfirst::patch::sm90 {

int launch_downsample_gemm_half(const DownsampleGemm&, const DownsampleGemmPlan&, cudaStream_t);
int launch_downsample_gemm_bfloat16(const DownsampleGemm&, const DownsampleGemmPlan&, cudaStream_t);

int downsample_gemm(const DownsampleGemm& d, const Device& device, cudaStream_t stream) {
  const int64_t pixels = int64_t{d.batch} * (d.height / 2) * (d.width / 2);
  if (!downsample_gemm_supports(d.channels, d.columns) || device.max_shared_memory < direct::sm90::kSharedMemory) return kNotCovered;
  if (d.tile > 0 && !tile_supports(d.columns, d.tile - 1)) return kNotCovered;
  const DownsampleGemmPlan plan =
      d.tile > 0 ? plan_downsample_gemm_tile(pixels, d.channels, d.columns, device.multiprocessors, d.tile - 1)
                 : plan_downsample_gemm(pixels, d.channels, d.columns, device.multiprocessors);
  return d.dtype == DType::kHalf ? launch_downsample_gemm_half(d, plan, stream) : launch_downsample_gemm_bfloat16(d, plan, stream);
}

}  // namespace convfirst::patch::sm90
