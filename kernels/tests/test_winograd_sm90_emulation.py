"""Winograd's fused Hopper kernel, its own code on a CPU: fibers for threads, C++ for TMA, ldmatrix and wgmma.

It checks indexing, padding, bounds and barriers; products happen when they are queued or as late as the waits allow,
warps run in either order, and shared memory is poisoned. It says nothing about speed.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_winograd_emulation import ACTIVATE, ACTIVATIONS, DTYPES, CProblem, CTensors

from convfirst_kernels.winograd import cook_toom

KERNELS = Path(__file__).parents[1]
EMULATION = Path(__file__).parent / "emulation"
MINUTE = 60


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    locate = [sys.executable, str(KERNELS / "cmake/locate.py"), "nvcc"]
    nvcc = subprocess.run(locate, capture_output=True, text=True).stdout.strip()
    if not shutil.which("g++") or not nvcc:
        pytest.skip("needs g++ and the CUDA headers")
    folder = tmp_path_factory.mktemp("winograd_sm90")
    for part in ("direct", "block_fusion", "winograd"):
        shutil.copytree(KERNELS / "csrc" / part, folder / part)
    for name in ("common", "patch"):
        (folder / name).mkdir()
    shutil.copy(KERNELS / "csrc/common/activation.cuh", folder / "common")
    for stand_in in ("ptx.cuh", "cuda_on_cpu.h", "downsample_gemm_sm90/sm90.cuh", "downsample_gemm_sm90/launch.cuh"):
        shutil.copy(EMULATION / stand_in, folder / "common")
    shutil.copy(EMULATION / "patch/sync.cuh", folder / "patch")
    shutil.copy(EMULATION / "winograd_sm90/pairs_sm90.cuh", folder / "winograd")
    include = Path(nvcc).parents[1] / "include"
    command = ["g++", "-std=c++17", "-O2", "-w", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-Dsm90=sm80"]
    command += ["-fno-gnu-unique"]  # or a process keeps one fake encoder of tensor maps for all such libraries
    command += ["-DEMULATED=winograd", *(f"-I{path}" for path in (folder, include, include / "cccl"))]
    target = folder / "emulation.so"
    source = EMULATION / "winograd_sm90/emulate.cpp"
    subprocess.run([*command, "-x", "c++", str(source), "-o", str(target)], check=True, timeout=10 * MINUTE)
    return ctypes.CDLL(str(target))


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
