// Runs conv_norm_fwd_sm90 on a CPU: fibers for threads, the blocks of a cluster side by side. Compiled with -Dsm90=sm80, since the
// emulation's shared memory lives in a namespace of that name.
#include "../cluster_engine.h"

#include "block_fusion/conv_norm_fwd_sm90.cuh"
#include "block_fusion/conv_norm_sm90.cpp"

#define with_kernel with_grouped_kernel
#include "block_fusion/grouped_conv_norm_fwd_sm90.cuh"
#include "block_fusion/grouped_conv_norm_sm90.cpp"
#undef with_kernel

#include "block_fusion/image_conv_norm_fwd_sm90.cuh"
#include "block_fusion/image_conv_norm_sm90.cpp"

namespace convfirst::block_fusion::sm90 {

template <DType kDType, bool kNarrow>
int ConvNormKernel<kDType, kNarrow>::launch(const ConvNormParams& p, bool, cudaStream_t) {
  const ConvNormTile& t = p.plan.tile;
  const emulation::TensorMap map{static_cast<const char*>(p.x),
                                 {p.channels, p.width, p.height, p.batch},
                                 {kConvNormSlice, t.box_cols, t.box_rows, t.images}};
  CUtensorMap x_map;
  std::memcpy(&x_map, &map, sizeof(map));
  emulation::run_clusters(p.plan.grid(), p.plan.cluster, kConvNormThreads, p.layout.total, [&] {
    conv_norm_fwd_sm90<ConvNormTraits<kDType, kNarrow>>(p, x_map);
  });
  return 0;
}

template <DType kDType, bool kNarrow>
const void* ConvNormKernel<kDType, kNarrow>::pointer() {
  return nullptr;
}

template <DType kDType, int kKernel, int kGroupWidth, int kMTiles>
int GroupedKernel<kDType, kKernel, kGroupWidth, kMTiles>::launch(const GroupedParams& p, bool, cudaStream_t) {
  emulation::run_clusters(p.plan.tiles, 1, p.plan.threads, p.layout.total, [&] {
    grouped_conv_norm_fwd_sm90<GroupedTraits<kDType, kKernel, kGroupWidth, kMTiles>>(p);
  });
  return 0;
}

template <DType kDType, int kKernel, int kGroupWidth, int kMTiles>
const void* GroupedKernel<kDType, kKernel, kGroupWidth, kMTiles>::pointer() {
  return nullptr;
}

template <DType kDType, int kWidth>
int ImageKernel<kDType, kWidth>::launch(const ImageParams& p, const ImagePlan& plan, bool, cudaStream_t) {
  emulation::run_clusters(plan.grid, 1, plan.threads, plan.shared_memory, [&] { image_conv_norm_fwd_sm90<ImageTraits<kDType, kWidth>>(p); });
  return 0;
}

template <DType kDType, int kWidth>
const void* ImageKernel<kDType, kWidth>::pointer() {
  return nullptr;
}

}  // namespace convfirst::block_fusion::sm90

// An image a block; 1, or 0 where the kernel does not cover the problem. extras: of training, or nullptr.
extern "C" int run_images(const convfirst::block_fusion::Problem* problem, const convfirst::block_fusion::Tensors* tensors, void* a,
                          const convfirst::block_fusion::sm90::ConvNormExtras* extras, int backwards) {
  using namespace convfirst::block_fusion::sm90;
  emulation::backwards = backwards;
  ImagePlan plan;
  if (!image_plan(*problem, {90, 132, 232448}, &plan)) return 0;
  return image_launch(*problem, *tensors, plan, a, true, nullptr, extras != nullptr ? *extras : ConvNormExtras{}) == 0;
}

// Plans for a device of that many multiprocessors (few: large tiles, several a cluster; many: small tiles, large clusters) and runs.
// Returns the blocks of a cluster, 0 where the kernel does not cover the problem.
extern "C" int run(const convfirst::block_fusion::Problem* problem, const convfirst::block_fusion::Tensors* tensors, void* a,
                   int multiprocessors, int backwards) {
  using namespace convfirst::block_fusion::sm90;
  emulation::backwards = backwards;
  if (problem->group_width > 1) {
    GroupedPlan plan;
    if (!grouped_plan(*problem, {90, multiprocessors, 232448}, &plan)) return 0;
    return grouped_launch(*problem, *tensors, plan, a, true, nullptr) == 0 ? 1 : 0;
  }
  ConvNormPlan plan;
  if (!conv_norm_plan(*problem, {90, multiprocessors, 232448}, &plan)) return 0;
  return conv_norm_launch(*problem, *tensors, plan, a, true, nullptr) == 0 ? plan.cluster : 0;
}
