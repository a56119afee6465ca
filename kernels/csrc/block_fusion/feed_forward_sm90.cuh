// The feed-forward half of a block for one warpgroup's 64 pixels: O = act(A W1^T + b1) W2^T, the hidden tensor in registers.
#pragma once

#include "../common/grid_sm90.cuh"
#include "activation_sm90.cuh"

namespace convfirst::block_fusion::sm90 {

// Rings of the two weights (w*_slots == chunks: they are loaded once and stay), and how the tiles are shared out.
struct Work {
  int chunks;  // hidden / kHiddenChunk
  int w1_slots, w2_slots;
  int tiles;
  int full_rounds;  // of the warpgroups, each with a tile of its own
  int shared;       // a last round follows, of tiles that two blocks share
};

// What a warpgroup does in one round.
struct Round {
  int tile;          // none from `tiles` on
  int first, count;  // chunks
  bool shared;
};

template <class Traits>
__device__ __forceinline__ Round round_of(const Work& p, int round, int warpgroup) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (Traits::kSharesTail && round == p.full_rounds) {
    const int half = p.chunks / 2;
    return {p.full_rounds * blocks * Traits::kWarpgroups + block / 2 * Traits::kWarpgroups + warpgroup, block % 2 * half, half, true};
  }
  return {block + (round * Traits::kWarpgroups + warpgroup) * blocks, 0, p.chunks, false};
}

template <class Traits>
__device__ __forceinline__ int rounds_of_block(const Work& p) {
  const int rounds = p.full_rounds + p.shared;
  return round_of<Traits>(p, rounds - 1, 0).tile < p.tiles ? rounds : rounds - 1;
}

// One chunk of W2 into its slot. A block that shares its tiles has the output channels that it finishes first.
template <class Traits>
__device__ __forceinline__ void load_w2(const CUtensorMap& w2_map, TransactionBarrier* full, char* slot, int chunk, bool swapped) {
  full->arrive_and_expect_tx(Traits::kW2Bytes);
#pragma unroll
  for (int part = 0; part < Traits::kW2Parts; ++part) {
    tma_load_2d(&w2_map, full, slot + part * (Traits::kW2Bytes / Traits::kW2Parts), chunk * kHiddenChunk,
                (swapped ? part ^ 1 : part) * (Traits::kChannels / Traits::kW2Parts));
  }
}

// Half of the sums, over the other half of the hidden units, go to the cluster's other block and come from there, thread to thread,
// through 64 x kChannels / 2 floats of shared memory at `slot` that nobody reads any more once every warp has arrived.
template <int kChannels>
__device__ __forceinline__ void exchange_halves(float (&o)[kChannels / 2], uint32_t slot, uint32_t ready, uint32_t sent, int rank, int thread) {
  constexpr int kVectors = kChannels / 16;  // of four sums
  __syncwarp();
  if (thread % 32 == 0) grid::arrive_at_peer(ready, rank ^ 1);
  grid::wait_for_peer(ready, 0);
  const uint32_t own = slot + thread * 16, there = grid::peer_address(own, rank ^ 1);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) grid::store_peer(there + i * 2048, o + kChannels / 4 + 4 * i);
  grid::arrive_at_peer(sent, rank ^ 1);
  grid::wait_for_peer(sent, 0);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint4 v = load_shared_128(own + i * 2048);
    o[4 * i] += __uint_as_float(v.x), o[4 * i + 1] += __uint_as_float(v.y);
    o[4 * i + 2] += __uint_as_float(v.z), o[4 * i + 3] += __uint_as_float(v.w);
  }
}

// A position in a ring of slots; `resident` rings are filled once and never turn. kSlots: where their number is fixed, else 0.
template <int kSlots>
struct RingState {
  uint32_t index = 0;
  __device__ __forceinline__ int slot() const { return index % kSlots; }
  __device__ __forceinline__ uint32_t phase() const { return index / kSlots & 1; }
  __device__ __forceinline__ int before() const { return (index - 1) % kSlots; }  // the slot passed last
  __device__ __forceinline__ void advance(int, bool) { ++index; }
  __device__ __forceinline__ void jump(int, int steps) { index += steps; }
};
template <>
struct RingState<0> {
  int place = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ int slot() const { return place; }
  __device__ __forceinline__ uint32_t phase() const { return parity; }
  __device__ __forceinline__ void advance(int slots, bool resident) {
    if (++place == slots) {
      place = 0;
      if (!resident) parity ^= 1;
    }
  }
  __device__ __forceinline__ void jump(int slots, int steps) {
    const int to = place + steps;
    place = to % slots, parity ^= to / slots & 1;
  }
};

// Whether the multiply-add units compute a chunk's pair of SiLUs, six of sixteen, or the special-function unit, whose two operations
// a pair take turns: 1 to 2 % of the block's time; with ten or more of sixteen it is slower (NOTES.md).
template <class Traits>
__device__ __forceinline__ constexpr bool by_polynomial(int pair) {
  return Traits::kHalfActivation && Traits::kActivation == Activation::kSilu && (pair + 1) * 6 / 16 > pair * 6 / 16;
}

// P = act(S + bias): the accumulator layout of S is the operand layout of P.
template <class Traits>
__device__ __forceinline__ void activate(const float (&s)[kHiddenChunk / 2], uint32_t (&h)[kHiddenChunk / 4], uint32_t bias, int lane) {
  bias += 2 * (lane % 4) * Traits::kExpandBiasBytes;  // first, so that the column goes into the load as a constant
#pragma unroll
  for (int j = 0; j < kHiddenChunk / 8; ++j) {
    const int column = 8 * j;
    uint32_t* out = h + 2 * j;
    if constexpr (Traits::kHalfActivation) {
      const uint32_t b = load_shared_32(bias + column * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* pair = s + 4 * j + 2 * i;
        out[i] = by_polynomial<Traits>(2 * j + i) ? silu_half_polynomial(pair[0], pair[1], b)
                                                  : activate_half<Traits::kActivation>(pair[0], pair[1], b);
      }
    } else if constexpr (Traits::kBFloat16Silu) {
      const uint32_t b = load_shared_32(bias + column * 2);
      out[0] = silu_bfloat16(s[4 * j], s[4 * j + 1], b);
      out[1] = silu_bfloat16(s[4 * j + 2], s[4 * j + 3], b);
    } else {
      float2 b;
      if constexpr (Traits::kExpandBiasBytes == 2) {
        b = unpack2<ElementOf<Traits>>(load_shared_32(bias + column * 2));
      } else {
        b = load_shared_float2(bias + column * 4);
      }
      constexpr auto kAct = Traits::kActivation;
      out[0] = pack2<ElementOf<Traits>>(activate_float<kAct>(s[4 * j], b.x), activate_float<kAct>(s[4 * j + 1], b.y));
      out[1] = pack2<ElementOf<Traits>>(activate_float<kAct>(s[4 * j + 2], b.x), activate_float<kAct>(s[4 * j + 3], b.y));
    }
  }
}

// A, the first product's operand: in registers (16 x 16 fragments), or the descriptor of its panels in shared memory.
template <class Traits>
struct OperandA {
  uint32_t fragments[Traits::kARegisters ? Traits::kChannels / 4 : 1];
  uint64_t descriptor;
};

// Descriptors count in units of 16 bytes, so a step along k or to another panel is an addition.
template <class Traits>
__device__ __forceinline__ void issue_expand(float (&s)[kHiddenChunk / 2], OperandA<Traits>& a, uint64_t w1) {
  constexpr int kStepsPerPanel = Traits::kPanel / 16;
#pragma unroll
  for (int k = 0; k < Traits::kChannels / 16; ++k) {
    const int panel = k / kStepsPerPanel, inside = k % kStepsPerPanel * 2;
    const uint64_t b = w1 + panel * (kHiddenChunk * Traits::kRowBytes / 16) + inside;
    if constexpr (Traits::kARegisters) {
      wgmma_rs<ElementOf<Traits>, kHiddenChunk>(s, a.fragments + 4 * k, b, k > 0);
    } else {
      wgmma_ss<ElementOf<Traits>, kHiddenChunk>(s, a.descriptor + panel * (Traits::kAPanelBytes / 16) + inside, b, k > 0);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void issue_project(float (&o)[Traits::kChannels / 2], const uint32_t (&h)[kHiddenChunk / 4], uint64_t w2,
                                              bool accumulate) {
#pragma unroll
  for (int k = 0; k < kHiddenChunk / 16; ++k) {
    wgmma_rs<ElementOf<Traits>, Traits::kChannels>(o, h + 4 * k, w2 + k * 2, Traits::kBiasFirst || accumulate || k > 0);
  }
}

// Bars: the addresses of the weights' barriers, w*_full(slot) and w*_empty(slot).
template <class Traits, class Bars>
struct FeedForward {
  using Sums = float[kHiddenChunk / 2];
  using Hidden = uint32_t[kHiddenChunk / 4];
  using Output = float[Traits::kChannels / 2];
  static constexpr int kFixed = Traits::kFixedSlots;
  static_assert(kFixed == 0 || Traits::kSchedule == Schedule::kDrain);  // what is released is what was waited for last
  const Work& p;
  const Bars bar;
  uint32_t w1_base, w2_base, bias_base;
  int lane;
  int first, count;  // chunks of hidden units that the next run sums
  RingState<kFixed> w1, w2;                               // next to wait for
  RingState<kFixed> w1_free, w2_free;                     // next to release: products trail waits

  // Where warpgroups alternate, the other's turns: `turn` must have come before a tile's first chunk, `next` gets it after the last.
  uint32_t turn_w1 = 0, turn_w2 = 0, next_w1 = 0, next_w2 = 0;
  int turn = -1;  // phase of the turn; negative: nothing to wait for
  uint32_t a_empty = 0;  // gets an arrival of each warp once the tile's last product from A is done

  __device__ bool w1_resident() const { return kFixed == 0 && !Traits::kAlternates && p.w1_slots == p.chunks; }
  __device__ bool w2_resident() const { return kFixed == 0 && !Traits::kAlternates && p.w2_slots == p.chunks; }
  __device__ __forceinline__ void pass_w1() {
    if (Traits::kAlternates && lane == 0) arrive_barrier(next_w1);
  }
  __device__ __forceinline__ void pass_w2() {
    if (Traits::kAlternates && lane == 0) arrive_barrier(next_w2);
  }
  __device__ __forceinline__ void release_a() {
    if (Traits::kReloadsX && lane == 0) arrive_barrier(a_empty);
  }
  // Over the chunks of the other warpgroups' tiles.
  __device__ __forceinline__ void jump(int steps) {
    w1.jump(p.w1_slots, steps), w2.jump(p.w2_slots, steps);
    if constexpr (kFixed == 0) w1_free.jump(p.w1_slots, steps), w2_free.jump(p.w2_slots, steps);
  }
  __device__ __forceinline__ uint32_t wait_w1() {
    wait_barrier(bar.w1_full(w1.slot()), w1.phase());
    const uint32_t address = w1_base + w1.slot() * Traits::kW1Bytes;
    w1.advance(p.w1_slots, w1_resident());
    return address;
  }
  __device__ __forceinline__ uint32_t wait_w2() {
    wait_barrier(bar.w2_full(w2.slot()), w2.phase());
    const uint32_t address = w2_base + w2.slot() * Traits::kW2Bytes;
    w2.advance(p.w2_slots, w2_resident());
    return address;
  }
  __device__ __forceinline__ void release_w1() {
    if constexpr (kFixed > 0) {
      if (lane == 0) arrive_barrier(bar.w1_empty(w1.before()));
    } else if (!w1_resident()) {
      if (lane == 0) arrive_barrier(bar.w1_empty(w1_free.slot()));
      w1_free.advance(p.w1_slots, false);
    }
  }
  __device__ __forceinline__ void release_w2() {
    if constexpr (kFixed > 0) {
      if (lane == 0) arrive_barrier(bar.w2_empty(w2.before()));
    } else if (!w2_resident()) {
      if (lane == 0) arrive_barrier(bar.w2_empty(w2_free.slot()));
      w2_free.advance(p.w2_slots, false);
    }
  }

  __device__ __forceinline__ void expand(Sums& s, OperandA<Traits>& a) {
    const uint64_t w1_chunk = matrix_descriptor<Traits::kRowBytes>(wait_w1());
    fence_operands(s);
    cute::warpgroup_arrive();
    issue_expand<Traits>(s, a, w1_chunk);
    cute::warpgroup_commit_batch();
  }
  __device__ __forceinline__ void project(Output& o, Hidden& h, bool accumulate) {
    if (Traits::kAlternates && !accumulate && turn >= 0) wait_barrier(turn_w2, turn);
    const uint64_t w2_chunk = matrix_descriptor<128>(wait_w2());
    cute::warpgroup_arrive();
    issue_project<Traits>(o, h, w2_chunk, accumulate);
    cute::warpgroup_commit_batch();
  }
  __device__ __forceinline__ void activate_chunk(Sums& s, Hidden& h, int chunk) {
    fence_operands(s);
    activate<Traits>(s, h, bias_base + (first + chunk) * kHiddenChunk * Traits::kExpandBiasBytes, lane);
  }

  // One set of S: the next chunk's first product goes before this chunk's second one, which runs under the activation. Products
  // complete in order, so wait<1> says that the previous step's second product is done too; the queue never drains.
  __device__ __forceinline__ void step(Output& o, Sums& s, OperandA<Traits>& a, Hidden& h, Hidden& next, int chunk) {
    expand(s, a);
    if (chunk + 2 == count) pass_w1();
    project(o, h, chunk > 0);
    cute::warpgroup_wait<1>();
    release_w1();
    if (Traits::kReloadsX && chunk + 2 == count) release_a();
    if constexpr (Traits::kSchedule == Schedule::kDrain) {
      activate_chunk(s, next, chunk + 1);
      cute::warpgroup_wait<0>();
      fence_operands(o);
      release_w2();
    } else {
      if (chunk > 0) release_w2();
      activate_chunk(s, next, chunk + 1);
    }
  }

  template <class Read>
  __device__ __forceinline__ void run_one(Output& o, OperandA<Traits>& a, Read&& read) {
    Sums s;
    Hidden h[2];
    expand(s, a);
    cute::warpgroup_wait<0>();
    read();
    release_w1();
    if (Traits::kReloadsX && count == 1) release_a();
    activate_chunk(s, h[0], 0);
    int chunk = 0;
#pragma unroll 1
    for (; chunk + 2 < count; chunk += 2) {
      step(o, s, a, h[0], h[1], chunk);
      step(o, s, a, h[1], h[0], chunk + 1);
    }
    if (chunk + 2 == count) {
      step(o, s, a, h[0], h[1], chunk);
      finish(o, h[1]);
    } else {
      finish(o, h[0]);
    }
  }

  // Two sets of S: the first product runs two chunks ahead, so that the tensor cores have work queued during every activation.
  template <bool kMore>
  __device__ __forceinline__ void step_two(Output& o, Sums& s, Sums& s_next, OperandA<Traits>& a, Hidden& h, Hidden& next, int chunk) {
    project(o, h, chunk > 0);
    if (kMore) {
      expand(s, a);
      if (chunk + 3 == count) pass_w1();
    }
    cute::warpgroup_wait<kMore ? 2 : 1>();
    release_w1();
    if (chunk > 0) release_w2();
    activate_chunk(s_next, next, chunk + 1);
  }

  template <class Read>
  __device__ __forceinline__ void run_two(Output& o, OperandA<Traits>& a, Read&& read) {
    Sums s[2];
    Hidden h[2];
    expand(s[0], a);
    expand(s[1], a);
    if (count == 2) pass_w1();
    cute::warpgroup_wait<1>();
    read();
    release_w1();
    activate_chunk(s[0], h[0], 0);
    int chunk = 0;
#pragma unroll 1
    for (; chunk + 3 < count; chunk += 2) {
      step_two<true>(o, s[0], s[1], a, h[0], h[1], chunk);
      step_two<true>(o, s[1], s[0], a, h[1], h[0], chunk + 1);
    }
    if (chunk + 3 == count) {
      step_two<true>(o, s[0], s[1], a, h[0], h[1], chunk);
      step_two<false>(o, s[1], s[0], a, h[1], h[0], chunk + 1);
      finish(o, h[0]);
    } else {
      step_two<false>(o, s[0], s[1], a, h[0], h[1], chunk);
      finish(o, h[1]);
    }
  }

  __device__ __forceinline__ void finish(Output& o, Hidden& h) {
    project(o, h, count > 1);
    pass_w2();
    cute::warpgroup_wait<0>();
    fence_operands(o);
    release_w2();
    if (Traits::kSchedule != Schedule::kDrain && count > 1) release_w2();
  }

  // read: called once the first product has finished, from when on A's fragments are in registers for certain.
  template <class Read>
  __device__ __forceinline__ void run(Output& o, OperandA<Traits>& a, Read&& read) {
    fence_operands(o);
    if (Traits::kAlternates && turn >= 0) wait_barrier(turn_w1, turn);
    if constexpr (Traits::kSchedule == Schedule::kTwoAhead) {
      run_two(o, a, read);
    } else {
      run_one(o, a, read);
    }
  }
  __device__ __forceinline__ void run(Output& o, OperandA<Traits>& a) {
    run(o, a, [] {});
  }

  // A warpgroup without a tile in the last round still turns the rings for the others; W1's carried `pieces` of other weights first.
  __device__ void skip(int pieces = 0) {
    for (int i = 0; i < count + pieces; ++i) {
      wait_w1();
      release_w1();
      if (i < count) {
        wait_w2();
        release_w2();
      }
    }
  }
};

}  // namespace convfirst::block_fusion::sm90
