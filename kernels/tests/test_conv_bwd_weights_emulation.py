"""The kernels of the convolution's weight gradient, their own code on a CPU: fibers for threads, poisoned memory.

It checks indexing, padding, bounds, waits and barriers without a GPU, and says nothing about speed.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import guarded

KERNELS = Path(__file__).parents[1]
EMULATION = Path(__file__).parent / "emulation"
MINUTE = 60
DTYPES = (torch.float16, torch.bfloat16)


class CProblem(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in "batch height width channels kernel_size group_width dtype".split()]


class CDevice(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("capability", "multiprocessors", "max_shared_memory")]


class CPlan(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in "images rows columns tiles_n tiles_y tiles_x".split()]
    _fields_ += [(n, ctypes.c_int) for n in "channel_block channel_blocks slices stages shared_memory".split()]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    locate = [sys.executable, str(KERNELS / "cmake/locate.py"), "nvcc"]
    nvcc = subprocess.run(locate, capture_output=True, text=True).stdout.strip()
    if not shutil.which("g++") or not nvcc:
        pytest.skip("needs g++ and the CUDA headers")
    folder = tmp_path_factory.mktemp("conv_bwd_weights")
    (folder / "block_fusion").mkdir()
    for source in (*(KERNELS / "csrc/block_fusion").glob("conv_bwd_weights*"), KERNELS / "csrc/block_fusion/params.h"):
        shutil.copy(source, folder / "block_fusion")
    (folder / "common").mkdir()
    for stand_in in ("ptx.cuh", "launch.cuh", "cuda_on_cpu.h"):
        shutil.copy(EMULATION / stand_in, folder / "common")
    include = Path(nvcc).parents[1] / "include"
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-DEMULATED=block_fusion"]
    command += [f"-I{folder}", f"-I{EMULATION}", f"-I{include}", f"-I{include / 'cccl'}"]
    library = folder / "emulation.so"
    source = EMULATION / "conv_bwd_weights/emulate.cpp"
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=10 * MINUTE)
    return ctypes.CDLL(str(library))


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
