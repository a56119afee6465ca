// Stands in for csrc/common/grid_sm90.cuh: barriers between the blocks of a cluster.
#pragma once

#include "sm90.cuh"

namespace emulation {

void cluster_arrive();
void cluster_wait();

}  // namespace emulation

namespace convfirst::grid {

inline int cluster_rank() { return emulation::cluster_rank(); }
inline void cluster_barrier() {
  emulation::cluster_arrive();
  emulation::cluster_wait();
}
inline void arrive_at_peer(uint32_t barrier, int rank) { sm90::Barrier::change(barrier, rank, 1, 0); }
inline void wait_for_peer(uint32_t barrier, uint32_t phase) { sm90::Barrier::at(barrier, emulation::cluster_rank()).wait(phase); }

}  // namespace convfirst::grid
