// Which stages run in one launch, and the kernel of each.
#include "block_fusion/stage_sm90.h"

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

namespace convfirst::block_fusion::sm90 {
namespace {

template <template <DType, int, Activation> class Traits, int kWidth, class Body>
auto with_traits(const StageProblem& q, Body&& body) {
  const auto with_activation = [&](auto dtype) {
    constexpr DType kDType = decltype(dtype)::value;
    if (q.activation == Activation::kRelu) return body(Traits<kDType, kWidth, Activation::kRelu>{});
    if (q.activation == Activation::kSilu) return body(Traits<kDType, kWidth, Activation::kSilu>{});
    return body(Traits<kDType, kWidth, Activation::kGelu>{});
  };
  if (q.dtype == DType::kHalf) return with_activation(std::integral_constant<DType, DType::kHalf>{});
  return with_activation(std::integral_constant<DType, DType::kBFloat16>{});
}

template <class Body>
auto with_kernel(const StageProblem& q, Body&& body) {
  if (q.channels == 64) return with_traits<StageTraits, 64>(q, body);
  if (q.channels == 128) return with_traits<StageTraits, 128>(q, body);
  if (q.channels == 256) return with_traits<StageTraits, 256>(q, body);
  return with_traits<WideTraits, 512>(q, body);
}

template <class Traits>
int64_t tiles(const StageProblem& q, Traits) {
  return (q.batch * q.height * q.width + Traits::kPixels - 1) / Traits::kPixels;
}

// Asked once of each kernel, width of image and device: how many clusters of 16 fit differs from one H100 to another.
int resident_clusters(const StageProblem& q) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int, int, int64_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [place, fresh] = known.try_emplace({q.device, q.channels, static_cast<int>(q.dtype), static_cast<int>(q.activation), q.width}, 0);
  if (fresh) {
    int clusters = 0;
    const int error =
        with_kernel(q, [&](auto traits) { return StageKernel<decltype(traits)>::resident(static_cast<int>(q.width), &clusters); });
    place->second = error == 0 ? clusters : 0;
  }
  return place->second;
}

}  // namespace

const char* stage_refusal(const StageProblem& q, const Device& device) {
  if (device.capability != 90) return "a stage in one launch runs on compute capability 9.0";
  if (q.channels != 64 && q.channels != 128 && q.channels != 256 && q.channels != 512) {
    return "a stage in one launch has 64, 128, 256 or 512 channels";
  }
  if (q.blocks < 1) return "it has no blocks";
  if (q.batch <= 0 || q.height <= 0 || q.width <= 0) return "it has no pixels";
  const auto fits = with_kernel(q, [&](auto traits) {
    return LatencyLayout<decltype(traits)>::total(static_cast<int>(q.width)) <= device.max_shared_memory;
  });
  if (!fits) return "its images are too wide for shared memory";
  const bool keeps = with_kernel(q, [&](auto traits) {
    using Traits = decltype(traits);
    if constexpr (Traits::kTeam > Traits::kCluster) {
      return tiles(q, traits) * q.blocks * Traits::kWordsOfA <= StageWorkspace::kSet;
    }
    return true;
  });
  if (!keeps) return "its blocks and tiles exchange more than the workspace holds";
  const int64_t clusters = with_kernel(q, [&](auto traits) {
    return tiles(q, traits) * (traits.kTeam / traits.kCluster);
  });
  if (clusters > resident_clusters(q)) return "its tiles do not all run at once, and they wait for one another";
  return nullptr;
}

int64_t stage_workspace(const StageProblem& q) {
  const int64_t pixels = q.batch * q.height * q.width;
  return with_kernel(q, [&](auto traits) {
    using Traits = decltype(traits);
    int64_t within = 0;
    if constexpr (Traits::kTeam > Traits::kCluster) {
      within = tiles(q, traits) * (Traits::kWordsOfP + Traits::kWordsOfSums);
    }
    return StageWorkspace::kHeader + StageWorkspace::words(pixels, q.channels) + within;
  });
}

int launch_stage(const StageProblem& q, const StageTensors& t, cudaStream_t stream) {
  return with_kernel(q, [&](auto traits) { return StageKernel<decltype(traits)>::launch(t, stream); });
}

}  // namespace convfirst::block_fusion::sm90
