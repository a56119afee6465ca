"""The Hopper downsampling layer as one matrix product, its own code on a CPU: fibers for threads, C++ for TMA, wgmma.

It checks indexing, bounds, barriers and that nothing is read too late or too early; products happen when they are
queued or as late as the waits allow, warps run in either order, and shared memory is poisoned. It says nothing about
speed.
"""

import ctypes

import pytest
import torch
from cases import guards_intact, worst_ratio
from emulated import DTYPES, hopper_library
from patch_cases import Patch, module, parts_of, patch_inputs


class CDownsampleGemm(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p)]
    _fields_ += [(n, ctypes.c_int) for n in ("batch", "height", "width", "channels", "columns", "dtype")]
    _fields_ += [("has_norm", ctypes.c_bool), ("eps", ctypes.c_float)]
    _fields_ += [(n, ctypes.c_void_p) for n in ("weight", "vectors", "y")] + [("tile", ctypes.c_int)]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return hopper_library("downsample_gemm_sm90", "patch", tmp_path_factory, ["patch"], {})


def emulate(library, x, packed: tuple, tile: int, multiprocessors: int, at_once: bool, backwards: bool):
    weight, _, _, eps, has_norm, vectors = packed
    n, c, height, width = x.shape
    y = torch.full((n, height // 2, width // 2, weight.shape[0]), float("nan"), dtype=x.dtype)
    arguments = CDownsampleGemm(
        x.data_ptr(), n, height, width, c, weight.shape[0], DTYPES.index(str(x.dtype).split(".")[1]), has_norm, eps,
        weight.data_ptr(), vectors.data_ptr(), y.data_ptr(), tile,
    )  # fmt: skip
    assert library.run(ctypes.byref(arguments), multiprocessors, at_once, backwards) == 0
    return y.permute(0, 3, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "tile", "multiprocessors"),
    [
        (Patch("downsample", 64, 3, 13, 22, "float16"), 1, 2),
        (Patch("downsample", 64, 2, 27, 30, "bfloat16", mean=-20.0), 2, 3),
        (Patch("downsample", 128, 2, 31, 35, "float16", mean=50.0), 3, 1),
        (Patch("downsample", 192, 1, 2, 2, "bfloat16"), 3, 132),
        (Patch("downsample", 192, 2, 15, 29, "float16", mean=5.0), 4, 2),
        (Patch("downsample", 128, 1, 9, 30, "float16", "batchnorm"), 1, 5),
    ],
    ids=str,
)
def test_the_kernel_computes_the_layer(library, case, tile, multiprocessors, seed):
    x, network = patch_inputs(case, seed, device="cpu"), module(case, seed + 1)
    truth = network(x.double())
    _, packed = parts_of(network, x.dtype)
    orders = (True, False), (False, True)
    results = [emulate(library, x, packed, tile, multiprocessors, *order) for order in orders]
    assert worst_ratio(results[0], truth, network(x)) <= 1
    assert torch.equal(*results)
    assert guards_intact(x)
