// Fills a path's table: which kernel takes a launch, with what grid. A path's source file includes it and calls make_path.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/launch.cuh"
#include "downsample_fwd_mma.cuh"
#include "head_fwd.cuh"
#include "patch_stem_fwd_mma.cuh"
#include "stem_fwd_mma.cuh"
#if defined(CONVFIRST_PATCH_SM90)
#include "downsample_fwd_sm90_wgmma.cuh"
#endif

namespace convfirst::patch {

template <bool kHopper, typename Params>
int start(void (*kernel)(Params), int grid, int threads, int shared_memory, cudaStream_t stream, const Params& p) {
  if constexpr (kHopper) {
    return start_dependent_kernel(kernel, grid, threads, shared_memory, stream, p);
  } else {
    return start_kernel(kernel, grid, threads, shared_memory, stream, p);
  }
}

// Calls function(T{}) for the element type.
template <typename Function>
int with_element(DType dtype, Function function) {
  return dtype == DType::kHalf ? function(__half{}) : function(__nv_bfloat16{});
}

inline int ceil_divide(int a, int b) { return (a + b - 1) / b; }

template <bool kHopper, int kMid>
int launch_stem(const Stem& s, const Device& device, cudaStream_t stream) {
  constexpr StemLayout kLayout = stem_layout(kMid, kHopper);
  StemParams p{};
  p.s = s;
  p.mid_height = (s.x.height - 1) / 2 + 1, p.mid_width = (s.x.width - 1) / 2 + 1;
  p.out_height = (p.mid_height - 1) / 2 + 1, p.out_width = (p.mid_width - 1) / 2 + 1;
  p.tiles_x = ceil_divide(p.out_width, kStemTile);
  p.tiles_image = p.tiles_x * ceil_divide(p.out_height, kStemTile);
  p.tiles = p.tiles_image * s.x.batch;
  p.aligned = s.x.stride_c == 1 && s.x.stride_w == 3 && s.x.width % 8 == 0 && s.x.stride_h % 8 == 0 && s.x.stride_n % 8 == 0 &&
              reinterpret_cast<uintptr_t>(s.x.data) % 16 == 0;
  p.teams = std::min(max_teams(kMid, kHopper), std::max(1, ceil_divide(p.tiles, device.multiprocessors)));
  while (p.teams > 0 && kLayout.end(p.teams) > device.max_shared_memory) --p.teams;
  if (p.teams == 0) return kNotCovered;
  p.crew = kHopper && p.tiles <= device.multiprocessors ? max_teams(kMid, kHopper) : 1;
  const int grid = std::min(device.multiprocessors, ceil_divide(p.tiles, p.teams));
  p.stride = grid * p.teams;
  return with_element(s.dtype, [&](auto element) {
    return start<kHopper>(&sm80::stem_fwd<decltype(element), kMid, kHopper>, grid, p.teams * p.crew * kTeamThreads,
                             kLayout.end(p.teams), stream, p);
  });
}

template <bool kHopper>
int stem(const Stem& s, const Device& device, cudaStream_t stream) {
  switch (s.dim) {
    case 32: return launch_stem<kHopper, 16>(s, device, stream);
    case 64: return launch_stem<kHopper, 32>(s, device, stream);
    case 96: return launch_stem<kHopper, 48>(s, device, stream);
    case 128: return launch_stem<kHopper, 64>(s, device, stream);
    default: return kNotCovered;
  }
}

template <bool kHopper, int kDim>
int launch_patch_stem(const PatchStem& s, const Device& device, cudaStream_t stream) {
  constexpr int kWarps = kPatchThreads / 32;
  const int height = s.x.height / 4, width = s.x.width / 4;
  PatchStemParams p{};
  p.s = s;
  p.pixels = s.x.batch * height * width;
  p.by_image = divider(height * width), p.by_row = divider(width);
  p.aligned = s.x.stride_c == 1 && s.x.stride_w == 3 && s.x.stride_h % 2 == 0 && s.x.stride_n % 2 == 0 &&
              reinterpret_cast<uintptr_t>(s.x.data) % 4 == 0;
  const int grid = std::min(device.multiprocessors * (kDim <= 96 ? 3 : 2), ceil_divide(p.pixels, 16 * kWarps));
  p.warps = grid * kWarps;
  return with_element(s.dtype, [&](auto element) {
    return start<kHopper>(&sm80::patch_stem_fwd<decltype(element), kDim, kHopper>, grid, kPatchThreads, patch_stem_bytes(kDim),
                             stream, p);
  });
}

template <bool kHopper>
int patch_stem(const PatchStem& s, const Device& device, cudaStream_t stream) {
  switch (s.dim) {
    case 48: return launch_patch_stem<kHopper, 48>(s, device, stream);
    case 64: return launch_patch_stem<kHopper, 64>(s, device, stream);
    case 80: return launch_patch_stem<kHopper, 80>(s, device, stream);
    case 96: return launch_patch_stem<kHopper, 96>(s, device, stream);
    case 128: return launch_patch_stem<kHopper, 128>(s, device, stream);
    default: return kNotCovered;
  }
}

template <bool kHopper, int kC>
int launch_downsample(const Downsample& d, const Device& device, cudaStream_t stream) {
  constexpr DownsampleTile kTile = downsample_tile(kC);
  constexpr DownsampleLayout kLayout = downsample_layout(kC);
  if (kLayout.end > device.max_shared_memory) return kNotCovered;
  const int height = d.height / 2, width = d.width / 2;
  DownsampleParams p{};
  p.d = d;
  p.rows = d.batch * height * width;
  p.by_image = divider(height * width), p.by_row = divider(width);
  p.tiles = ceil_divide(p.rows, kTile.rows);
  p.blocks = std::min(device.multiprocessors, p.tiles);
  return with_element(d.dtype, [&](auto element) {
    return start<kHopper>(&sm80::downsample_fwd<decltype(element), kC, kHopper>, p.blocks, kTile.threads(), kLayout.end,
                             stream, p);
  });
}

#if defined(CONVFIRST_PATCH_SM90)
template <int kC>
int launch_hopper_downsample(const Downsample& d, const Device& device, cudaStream_t stream) {
  constexpr HopperDownsampleTile kTile = hopper_downsample_tile(kC);
  constexpr HopperDownsampleLayout kLayout = hopper_downsample_layout(kC);
  const int height = d.height / 2, width = d.width / 2;
  DownsampleParams p{};
  p.d = d;
  p.rows = d.batch * height * width;
  p.by_image = divider(height * width), p.by_row = divider(width);
  p.tiles = ceil_divide(p.rows, 64);
  p.teams = std::min(kTile.teams, ceil_divide(p.tiles, device.multiprocessors));
  p.blocks = std::min(device.multiprocessors, ceil_divide(p.tiles, p.teams));
  return with_element(d.dtype, [&](auto element) {
    return start<true>(&sm90::downsample_fwd_sm90<decltype(element), kC>, p.blocks, p.teams * kTeamThreads,
                       kLayout.end(p.teams, kTile.slots), stream, p);
  });
}
#endif

template <bool kHopper>
int downsample(const Downsample& d, const Device& device, cudaStream_t stream) {
  if (d.columns != 2 * d.channels) return kNotCovered;
#if defined(CONVFIRST_PATCH_SM90)
  switch (d.channels) {
    case 32: return launch_hopper_downsample<32>(d, device, stream);
    case 64: return launch_hopper_downsample<64>(d, device, stream);
    case 96: return launch_hopper_downsample<96>(d, device, stream);
    default: return kNotCovered;
  }
#else
  switch (d.channels) {
    case 32: return launch_downsample<kHopper, 32>(d, device, stream);
    case 64: return launch_downsample<kHopper, 64>(d, device, stream);
    default: return kNotCovered;
  }
#endif
}

template <bool kHopper, int kChunks>
int launch_gather(const Gather& s, cudaStream_t stream) {
  const int height = s.height / 2, width = s.width / 2;
  GatherParams p{};
  p.s = s;
  p.pixels = s.batch * height * width * 4;
  p.by_image = divider(height * width), p.by_row = divider(width);
  const int grid = ceil_divide(p.pixels, sm80::kGatherThreads / 8);
  return with_element(s.dtype, [&](auto element) {
    return start<kHopper>(&sm80::gather_fwd<decltype(element), kChunks, kHopper>, grid, sm80::kGatherThreads, 0, stream, p);
  });
}

template <bool kHopper>
int gather(const Gather& s, const Device&, cudaStream_t stream) {
  if (s.channels % 8 != 0 || s.channels > 768) return kNotCovered;
  if (s.channels <= 128) return launch_gather<kHopper, 2>(s, stream);
  if (s.channels <= 256) return launch_gather<kHopper, 4>(s, stream);
  if (s.channels <= 384) return launch_gather<kHopper, 6>(s, stream);
  return launch_gather<kHopper, 12>(s, stream);
}

template <bool kHopper, int kPieces>
int launch_head(const Head& h, cudaStream_t stream) {
  const int grid = h.batch * ceil_divide(h.classes, sm80::kHeadClasses);
  return with_element(h.dtype, [&](auto element) {
    return start<kHopper>(&sm80::head_fwd<decltype(element), kPieces, kHopper>, grid, sm80::kHeadThreads, 0, stream, h);
  });
}

template <bool kHopper>
int head(const Head& h, const Device&, cudaStream_t stream) {
  switch (h.channels) {
    case 256: return launch_head<kHopper, 1>(h, stream);
    case 512: return launch_head<kHopper, 2>(h, stream);
    case 768: return launch_head<kHopper, 3>(h, stream);
    case 1024: return launch_head<kHopper, 4>(h, stream);
    default: return kNotCovered;
  }
}

template <bool kHopper>
Path make_path(const char* name, int min_capability, int max_capability, bool tested) {
  return {name,
          min_capability,
          max_capability,
          tested,
          &stem<kHopper>,
          &patch_stem<kHopper>,
          &downsample<kHopper>,
          &gather<kHopper>,
          &head<kHopper>};
}

}  // namespace convfirst::patch
