"""Winograd's fused Hopper kernel, its own code on a CPU: fibers for threads, C++ for TMA, ldmatrix and wgmma.

It checks indexing, padding, bounds and barriers; products happen when they are queued or as late as the waits allow,
warps run in either order, and shared memory is poisoned. It says nothing about speed.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from emulated import hopper_library
from test_winograd_emulation import ACTIVATE, ACTIVATIONS, DTYPES, CProblem, CTensors

from convfirst_kernels.winograd import cook_toom


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    stand_ins = {"patch": ["patch/sync.cuh"], "winograd": ["winograd_sm90/pairs_sm90.cuh"]}
    return hopper_library("winograd_sm90", "winograd", tmp_path_factory, ["winograd"], stand_ins)


def transformed(weight: torch.Tensor) -> torch.Tensor:
    """[points, outputs, channels] as `winograd_filter` makes them: rounded once, padded with zeros."""
    k, c = weight.shape[:2]
    matrix = torch.tensor([[float(v) for v in row] for row in cook_toom(2, 3).filter])
    points = torch.einsum("ir,kcrs,js->ijkc", matrix, weight.float(), matrix).reshape(16, k, c).to(weight.dtype)
    return F.pad(points, (0, -c % 32, 0, -k % 64)).contiguous()


def emulate(library, case: tuple, tensors: tuple, multiprocessors: int, at_once: bool, backwards: bool) -> torch.Tensor:
    batch, height, width, _, outputs, padding, activation = case
    x, filter, bias = tensors
    y = torch.full((batch, height + 2 * padding - 2, width + 2 * padding - 2, outputs), float("nan"), dtype=x.dtype)
    problem = CProblem(*case[:6], DTYPES.index(x.dtype), ACTIVATIONS.index(activation))
    pointers = CTensors(x.data_ptr(), filter.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
    assert library.run(ctypes.byref(problem), ctypes.byref(pointers), multiprocessors, at_once, backwards) == 0
    return y


@pytest.mark.parametrize(
    ("case", "dtype", "multiprocessors"),
    # batch, height, width, channels, outputs, padding, activation
    [
        ((1, 16, 16, 64, 32, 1, "none"), torch.float16, 1),
        ((2, 13, 21, 40, 72, 1, "relu"), torch.float16, 4),  # four tiles a stream, filters resident
        ((3, 9, 7, 8, 8, 0, "silu"), torch.bfloat16, 1),
        ((1, 3, 2, 168, 40, 2, "gelu"), torch.float16, 2),  # filters in a ring of slots
        ((5, 18, 19, 264, 16, 1, "none"), torch.bfloat16, 2),
        ((2, 5, 35, 136, 8, 2, "none"), torch.float16, 132),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else str(v).removeprefix("torch."),
)
def test_the_kernel_computes_the_convolution(library, case, dtype, multiprocessors):
    batch, height, width, channels, outputs, padding, activation = case
    generator = torch.Generator().manual_seed(sum(case[:6]))

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator) * 2 - 1

    x = uniform(batch, height, width, channels).to(dtype)
    weight = uniform(outputs, channels, 3, 3).to(dtype)
    bias = None if activation == "relu" else uniform(outputs)
    wide = None if bias is None else bias.double()
    exact = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), wide, padding=padding)
    exact = ACTIVATE[activation](exact).permute(0, 2, 3, 1)
    tensors = (x, transformed(weight), bias)
    results = [emulate(library, case, tensors, multiprocessors, *order) for order in ((True, False), (False, True))]
    error = (results[0].double() - exact).abs().max() / exact.abs().max()
    assert error <= 3 * torch.finfo(dtype).eps
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("problem", "grid"),
    # batch, height, width, channels, outputs; thread blocks on 132 multiprocessors
    [
        ((64, 224, 224, 64, 64), 132),
        ((64, 56, 56, 256, 256), 128),
        ((1, 28, 28, 512, 512), 64),  # as many as there is work for
        ((1, 14, 14, 512, 512), 16),
        ((1, 9, 9, 8, 8), 1),
        ((1, 9, 9, 256, 8192), 256),  # more filters than fit at once
    ],
    ids=str,
)
def test_plan(library, problem, grid):
    numbers = (ctypes.c_int * 4)()
    library.plan(ctypes.byref(CProblem(*problem, 1, 1, 0)), 132, numbers)
    slices, blocks, groups, found = numbers
    batch, height, width, channels, outputs = problem
    assert slices == -(-channels // 32) and groups == -(-outputs // 32)
    assert blocks == -(-batch * -(-height // 4) * -(-width // 16) // 4)
    assert found == grid and found % groups == 0
