"""Which first launch the portable split path takes, and its tiles: pure host functions, built with g++."""

import ctypes

import pytest
from emulated import host_library

H200 = (132, 232448)
A100 = (108, 166912)
RTX_4090 = (128, 101376)
SHAPES = [  # batch, height, width, channels
    *[(n, side, side, channels) for n in (1, 128) for side, channels in ((56, 96), (28, 192), (14, 384), (28, 256))],
    (3, 13, 17, 40), (2, 1, 9, 8), (2, 9, 1, 8), (1, 225, 193, 128), (5, 16, 32, 200), (1, 15, 33, 1536),
]  # fmt: skip

SOURCE = r"""
#include "block_fusion/first_sm80.h"
using namespace convfirst::block_fusion;
using namespace convfirst::block_fusion::sm80;
static Problem problem(const int* v) {
  return {v[0], v[1], v[2], v[3], 4 * v[3], 7, 1, DType::kHalf, Activation::kGelu, true};
}
static void write(const DiagonalPlan& p, int* out) {
  const int values[] = {p.parts_down, p.parts_across(), p.rows(), p.columns, p.box_rows(), p.box_columns(), p.tiles_x,
                        p.tiles_y, p.grid, p.buffers, p.slice_bytes(), p.shared_memory};
  std::copy(std::begin(values), std::end(values), out);
}
extern "C" int diagonal(const int* shape, int multiprocessors, int shared_memory, int* out) {
  DiagonalPlan p{};
  if (!diagonal_plan(problem(shape), {80, multiprocessors, shared_memory}, &p)) return 0;
  write(p, out);
  return 1;
}
// The first launch's kind, its shared memory and, where it is that one, the diagonal plan.
extern "C" int chosen(const int* shape, int multiprocessors, int shared_memory, int* bytes, int* out) {
  const FirstPlan p = first_plan(problem(shape), {80, multiprocessors, shared_memory});
  *bytes = p.shared_memory;
  if (p.first == First::kDiagonal) write(p.diagonal, out);
  return static_cast<int>(p.first);
}
"""
KINDS = ("slices", "tiles", "images", "grouped", "diagonal")
FIELDS = (
    "parts_down parts_across rows columns box_rows box_columns tiles_x tiles_y grid buffers slice_bytes shared_memory"
).split()


@pytest.fixture(scope="module")
def planner(tmp_path_factory) -> ctypes.CDLL:
    return host_library(SOURCE, tmp_path_factory)


def diagonal(planner, shape, device):
    values = (ctypes.c_int * len(FIELDS))()
    if not planner.diagonal((ctypes.c_int * 4)(*shape), *device, values):
        return None
    return dict(zip(FIELDS, values, strict=True))


def chosen(planner, shape, device):
    values, bytes_ = (ctypes.c_int * len(FIELDS))(), ctypes.c_int()
    kind = planner.chosen((ctypes.c_int * 4)(*shape), *device, ctypes.byref(bytes_), values)
    return KINDS[kind], bytes_.value, tuple(values)


@pytest.mark.parametrize("device", [H200, A100, RTX_4090], ids=["h200", "a100", "rtx4090"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_cover_the_map_and_fit(planner, shape, device):
    batch, height, width, channels = shape
    p = diagonal(planner, shape, device)
    if p is None:
        assert width <= 8 or device == RTX_4090 or channels > 384
        return
    assert p["tiles_x"] * p["columns"] >= width > (p["tiles_x"] - 1) * p["columns"]
    assert p["tiles_y"] * p["rows"] >= height > (p["tiles_y"] - 1) * p["rows"]
    assert p["grid"] == batch * p["tiles_x"] * p["tiles_y"]
    assert p["parts_down"] * p["parts_across"] == 2 and p["columns"] <= 16 * p["parts_across"]
    assert p["rows"] == 7 * p["parts_down"]
    assert 1 <= p["buffers"] <= min(3, -(-channels // 32))
    assert 16 + p["buffers"] * p["slice_bytes"] == p["shared_memory"] <= device[1]
    # The last part's last fragment ends within the slice: 15 columns and 6 taps beyond its first.
    first = max(0, min(16 * (p["parts_across"] - 1), p["columns"] - 16))
    last = (p["box_rows"] - 1) * p["box_columns"] + first + 15 + 6
    assert (last + 1) * 80 + 49 * 64 <= p["slice_bytes"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_plan_needs_no_more_shared_memory_than_it_says(planner, shape):
    """The launch is planned again from what the configuration says: any amount from its need on gives the same plan."""
    kind, need, values = chosen(planner, shape, H200)
    for shared_memory in {need, (need + H200[1]) // 2}:
        assert chosen(planner, shape, (H200[0], shared_memory)) == (kind, need, values)


def test_the_faster_one_is_taken(planner):
    """As measured on an H200 (NOTES.md)."""
    assert chosen(planner, (128, 28, 28, 192), H200)[0] == "diagonal"
    assert chosen(planner, (128, 14, 14, 384), H200)[0] == "images"
    assert chosen(planner, (128, 7, 7, 768), H200)[0] == "images"
    assert chosen(planner, (1, 28, 28, 192), H200)[0] == "slices"
