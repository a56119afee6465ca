// Runs conv_norm_fwd_sm90 on a CPU: fibers for threads, the blocks of a cluster side by side. Compiled with -Dsm90=sm80, since the
// emulation's shared memory lives in a namespace of that name.
#include "common/cuda_on_cpu.h"

namespace convfirst::EMULATED::sm80 {
alignas(1024) unsigned char smem[256 * 1024];
}

namespace emulation {

std::vector<Thread> threads;  // of the whole cluster
std::vector<Warp> warps;
int current, shared_bytes;
bool copies_at_once;
ThreadIndex thread_index;
BlockIndex block_index;

namespace {

constexpr int kStackBytes = 128 * 1024;
constexpr int kTurns = 64;  // of a warp before the next one's: warps drift as far apart as barriers let them
ucontext_t scheduler;
std::function<void()> body;
bool backwards;  // the last warp runs first
int block_threads, running;  // the block whose memory is in smem

struct Arrivals {
  int arrived = 0, completed = 0;
  int arrive(int expected) {  // what `completed` must leave
    const int before = completed;
    if (++arrived == expected) arrived = 0, ++completed;
    return before;
  }
  void wait(int expected) {
    const int before = arrive(expected);
    while (completed == before) yield();
  }
};

struct Block {
  std::vector<unsigned char> memory;  // while another block runs
  Arrivals barrier;
};
std::vector<Block> blocks;
Arrivals cluster;
std::vector<int> cluster_before;  // of each thread that has arrived

void fiber() {
  body();
  thread().done = true;
  swapcontext(&thread().context, &scheduler);
}

void prepare(Thread& t) {
  t.done = false;
  t.collectives = 0;
  t.stack.resize(kStackBytes);
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack.data();
  t.context.uc_stack.ss_size = t.stack.size();
  t.context.uc_link = nullptr;
  makecontext(&t.context, fiber, 0);
}

void switch_to(int block) {
  if (block == running) return;
  std::memcpy(blocks[running].memory.data(), smem, shared_bytes);
  std::memcpy(smem, blocks[block].memory.data(), shared_bytes);
  running = block;
}

void run_warp(int warp) {
  const auto first = threads.begin() + warp * 32;
  if (std::all_of(first, first + 32, [](const Thread& t) { return t.done; })) return;
  switch_to(warp * 32 / block_threads);
  for (int turn = 0; turn < kTurns; ++turn)
    for (int lane = 0; lane < 32; ++lane) {
      current = warp * 32 + (backwards ? 31 - lane : lane);
      if (!thread().done) swapcontext(&scheduler, &thread().context);
    }
}

void run_cluster(int first_block) {
  std::memset(smem, 0xff, sizeof(convfirst::EMULATED::sm80::smem));
  for (Block& b : blocks) b = {std::vector<unsigned char>(shared_bytes, 0xff), {}};
  running = 0, cluster = {};
  for (Warp& w : warps) w.arrived[0] = w.arrived[1] = 0;
  for (Thread& t : threads) prepare(t);
  const int count = static_cast<int>(warps.size());
  while (!std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.done; }))
    for (int w = 0; w < count; ++w) {
      const int warp = backwards ? count - 1 - w : w;
      block_index.x = first_block + warp * 32 / block_threads;
      run_warp(warp);
    }
  for (size_t i = shared_bytes; i < sizeof(convfirst::EMULATED::sm80::smem); ++i)
    if (smem[i] != 0xff) fail("write out of bounds", i);
}

}  // namespace

void yield() { swapcontext(&thread().context, &scheduler); }
void syncthreads() { blocks[running].barrier.wait(block_threads); }
int cluster_rank() { return running; }
void cluster_arrive() { cluster_before[current] = cluster.arrive(static_cast<int>(threads.size())); }
void cluster_wait() {
  while (cluster.completed == cluster_before[current]) yield();
}
const unsigned char* memory_of(int rank) {
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) fail("no such block in the cluster", rank);
  return rank == running ? smem : blocks[rank].memory.data();
}

void run_clusters(int grid, int cluster_size, int block, int shared_memory, std::function<void()> kernel) {
  body = kernel;
  block_threads = block;
  shared_bytes = shared_memory;
  threads.resize(block * cluster_size);
  warps.resize(threads.size() / 32);
  cluster_before.resize(threads.size());
  blocks.resize(cluster_size);
  for (int first = 0; first < grid; first += cluster_size) run_cluster(first);
}

// A thread's index in its block; cuda_on_cpu.h's is that in the cluster.
struct IndexInBlock {
  struct {
    operator int() const { return current % block_threads; }
  } x;
} index_in_block;

struct BlockSize {
  struct {
    operator int() const { return block_threads; }
  } x;
} block_size;

}  // namespace emulation

#undef threadIdx
#undef blockDim
#define threadIdx emulation::index_in_block
#define blockDim emulation::block_size

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
