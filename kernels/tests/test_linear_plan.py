"""The Hopper linear layers' choice of tile: pure arithmetic of waves, compiled and run on the CPU."""

import ctypes

import pytest
from emulated import host_library

SOURCE = """
#include "block_fusion/linear_sm90.h"
using namespace convfirst::block_fusion;
using namespace convfirst::block_fusion::sm90;
extern "C" void plan(int layer, long rows, int columns, int depth, int* out) {
  const LinearProblem q{Layer(layer), rows, columns, depth, DType::kHalf, Activation::kSilu, 49};
  const LinearPlan p = plan_linear(q, {90, 132, 232448});
  const LinearTile& t = kLinearTiles[p.tile];
  const int values[] = {t.warpgroups, t.columns, t.cluster, p.grid, p.rounds, p.shared_memory,
                        t.slots(q.layer), int(p.cost * 1000), t.serves(q.layer)};
  for (int i = 0; i < 9; ++i) out[i] = values[i];
}
extern "C" int supports(long rows, int columns, int depth) {
  return linear_supports({Layer::kExpand, rows, columns, depth, DType::kHalf, Activation::kSilu, 49});
}
"""
EXPAND, PROJECT = 0, 1
NAMES = "warpgroups columns cluster grid rounds shared_memory slots cost serves".split()


@pytest.fixture(scope="module")
def planner(tmp_path_factory) -> ctypes.CDLL:
    return host_library(SOURCE, tmp_path_factory)


def plan(planner, layer, rows, columns, depth):
    out = (ctypes.c_int * len(NAMES))()
    planner.plan(layer, ctypes.c_long(rows), columns, depth, out)
    return dict(zip(NAMES, out, strict=True))


@pytest.mark.parametrize(
    ("layer", "rows", "columns", "depth", "tile", "rounds"),
    [
        (EXPAND, 6272, 2048, 512, (3, 128), 4),
        (PROJECT, 6272, 512, 2048, (3, 128), 1),
        (EXPAND, 25088, 1024, 256, (3, 128), 8),
        (PROJECT, 25088, 256, 1024, (3, 128), 2),
        (EXPAND, 25088, 1536, 384, (3, 128), 12),
        (PROJECT, 25088, 384, 1536, (3, 192), 2),
        (EXPAND, 6272, 3072, 768, (3, 128), 6),
        (PROJECT, 6272, 768, 3072, (3, 192), 1),
        (EXPAND, 49, 2048, 512, (1, 64), 1),
        (PROJECT, 49, 512, 2048, (1, 64), 1),
    ],
)
def test_tiles_fill_whole_waves(planner, layer, rows, columns, depth, tile, rounds):
    chosen = plan(planner, layer, rows, columns, depth)
    assert (chosen["warpgroups"], chosen["columns"]) == tile
    assert chosen["rounds"] == rounds


@pytest.mark.parametrize("layer", [EXPAND, PROJECT])
@pytest.mark.parametrize("rows", [1, 63, 64, 193, 6277, 401_408])
@pytest.mark.parametrize(("columns", "depth"), [(256, 256), (352, 264), (768, 3072), (6144, 1536)])
def test_plans_cover_the_problem_within_the_device(planner, layer, rows, columns, depth):
    chosen = plan(planner, layer, rows, columns, depth)
    tile_rows = 64 * chosen["warpgroups"]
    tiles = -(-rows // tile_rows) * -(-columns // chosen["columns"])
    assert chosen["serves"]
    assert chosen["grid"] * chosen["rounds"] >= tiles
    assert chosen["grid"] <= 132 and chosen["grid"] % chosen["cluster"] == 0
    assert chosen["shared_memory"] <= 232448 and chosen["slots"] >= 4
    assert chosen["cost"] > 0


def test_what_the_kernels_take(planner):
    assert planner.supports(ctypes.c_long(1), 1024, 256)
    assert not planner.supports(ctypes.c_long(0), 1024, 256)
    assert not planner.supports(ctypes.c_long(64), 1000, 256)  # columns in blocks of 32
    assert not planner.supports(ctypes.c_long(64), 768, 192)  # fewer slices than blocks of an epilogue
