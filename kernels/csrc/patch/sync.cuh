// Barriers of a part of a block, and dependent launches, which a kernel compiled for compute capability 9.0 takes part in.
#pragma once

#include <cstdint>

namespace convfirst::patch {

// Of `threads` threads, whole warps; id 1 to 15.
__device__ __forceinline__ void team_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Everything that earlier kernels of the stream wrote is visible from here on.
template <bool kDependent>
__device__ __forceinline__ void wait_for_inputs() {
  if constexpr (kDependent) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next kernel of the stream may start; it waits for this one's results itself.
template <bool kDependent>
__device__ __forceinline__ void launch_dependents() {
  if constexpr (kDependent) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace convfirst::patch
