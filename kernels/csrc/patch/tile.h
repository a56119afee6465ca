// Tiles of the kernels between residual blocks: constexpr tables, read by the kernels and by the host alike.
#pragma once

#include <cstdint>

#include "params.h"

#if !defined(CONVFIRST_HOST_DEVICE)
#if defined(__CUDACC__)
#define CONVFIRST_HOST_DEVICE __host__ __device__
#else
#define CONVFIRST_HOST_DEVICE
#endif
#endif

namespace convfirst::patch {

// Rows of 16-bit elements in shared memory, padded so that eight consecutive ones start in eight different 16-byte bank groups.
CONVFIRST_HOST_DEVICE constexpr int row_bytes(int elements) { return 2 * elements + 16; }

// A warp's n8 blocks of a product go in groups of `vector_blocks`: within a group a thread holds 2 * vector_blocks channels in a
// row, so it stores 16 or 8 bytes at once. The columns of the weight matrix are permuted to that end.
CONVFIRST_HOST_DEVICE constexpr int vector_blocks(int blocks) { return blocks % 4 == 0 ? 4 : 2; }

// Channel of column `column` (0 to 7) of n8 block `block`.
CONVFIRST_HOST_DEVICE constexpr int channel_of(int block, int column, int vector) {
  return block / vector * 8 * vector + column / 2 * 2 * vector + block % vector * 2 + column % 2;
}

// n / divisor without a division, for n < 2^31.
struct Divider {
  uint32_t multiplier, shift, divisor;
  CONVFIRST_HOST_DEVICE int quotient(int n) const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
};

inline Divider divider(int divisor) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < static_cast<uint64_t>(divisor)) ++shift;
  const uint64_t multiplier = (uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1;
  return {static_cast<uint32_t>(multiplier), shift, static_cast<uint32_t>(divisor)};
}

// ---- stem: a team of four warps makes 8x8 pixels of y -----------------------------------------------------------------------

constexpr int kStemTile = 8;
constexpr int kTeamThreads = 128;
constexpr int kMidSide = 2 * kStemTile + 1;         // with halo
constexpr int kMidPixels = kMidSide * kMidSide;     // 289
constexpr int kMidBlocks = (kMidPixels + 15) / 16;  // m16 blocks of conv1
constexpr int kInputRows = 2 * kMidSide + 1;
constexpr int kInputPieces = 14;                  // 16-byte copies a row: 37 pixels of 3 channels, and what alignment adds
constexpr int kInputPitch = 16 * kInputPieces;    // bytes
constexpr int kInputBytes = kInputRows * kInputPitch;

// Pixels of conv1's result lie by column parity, so that conv2, which takes every other one, reads neighbours. Even columns have
// slots 0 to 8; the odd ones begin where a pair of neighbours written at once meets no bank conflict.
struct MidLayout {
  int odd_slot, row_slots, spare_slot;  // the last for rows beyond the last pixel
  int pixel, piece;                     // bytes from a slot to the next, and from 8 channels to the next 8
  int bytes;

  CONVFIRST_HOST_DEVICE constexpr int slot(int row, int column) const {
    return row * row_slots + column / 2 + column % 2 * odd_slot;
  }
};

// For ldmatrix a pixel's channels lie in a row; for wgmma 8 channels of all pixels do, so that 8 pixels are a block of its operand.
CONVFIRST_HOST_DEVICE constexpr MidLayout mid_layout(int mid, bool hopper) {
  MidLayout l{};
  l.odd_slot = mid == 32 && !hopper ? 12 : 9;
  l.row_slots = l.odd_slot + kStemTile;
  l.spare_slot = kMidSide * l.row_slots;
  l.pixel = hopper ? 16 : row_bytes(mid);
  l.piece = hopper ? (16 * (l.spare_slot + 1) + 95) / 128 * 128 + 32 : 16;
  l.bytes = hopper ? mid / 8 * l.piece : (l.spare_slot + 1) * l.pixel;
  return l;
}

// As many as registers allow; without wgmma a team needs more of them.
CONVFIRST_HOST_DEVICE constexpr int max_teams(int mid, bool hopper) {
  return mid <= 16 || (mid == 32 && hopper) ? 4 : mid == 32 ? 3 : mid == 48 ? 2 : 1;
}

struct StemLayout {
  int weight, vectors, table, teams;                     // of the block
  int mid, input, input_slot, moments, team_bytes;       // of a team, from its start
  CONVFIRST_HOST_DEVICE constexpr int end(int count) const { return teams + count * team_bytes; }
};

CONVFIRST_HOST_DEVICE constexpr StemLayout stem_layout(int mid, bool hopper) {
  StemLayout l{};
  l.vectors = l.weight + 2 * mid * (hopper ? 18 * mid : row_bytes(9 * mid));
  l.table = l.vectors + 3 * 2 * mid * 4;
  l.teams = l.table + (16 * kMidBlocks * 4 + 15) / 16 * 16;
  l.input = l.mid + mid_layout(mid, hopper).bytes;
  l.input_slot = kInputBytes;
  l.moments = l.input + 2 * l.input_slot;
  l.team_bytes = l.moments + 2 * kStemTile * kStemTile * 4;
  return l;
}

// ---- downsampling: the matrix stays in shared memory, pixels pass through a ring --------------------------------------------

struct DownsampleTile {
  int rows;     // pixels of y
  int warps_m;  // each of 32 rows
  int warps_n;
  int slots;    // ring of taps
  CONVFIRST_HOST_DEVICE constexpr int threads() const { return 32 * warps_m * warps_n; }
};

// The same for 32 and 64 channels. With 96, and tiles of 64 rows, one launch was no faster than two.
CONVFIRST_HOST_DEVICE constexpr DownsampleTile downsample_tile(int /* channels */) { return {128, 4, 2, 5}; }

struct DownsampleLayout {
  int weight, bias, ring, slot, end;
};

CONVFIRST_HOST_DEVICE constexpr DownsampleLayout downsample_layout(int channels) {
  const DownsampleTile tile = downsample_tile(channels);
  DownsampleLayout l{};
  l.bias = l.weight + 2 * channels * row_bytes(4 * channels);
  l.ring = l.bias + 2 * channels * 4;
  l.slot = tile.rows * row_bytes(channels);
  l.end = l.ring + tile.slots * l.slot;
  return l;
}

struct HopperDownsampleTile {
  int teams;  // of four warps, 64 rows
  int slots;  // ring of taps of a warp
};

CONVFIRST_HOST_DEVICE constexpr HopperDownsampleTile hopper_downsample_tile(int channels) {
  return channels <= 64 ? HopperDownsampleTile{3, 5} : HopperDownsampleTile{2, 3};
}

struct HopperDownsampleLayout {
  int weight, bias, ring, slot;
  CONVFIRST_HOST_DEVICE constexpr int end(int teams, int slots) const { return ring + teams * 4 * slots * slot; }
};

CONVFIRST_HOST_DEVICE constexpr HopperDownsampleLayout hopper_downsample_layout(int channels) {
  HopperDownsampleLayout l{};
  l.bias = l.weight + 2 * channels * 4 * channels * 2;
  l.ring = l.bias + 2 * channels * 4;
  l.slot = 16 * row_bytes(channels);
  return l;
}

// ---- patch stem: warps of their own, 16 pixels of y each ---------------------------------------------------------------------

constexpr int kPatchValues = 48;  // 4 x 4 pixels of 3 channels
constexpr int kPatchThreads = 128;

CONVFIRST_HOST_DEVICE constexpr int patch_stem_bytes(int dim) { return dim * (row_bytes(kPatchValues) + 12); }

}  // namespace convfirst::patch
