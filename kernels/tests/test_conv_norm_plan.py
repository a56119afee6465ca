"""Tiles, clusters and shared memory of the Hopper convolution with LayerNorm: pure host functions, built with g++."""

import ctypes

import pytest
from emulated import host_library

SHARED_MEMORY = 232448  # bytes a block on an H100 or H200 may opt in to
CONVNEXT = ((56, 96), (28, 192), (14, 384), (7, 768))
CONV_FIRST = ((56, 64), (28, 128), (14, 256), (7, 512), (225, 64))
ODD_MAPS = ((1, 1), (1, 5), (5, 1), (13, 17), (8, 8), (200, 9), (9, 200), (64, 64))
FILTERS = ((3, 8), (3, 16), (5, 8), (5, 16))
PLAN_SHAPES = [  # batch, height, width, channels, filter size, group width
    *[(batch, size, size, channels, 7, 1) for batch in (1, 32, 128) for size, channels in CONVNEXT],
    *[(2, size, size, 1536, 7, 1) for size in (1, 7, 14)],
    *[(3, *size, 40, 7, 1) for size in ODD_MAPS],
]
GROUPED_SHAPES = [
    *[(batch, size, size, channels, 3, 8) for batch in (1, 32, 128) for size, channels in CONV_FIRST],
    *[
        (3, *size, channels, *f)
        for size in ((1, 1), (7, 7), (13, 17), (70, 33), (2, 2000))
        for channels in (32, 256, 1024)
        for f in FILTERS
    ],
]

SOURCE = r"""
#include "block_fusion/conv_norm_sm90.h"
#include "block_fusion/grouped_conv_norm_sm90.h"
#include "block_fusion/image_conv_norm_sm90.h"
using namespace convfirst::block_fusion;
using namespace convfirst::block_fusion::sm90;
static Problem problem(const int* v) {
  return {v[0], v[1], v[2], v[3], 4 * v[3], v[4], v[5], DType::kHalf, Activation::kGelu, true};
}
// out: see FIELDS
extern "C" int plan(const int* shape, int capability, int multiprocessors, int shared_memory, int* out, char* text) {
  const Problem q = problem(shape);
  ConvNormPlan p;
  if (!conv_norm_plan(q, {capability, multiprocessors, shared_memory}, &p)) return 0;
  const ConvNormTile& t = p.tile;
  const ConvNormLayout layout = conv_norm_layout(t, p.slab, p.cluster);
  int farthest = 0;
  for (int slot = 0; slot < t.slots(); ++slot) {
    const int last_row = t.rows + q.kernel_size - 2;
    const int row = last_row * t.row_units + (last_row >= t.rows ? t.skew : 0);
    farthest = std::max(farthest, t.slot_unit(slot) + row + (t.narrow ? 0 : 1));
  }
  const int values[] = {t.slots(), t.images, t.groups, t.rows, t.strips, p.slab, p.cluster, p.tiles, p.tiles_y,
                        p.tiles_x, p.clusters, p.shared_memory, std::max({t.box_rows, t.box_cols, t.images}),
                        t.images * t.box_rows * t.row_units, conv_norm::banks_differ(t), layout.total, farthest,
                        t.plane_units};
  std::copy(std::begin(values), std::end(values), out);
  conv_norm_describe(p).copy(text, 511);
  return 1;
}
// out: see GROUPED_FIELDS
extern "C" int grouped(const int* shape, int multiprocessors, int shared_memory, int* out, char* text) {
  const Problem q = problem(shape);
  GroupedPlan p;
  if (!grouped_plan(q, {90, multiprocessors, shared_memory}, &p)) return 0;
  const GroupedTile& t = p.tile;
  const int taps_reach = (q.kernel_size - 1) * (t.row_stride() + 1);  // from a pixel's corner to its last tap
  const int total = grouped_layout(t, q.channels, q.kernel_size).total;
  const int values[] = {t.m_tiles, t.warps_pixels, t.columns, t.pixels(), t.rows(), t.staged(), p.tiles, p.threads,
                        p.resident, p.shared_memory, total, t.corner(t.pixels() - 1) + taps_reach};
  std::copy(std::begin(values), std::end(values), out);
  grouped_describe(p).copy(text, 511);
  return 1;
}
// out: threads, passes, blocks, shared_memory
extern "C" int image(const int* shape, int capability, int multiprocessors, int shared_memory, int* out) {
  ImagePlan p;
  if (!image_plan(problem(shape), {capability, multiprocessors, shared_memory}, &p)) return 0;
  const int values[] = {p.threads, p.passes, p.grid, p.shared_memory};
  std::copy(std::begin(values), std::end(values), out);
  return 1;
}
extern "C" double image_cost_of(const int* shape, int multiprocessors) {
  const Problem q = problem(shape);
  const Device device{90, multiprocessors, 232448};
  ImagePlan p;
  return image_plan(q, device, &p) ? image_cost(q, device, p) : -1;
}
extern "C" double cost(const int* shape) {
  const Problem q = problem(shape);
  const Device device{90, 132, 232448};
  ConvNormPlan p;
  GroupedPlan g;
  if (q.group_width > 1) return grouped_plan(q, device, &g) ? grouped_cost(q, device, g) : -1;
  return conv_norm_plan(q, device, &p) ? conv_norm_cost(q, device, p) : -1;
}
"""
FIELDS = (
    "slots images groups rows strips slab cluster tiles tiles_y tiles_x clusters shared_memory largest_box box_units "
    "banks_differ total farthest_unit plane_units"
).split()

GROUPED_FIELDS = (
    "m_tiles warps_pixels columns pixels rows staged tiles threads resident shared_memory total last_staged".split()
)


@pytest.fixture(scope="module")
def planner(tmp_path_factory) -> ctypes.CDLL:
    loaded = host_library(SOURCE, tmp_path_factory)
    loaded.cost.restype = loaded.image_cost_of.restype = ctypes.c_double
    return loaded


def plan(planner, shape, capability=90, multiprocessors=132, shared_memory=SHARED_MEMORY):
    values, text = (ctypes.c_int * len(FIELDS))(), ctypes.create_string_buffer(512)
    if not planner.plan((ctypes.c_int * 6)(*shape), capability, multiprocessors, shared_memory, values, text):
        return None
    return dict(zip(FIELDS, values, strict=True)) | {"text": text.value.decode()}


@pytest.mark.parametrize("multiprocessors", [132, 3])
@pytest.mark.parametrize("shape", PLAN_SHAPES, ids=str)
def test_tiles_cover_the_batch_and_fit(planner, shape, multiprocessors):
    batch, height, width, channels, _, _ = shape
    p = plan(planner, shape, multiprocessors=multiprocessors)
    assert p is not None
    assert p["shared_memory"] == p["total"] <= SHARED_MEMORY
    assert 1 <= p["slots"] == p["images"] * p["groups"] * p["strips"] <= 8 and 1 <= p["rows"] <= 8
    assert p["tiles_y"] * p["groups"] * p["rows"] >= height and p["tiles_x"] * p["strips"] * 8 >= width
    assert p["tiles"] == -(-batch // p["images"]) * p["tiles_y"] * p["tiles_x"]
    assert p["images"] == 1 or p["tiles_y"] == p["tiles_x"] == 1, "only whole images share a tile"
    assert p["groups"] == 1 or p["rows"] >= 7, "one skew a group"
    assert p["cluster"] * p["slab"] >= channels > (p["cluster"] - 1) * p["slab"] and p["cluster"] <= 8
    assert p["cluster"] == 1 or p["slab"] % 32 == 0
    assert 1 <= p["clusters"] <= p["tiles"] and (p["clusters"] * p["cluster"] <= multiprocessors or p["clusters"] == 1)
    assert p["largest_box"] <= 256, "TMA"
    assert p["farthest_unit"] < p["plane_units"], "products read within the plane"
    assert p["box_units"] <= (64 if width <= 8 else 112) and p["banks_differ"]
    assert f"strips {p['strips']}, slab {p['slab']}, cluster {p['cluster']}" in p["text"]


@pytest.mark.parametrize("multiprocessors", [132, 3])
@pytest.mark.parametrize("shape", GROUPED_SHAPES, ids=str)
def test_grouped_tiles_cover_the_batch_and_fit(planner, shape, multiprocessors):
    batch, height, width, channels, _, _ = shape
    values, text = (ctypes.c_int * len(GROUPED_FIELDS))(), ctypes.create_string_buffer(512)
    assert planner.grouped((ctypes.c_int * 6)(*shape), multiprocessors, SHARED_MEMORY, values, text)
    p = dict(zip(GROUPED_FIELDS, values, strict=True))
    assert p["shared_memory"] == p["total"] <= SHARED_MEMORY
    assert p["pixels"] == 16 * p["m_tiles"] * p["warps_pixels"] and p["threads"] == channels * p["warps_pixels"]
    assert p["threads"] <= (1024 if p["m_tiles"] == 1 else 512) and p["threads"] * p["resident"] <= 2048
    if p["columns"]:
        assert p["columns"] * p["rows"] == p["pixels"]
        assert p["tiles"] == batch * -(-width // p["columns"]) * -(-height // p["rows"])
    else:
        assert p["tiles"] == -(-batch * height * width // p["pixels"])
    assert p["last_staged"] < p["staged"], "products read within what is staged"
    assert f"m_tiles {p['m_tiles']}, warps_pixels {p['warps_pixels']}" in text.value.decode()


def test_grouped_filters_that_are_not_covered_have_no_plan(planner):
    values, text = (ctypes.c_int * len(GROUPED_FIELDS))(), ctypes.create_string_buffer(512)
    for shape in ((1, 8, 8, 48, 3, 8), (1, 8, 8, 64, 3, 32), (1, 8, 8, 64, 7, 8), (1, 8, 8, 1056, 3, 8)):
        assert not planner.grouped((ctypes.c_int * 6)(*shape), 132, SHARED_MEMORY, values, text)


def image(planner, *shape, capability=90, shared_memory=SHARED_MEMORY):
    values = (ctypes.c_int * 4)()
    if not planner.image((ctypes.c_int * 6)(*shape), capability, 132, shared_memory, values):
        return None
    return dict(zip(("threads", "passes", "blocks", "shared_memory"), values, strict=True))


@pytest.mark.parametrize(
    "shape",
    [(128, 14, 14, 384), (128, 7, 7, 768), (3, 7, 7, 1536), (5, 1, 14, 8), (2, 33, 7, 264), (2, 14, 14, 200)],
    ids=str,
)
def test_an_image_has_a_thread_for_each_channel_and_fits(planner, shape):
    batch, height, width, channels = shape
    p = image(planner, *shape, 7, 1)
    assert p["blocks"] == batch
    assert p["threads"] % 32 == 0 and p["threads"] <= (512 if width == 7 else 384)
    assert p["threads"] * p["passes"] >= channels > p["threads"] * (p["passes"] - 1)
    assert height * width * channels * 2 + 8 * height <= p["shared_memory"] <= SHARED_MEMORY


def test_images_that_are_not_covered_have_no_plan(planner):
    for shape in (
        (1, 14, 14, 392, 7, 1), (1, 14, 13, 64, 7, 1), (1, 56, 56, 96, 7, 1), (1, 7, 7, 60, 7, 1), (1, 7, 7, 64, 5, 1),
        (1, 7, 7, 64, 7, 8), (1, 65, 7, 64, 7, 1), (1, 22, 14, 384, 7, 1),
    ):  # fmt: skip
        assert image(planner, *shape) is None
    assert image(planner, 1, 14, 14, 384, 7, 1, capability=80) is None
    assert image(planner, 1, 14, 14, 384, 7, 1, shared_memory=100 * 1024) is None


def test_images_cost_their_rounds(planner):
    def cost(batch, multiprocessors=132):
        return planner.image_cost_of((ctypes.c_int * 6)(batch, 14, 14, 384, 7, 1), multiprocessors)

    assert cost(1) < cost(132) < cost(133) < cost(264)
    assert cost(133) - cost(132) > 2 * (cost(132) - cost(1)), "a second round"


@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 8, 64, 5, 1),
        (1, 8, 8, 64, 7, 8),
        (1, 8, 8, 36, 7, 1),
        (1, 8, 8, 48, 3, 8),
        (1, 8, 8, 1544, 7, 1),
        (1, 8, 8, 64, 3, 32),
    ],
    ids=str,
)
def test_what_is_not_covered_has_no_plan(planner, shape):
    assert plan(planner, shape) is None


def test_other_devices_and_too_large_tensors_have_no_plan(planner):
    assert plan(planner, (1, 8, 8, 96, 7, 1), capability=80) is None
    assert plan(planner, (1, 8, 8, 96, 7, 1), shared_memory=16 * 1024) is None
    assert plan(planner, (4096, 224, 224, 96, 7, 1)) is None


@pytest.mark.parametrize("kernel_size, group_width", [(7, 1), (3, 8)])
def test_cost_grows_with_the_batch_and_stays_above_the_memory_floor(planner, kernel_size, group_width):
    def cost(batch):
        return planner.cost((ctypes.c_int * 6)(batch, 56, 56, 96, kernel_size, group_width))

    assert 0 < cost(1) < cost(32) < cost(128)
    assert cost(128) > 128 * 56 * 56 * 96 * 4 / 4.8e6  # microseconds at the H200's memory bandwidth
