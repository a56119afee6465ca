// Stands in for csrc/common/launch.cuh.
#pragma once

#include "sm90.cuh"

namespace emulation {

void run_clusters(int grid, int cluster_size, int block, int shared_memory, std::function<void()> kernel);

}  // namespace emulation

namespace convfirst {

template <typename Kernel, typename... Args>
int start_dependent_clusters(Kernel kernel, int cluster, int grid, int threads, int shared_memory, cudaStream_t, Args... args) {
  if (grid % cluster != 0) emulation::fail("a cluster that is not whole", cluster);
  emulation::grid_size.x = grid;
  emulation::run_clusters(grid, cluster, threads, shared_memory, [&] { kernel(args...); });
  return 0;
}

}  // namespace convfirst
