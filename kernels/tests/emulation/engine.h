// Runs blocks of fibers, one after another. Included once, by the file that makes the emulation's library.
#pragma once

#include "common/cuda_on_cpu.h"

namespace convfirst::EMULATED::sm80 {
alignas(1024) unsigned char smem[256 * 1024];
}

namespace emulation {

std::vector<Thread> threads;
std::vector<Warp> warps;
int current, shared_bytes;
bool copies_at_once;
ThreadIndex thread_index;
BlockIndex block_index;

namespace {

constexpr int kStackBytes = 256 * 1024;
constexpr int kTurns = 64;  // of a warp before the next one's: warps drift far apart, as far as barriers let them
ucontext_t scheduler;
std::function<void()> body;
int block_threads, barrier_arrived, barrier_count;
bool backwards;  // the last warp runs first

void fiber() {
  body();
  thread().done = true;
  swapcontext(&thread().context, &scheduler);
}

void prepare(Thread& t) {
  t.done = false;
  t.collectives = 0;
  t.groups.clear();
  t.open.clear();
  t.stack.resize(kStackBytes);
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack.data();
  t.context.uc_stack.ss_size = t.stack.size();
  t.context.uc_link = nullptr;
  makecontext(&t.context, fiber, 0);
}

void run_block() {
  std::memset(smem, 0xff, sizeof(convfirst::EMULATED::sm80::smem));
  barrier_arrived = barrier_count = 0;
  for (Warp& w : warps) w.arrived[0] = w.arrived[1] = 0;
  for (Thread& t : threads) prepare(t);
  const int last = block_threads / 32 - 1;
  while (!std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.done; })) {
    for (int w = 0; w <= last; ++w)
      for (int turn = 0; turn < kTurns; ++turn)
        for (int lane = 0; lane < 32; ++lane) {
          current = backwards ? (last - w) * 32 + 31 - lane : w * 32 + lane;
          if (!thread().done) swapcontext(&scheduler, &thread().context);
        }
  }
}

}  // namespace

// Portable kernels have no clusters, though they share code with kernels that do.
int cluster_rank() { return 0; }
void cluster_arrive() {}
void cluster_wait() {}
const unsigned char* memory_of(int rank) { fail("no such block in the cluster", rank); }

void yield() { swapcontext(&thread().context, &scheduler); }

void syncthreads() {
  const int before = barrier_count;
  if (++barrier_arrived == block_threads) {
    barrier_arrived = 0;
    ++barrier_count;
  }
  while (barrier_count == before) yield();
}

void run(int grid, int block, int shared_memory, std::function<void()> kernel) {
  body = kernel;
  block_threads = block;
  shared_bytes = shared_memory;
  threads.resize(block);
  warps.resize(block / 32);
  for (block_index.x = 0; block_index.x < grid; ++block_index.x) run_block();
}

}  // namespace emulation
