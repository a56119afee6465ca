"""Winograd's kernels, their own code on a CPU: fibers for threads, poisoned shared memory and workspace.

It checks indexing, padding, bounds and barriers without a GPU, and says nothing about speed.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from emulated import library

from convfirst_kernels.winograd import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("none", "relu", "silu", "gelu")
ACTIVATE = {"none": lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


class CProblem(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in "batch height width channels outputs padding dtype activation".split()]


class CFilter(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("outputs", ctypes.c_int), ("channels", ctypes.c_int)]
    _fields_ += [(f"{axis}_stride", ctypes.c_int64) for axis in "kcrs"]


class CTensors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "filter", "bias", "y")]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    stand_ins = {"common": ("ptx.cuh", "launch.cuh", "cuda_on_cpu.h")}
    return library("winograd", "winograd", tmp_path_factory, ["winograd"], stand_ins, "-O1")


def transformed(emulator, weight: torch.Tensor, m: int) -> torch.Tensor:
    k, c = weight.shape[:2]
    slice = 64 // weight.element_size()
    filter = torch.full(((m + 2) ** 2, -(-k // 64) * 64, -(-c // slice) * slice), float("nan"), dtype=weight.dtype)
    view = CFilter(weight.data_ptr(), k, c, *weight.stride())
    assert (
        emulator.emulate_filter(m, DTYPES.index(weight.dtype), ctypes.byref(view), ctypes.c_void_p(filter.data_ptr()))
        == 0
    )
    return filter


CASES = [
    # batch, height, width, channels, outputs, padding, activation, plan
    (2, 7, 9, 5, 6, 1, "none", ""),
    (1, 6, 5, 20, 70, 0, "relu", "split 64 64 2 64"),
    (3, 5, 7, 33, 8, 2, "gelu", "split 32 64 3 32"),
    (1, 13, 11, 16, 64, 1, "silu", "split 128 64 1 128"),
    (1, 9, 8, 36, 128, 1, "none", "split 128 128 1 128"),
    (1, 1, 1, 1, 1, 1, "none", ""),
    (2, 17, 19, 13, 67, 1, "relu", "fused"),
    (1, 3, 34, 3, 5, 0, "silu", "fused"),
    (3, 6, 6, 24, 33, 2, "none", "fused"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).replace(" ", "_"))
@pytest.mark.parametrize(("m", "at_once", "backwards"), [(2, False, False), (4, True, True), (4, False, True)])
def test_is_the_convolution(emulator, case, m, at_once, backwards):
    batch, height, width, channels, outputs, padding, activation, plan = case
    generator = torch.Generator().manual_seed(sum(case[:5]))
    x = torch.randn(batch, height, width, channels, generator=generator)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    exact = ACTIVATE[activation](
        F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), bias.double(), padding=padding)
    ).permute(0, 2, 3, 1)
    y = torch.full(exact.shape, float("nan"))
    emulator.emulate_order(at_once, backwards)
    filter = transformed(emulator, weight, m)
    problem = CProblem(*case[:6], 0, ACTIVATIONS.index(activation))
    tensors = CTensors(x.data_ptr(), filter.data_ptr(), bias.data_ptr(), y.data_ptr())
    assert emulator.emulate_conv(m, ctypes.byref(problem), plan.encode(), ctypes.byref(tensors)) == 0
    torch.testing.assert_close(y.double(), exact, atol=2e-5 * channels**0.5 * 3, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", [c for c in CASES if c[-1] != "fused"], ids=lambda c: "-".join(map(str, c)))
def test_agrees_with_the_reference_in_16_bits(emulator, case, dtype):
    """Both round the transformed factors alike, so only the order of the sums and the last rounding differ."""
    batch, height, width, channels, outputs, padding, activation, plan = case
    generator = torch.Generator().manual_seed(sum(case[:5]))
    x = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    expected = reference.winograd_conv2d(x, weight, bias, padding, "f2", activation).permute(0, 2, 3, 1)
    x = x.permute(0, 2, 3, 1).contiguous()
    y = torch.full(expected.shape, float("nan"), dtype=dtype)
    emulator.emulate_order(False, True)
    filter = transformed(emulator, weight, 2)
    problem = CProblem(*case[:6], DTYPES.index(dtype), ACTIVATIONS.index(activation))
    tensors = CTensors(x.data_ptr(), filter.data_ptr(), bias.data_ptr(), y.data_ptr())
    assert emulator.emulate_conv(2, ctypes.byref(problem), plan.encode(), ctypes.byref(tensors)) == 0
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, atol=4 * eps, rtol=2 * eps)


@pytest.mark.parametrize(
    # batch, height, width, channels, outputs, padding, tiles of a chunk, splits (or 0 and multiprocessors)
    "case",
    [
        (2, 7, 9, 5, 6, 1, 0, 1),
        (1, 13, 11, 20, 70, 0, 32, 2),
        (3, 6, 8, 128, 128, 2, 16, 1),
        (2, 20, 20, 36, 12, 1, 0, 132),
    ],
    ids=lambda c: "-".join(map(str, c)),
)
@pytest.mark.parametrize(("at_once", "backwards"), [(False, False), (True, True)])
def test_is_the_gradient_of_the_filter(emulator, case, at_once, backwards):
    batch, height, width, channels, outputs, padding, chunk, splits = case
    generator = torch.Generator().manual_seed(sum(case))
    x = torch.randn(batch, height, width, channels, generator=generator)
    weight = torch.zeros(outputs, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x.double().permute(0, 3, 1, 2), weight, padding=padding)
    grad = torch.randn(y.permute(0, 2, 3, 1).shape, generator=generator)
    (exact,) = torch.autograd.grad(y, weight, grad.double().permute(0, 3, 1, 2))
    result = torch.full(exact.shape, float("nan"))
    emulator.emulate_order(at_once, backwards)
    problem = CProblem(*case[:6], 0, 0)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, grad, result)]
    assert emulator.emulate_weight_gradient(ctypes.byref(problem), ctypes.c_int64(chunk), splits, *pointers) == 0
    torch.testing.assert_close(result.double(), exact, atol=1e-4, rtol=1e-5)
