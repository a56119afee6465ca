"""The backward's kernels for weights and their gradients, their own code on a CPU: fibers for threads, poisoned memory.

It checks indexing, padding, bounds, waits and barriers without a GPU, and says nothing about speed.
"""

import ctypes

import pytest
import torch
from cases import guarded
from emulated import CDevice, library

from convfirst_kernels import backward

DTYPES = (torch.float16, torch.bfloat16)


class CProblem(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in "batch height width channels kernel_size group_width dtype".split()]


class CPlan(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in "images rows columns tiles_n tiles_y tiles_x".split()]
    _fields_ += [(n, ctypes.c_int) for n in "channel_block channel_blocks slices stages shared_memory".split()]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    sources = ("block_fusion/*_bwd_weights*", "block_fusion/params.h")
    stand_ins = {"common": ("ptx.cuh", "launch.cuh", "cuda_on_cpu.h")}
    return library("conv_bwd_weights", "block_fusion", tmp_path_factory, sources, stand_ins, "-O1")


def problem(batch, height, width, channels, kernel_size, group_width, dtype=0) -> CProblem:
    return CProblem(batch, height, width, channels, kernel_size, group_width, dtype)


def plan(emulator, problem: CProblem, multiprocessors: int = 132, shared_memory: int = 232448) -> CPlan:
    result, device = CPlan(), CDevice(90, multiprocessors, shared_memory)
    emulator.plan(ctypes.byref(problem), ctypes.byref(device), ctypes.byref(result))
    return result


def gradients(da, x, kernel_size: int, group_width: int):
    """[taps, channels, group_width] and [channels] by autograd's formula."""
    weight = x.new_empty(x.shape[1], group_width, kernel_size, kernel_size)
    d_weight = torch.nn.grad.conv2d_weight(
        x, weight.shape, da, padding=kernel_size // 2, groups=x.shape[1] // group_width
    )
    return d_weight.flatten(2).permute(2, 0, 1), da.sum((0, 2, 3))


CASES = [
    (problem(2, 9, 17, 64, 3, 8), 3, False, True),
    (problem(5, 7, 7, 32, 3, 8, 1), 1, True, False),
    (problem(1, 14, 14, 96, 3, 16), 2, False, False),
    (problem(3, 1, 1, 40, 3, 8), 1, True, True),
    (problem(1, 1, 29, 48, 3, 16, 1), 2, False, True),
    (problem(2, 13, 11, 64, 5, 8), 1, False, False),
    (problem(1, 6, 9, 32, 5, 16, 1), 1, True, True),
    (problem(1, 10, 8, 32, 7, 8), 1, False, True),
    (problem(2, 5, 9, 48, 7, 16), 1, True, False),
    (problem(1, 17, 31, 32, 7, 1), 2, False, True),
    (problem(3, 14, 14, 40, 7, 1, 1), 1, True, False),
    (problem(7, 7, 7, 64, 7, 1), 2, False, False),
    (problem(2, 1, 3, 8, 7, 1), 1, False, True),
    (problem(1, 5, 40, 32, 5, 1), 1, True, True),
    (problem(2, 16, 16, 24, 3, 1, 1), 1, False, False),
]


@pytest.mark.parametrize(("problem", "multiprocessors", "at_once", "backwards"), CASES)
def test_kernel(emulator, problem, multiprocessors, at_once, backwards):
    p, generator = problem, torch.Generator().manual_seed(7)
    chosen = plan(emulator, p, multiprocessors)
    tensors = []
    for _ in range(2):
        tensor = guarded(p.batch, p.channels, p.height, p.width, DTYPES[p.dtype], "cpu")
        tensors.append(tensor.copy_(torch.randn(tensor.shape, generator=generator)))
    da, x = tensors
    weights = p.kernel_size**2 * p.channels * p.group_width
    results = torch.full((weights + p.channels,), float("nan"))
    pointers = (tensor.data_ptr() for tensor in (da, x, results))
    arguments = (ctypes.byref(p), ctypes.byref(chosen), *map(ctypes.c_void_p, pointers))
    assert emulator.run(*arguments, at_once, backwards) == 0
    d_weight, d_bias = gradients(da.double(), x.double(), p.kernel_size, p.group_width)
    torch.testing.assert_close(results[:weights].view(d_weight.shape).double(), d_weight, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(results[weights:].double(), d_bias, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(("channels", "side"), [(64, 56), (128, 28), (256, 14), (512, 7), (96, 56), (768, 7)])
@pytest.mark.parametrize(("kernel_size", "group_width"), [(3, 8), (5, 8), (7, 8), (3, 16), (5, 16), (7, 16), (7, 1)])
def test_plans_fit_the_device(emulator, channels, side, kernel_size, group_width):
    p = plan(emulator, problem(256, side, side, channels, kernel_size, group_width))
    assert p.stages >= 2 and p.shared_memory <= 232448
    assert p.slices * p.channel_blocks <= 2 * 132
    assert p.tiles_n * p.images >= 256 and p.tiles_y * p.rows >= side and p.tiles_x * p.columns >= side


def test_too_little_shared_memory_is_told(emulator):
    assert plan(emulator, problem(1, 8, 8, 64, 7, 1), shared_memory=49152).stages == 0


class CAffine(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("matrix", "bias", "scale", "shift")]
    _fields_ += [("hidden", ctypes.c_int), ("channels", ctypes.c_int)]


class CReleased(ctypes.Structure):
    _fields_ = [("d_matrix", ctypes.c_void_p), ("d_bias", ctypes.c_void_p), ("others", ctypes.c_void_p * 2)]
    _fields_ += [("d_expand", ctypes.c_void_p), ("rounded", ctypes.c_void_p * 2), ("counts", ctypes.c_int64 * 2)]
    _fields_ += [("d_scale", ctypes.c_void_p), ("d_shift", ctypes.c_void_p)]


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@pytest.mark.parametrize(("hidden", "channels", "dtype"), [(64, 64, 0), (96, 24, 1), (160, 200, 0)])
@pytest.mark.parametrize(
    ("biased", "scaled", "shifted"), [(True, True, True), (False, True, False), (True, False, True)]
)
def test_affine_part_of_the_norm(emulator, hidden, channels, dtype, biased, scaled, shifted):
    torch.manual_seed(3)
    matrix = torch.randn(hidden, channels).to(DTYPES[dtype])
    bias = torch.randn(hidden) if biased else None
    scale, shift = torch.randn(channels) if scaled else None, torch.randn(channels) if shifted else None
    affine = CAffine(*map(address, (matrix, bias, scale, shift)), hidden, channels)
    product, moved = torch.full_like(matrix, float("nan")), torch.full((hidden,), float("nan"))
    pointers = map(ctypes.c_void_p, map(address, (product, moved)))
    assert emulator.absorb(dtype, ctypes.byref(affine), *pointers) == 0
    expected = backward.absorb_affine(matrix, bias, scale, shift)
    assert torch.equal(product, expected[0])
    torch.testing.assert_close(moved, expected[1], rtol=1e-5, atol=1e-4)

    d_matrix, d_bias = torch.randn(hidden, channels), torch.randn(hidden)
    d_project, d_conv = torch.randn(channels, hidden), torch.randn(9, channels, 8)
    expected = backward.release_affine(d_matrix, d_bias, matrix, scale, shift, d_project, d_conv)
    results = [torch.full_like(gradient, float("nan")) for gradient in expected]
    d_scale, d_shift, d_expand, project, conv = map(address, results)
    released = CReleased(
        address(d_matrix), address(d_bias), (address(d_project), address(d_conv)), d_expand, (project, conv),
        (d_project.numel(), d_conv.numel()), d_scale, d_shift,
    )  # fmt: skip
    assert emulator.release(dtype, ctypes.byref(affine), ctypes.byref(released)) == 0
    for i, (gradient, truth) in enumerate(zip(results, expected, strict=True)):
        torch.testing.assert_close(gradient, truth, rtol=1e-5 if i < 2 else 8e-3, atol=1e-4)


@pytest.mark.parametrize(("taps", "channels", "group_width"), [(9, 32, 8), (25, 48, 16), (49, 40, 1)])
def test_transposed_filter(emulator, taps, channels, group_width):
    filter = torch.randn(taps, channels, group_width).half()
    result = torch.full_like(filter, float("nan"))
    pointers = map(ctypes.c_void_p, map(address, (filter, result)))
    assert emulator.transpose(*pointers, taps, channels, group_width) == 0
    assert torch.equal(result, backward.transpose_filter(filter))
