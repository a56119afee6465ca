"""The Hopper convolution with LayerNorm, its own code on a CPU: fibers for threads, C++ for the instructions used.

It checks indexing, bounds, barriers and the exchange between a cluster's blocks without a GPU; shared memory is
poisoned and warps run in either order. It says nothing about speed, nor about what the hardware asks of them.
"""

import ctypes
import mmap

import pytest
import torch
import torch.nn.functional as F
from emulated import CBlockProblem, CBlockTensors, library


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    sources = [f"block_fusion/{file}" for file in ("params.h", "conv_norm_extras.h", "*conv_norm*sm90*")]
    own = [f"conv_norm_sm90/{stand_in}.cuh" for stand_in in ("again", "grid_sm90", "sm90")]
    stand_ins = {"common": ("ptx.cuh", "cuda_on_cpu.h", *own)}
    return library("conv_norm_sm90", "block_fusion", tmp_path_factory, sources, stand_ins, "-O2", "-Dsm90=sm80")


def guarded(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy that ends where its pages end: what follows can't be read."""
    if tensor is None:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    body = -(-size // page) * page
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, body + 2 * page, protection, flags, -1, 0)
    libc.mprotect(start, page, 0)
    libc.mprotect(start + page + body, page, 0)
    memory = (ctypes.c_char * size).from_address(start + page + body - size)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def conv_norm(x, weight, bias, norm_weight, norm_bias, norm, dtype):
    def cast(t):
        return None if t is None else t.to(dtype)

    channels, kernel_size = x.shape[-1], weight.shape[-1]
    a = F.conv2d(
        cast(x).permute(0, 3, 1, 2),
        cast(weight),
        cast(bias),
        padding=kernel_size // 2,
        groups=channels // weight.shape[1],
    ).permute(0, 2, 3, 1)
    return F.layer_norm(a, (channels,), cast(norm_weight), cast(norm_bias), 1e-6) if norm else a


def worst_ratio(result, exact, peer, dtype) -> float:
    """Largest error over its bound, twice PyTorch's plus two quanta, of any pixel's group of 8 channels."""
    quantum = 2.0 ** (-11 if dtype == torch.float16 else -8)

    def size(t):
        return t.double().reshape(-1, 8).norm(dim=1)

    bound = 2 * size(peer - exact) + 2 * quantum * size(exact)
    ratio = size(result - exact) / bound
    return ratio.max().item() if torch.isfinite(ratio).all() else float("inf")


CASES = [
    # batch, height, width, channels, filter size, group width, multiprocessors, blocks of a cluster, norm
    (1, 7, 7, 32, 7, 1, 1, 1, True),
    (9, 7, 7, 24, 7, 1, 1, 1, True),
    (2, 20, 8, 40, 7, 1, 132, 2, True),
    (5, 7, 7, 72, 7, 1, 3, 3, True),
    (2, 14, 14, 32, 7, 1, 1, 1, False),
    (3, 13, 17, 32, 7, 1, 1, 1, True),
    (1, 28, 28, 64, 7, 1, 132, 2, True),
    (1, 16, 56, 32, 7, 1, 1, 1, True),
    (2, 1, 5, 16, 7, 1, 132, 1, True),
    (4, 3, 9, 104, 7, 1, 132, 4, True),
    (1, 1, 1, 32, 3, 8, 132, 1, True),
    (9, 7, 7, 64, 3, 8, 1, 1, True),
    (1, 14, 14, 96, 3, 8, 132, 1, False),
    (3, 13, 17, 32, 3, 16, 1, 1, True),
    (1, 9, 70, 32, 5, 8, 2, 1, True),
    (1, 9, 13, 160, 5, 16, 132, 1, True),
    (2, 3, 900, 128, 3, 8, 132, 1, True),
]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_it_computes_convolution_and_norm(emulator, case):
    batch, height, width, channels, kernel_size, group_width, multiprocessors, cluster, norm = CASES[case]
    dtype = (torch.float16, torch.bfloat16)[case % 2]
    generator = torch.Generator().manual_seed(case)

    def random(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    x = guarded(random(batch, height, width, channels).to(dtype))
    weight = random(channels, group_width, kernel_size, kernel_size, scale=(group_width * kernel_size**2) ** -0.5).to(
        dtype
    )
    packed = guarded(weight.permute(2, 3, 0, 1).contiguous())
    bias = guarded(random(channels, scale=0.2)) if case % 3 else None
    norm_weight, norm_bias = (
        (guarded(1 + random(channels, scale=0.2)), guarded(random(channels))) if case % 4 else (None, None)
    )
    a = guarded(torch.full_like(x, float("nan")))
    problem = CBlockProblem(batch, height, width, channels, 4 * channels, kernel_size, group_width, case % 2, 2, norm)
    pointers = [None if t is None else t.data_ptr() for t in (x, packed, bias, norm_weight, norm_bias)]
    tensors = CBlockTensors(*pointers, *[None] * 7, 1e-6)
    results = []
    for backwards in (0, 1):
        a.fill_(float("nan"))
        call = (ctypes.byref(problem), ctypes.byref(tensors), ctypes.c_void_p(a.data_ptr()), multiprocessors, backwards)
        assert emulator.run(*call) == cluster
        results.append(a.clone())
    assert torch.equal(*results), "depends on the order of the warps"
    arguments = (x, weight, bias, norm_weight, norm_bias, norm)
    exact, peer = conv_norm(*arguments, torch.float64), conv_norm(*arguments, dtype)
    assert worst_ratio(results[0], exact, peer, dtype) <= 1


IMAGES = [
    # batch, height, width, channels, norm, extras of training
    (2, 14, 14, 40, True, True),
    (1, 7, 7, 1096, True, False),
    (3, 7, 7, 72, True, True),
    (2, 14, 14, 384, True, False),
    (2, 7, 7, 32, False, True),
    (1, 14, 14, 8, False, False),
    (2, 1, 14, 16, True, True),
    (2, 2, 7, 24, True, False),
    (2, 3, 14, 24, True, True),
    (1, 19, 7, 520, True, True),
]


@pytest.mark.parametrize("case", range(len(IMAGES)), ids=lambda i: "-".join(map(str, IMAGES[i])))
def test_whole_images(emulator, case):
    batch, height, width, channels, norm, extras = IMAGES[case]
    dtype = (torch.float16, torch.bfloat16)[case % 2]
    generator = torch.Generator().manual_seed(case)

    def random(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    x = guarded(random(batch, height, width, channels).to(dtype))
    weight = random(channels, 1, 7, 7, scale=1 / 7).to(dtype)
    packed = guarded(weight.permute(2, 3, 0, 1).contiguous())
    bias = guarded(random(channels, scale=0.2)) if case % 3 else None
    affine = (guarded(1 + random(channels, scale=0.2)), guarded(random(channels))) if case % 4 else (None, None)
    residual = guarded(random(batch, height, width, channels).to(dtype)) if extras and not norm else None
    rstd = guarded(torch.full((batch * height * width,), float("nan"))) if extras and norm else None
    a = guarded(torch.full_like(x, float("nan")))
    problem = CBlockProblem(batch, height, width, channels, 4 * channels, 7, 1, case % 2, 2, norm)
    pointers = [None if t is None else t.data_ptr() for t in (x, packed, bias, *affine)]
    tensors = CBlockTensors(*pointers, *[None] * 7, 1e-6)
    training = (ctypes.c_void_p * 2)(*(None if t is None else t.data_ptr() for t in (residual, rstd)))
    results = []
    for backwards in (0, 1):
        a.fill_(float("nan"))
        arguments = (ctypes.byref(problem), ctypes.byref(tensors), ctypes.c_void_p(a.data_ptr()), training, backwards)
        assert emulator.run_images(*arguments) == 1
        results.append(a.clone())
    assert torch.equal(*results), "depends on the order of the warps"
    exact = conv_norm(x, weight, bias, *affine, norm, torch.float64)
    peer = conv_norm(x, weight, bias, *affine, norm, dtype)
    if residual is not None:
        exact, peer = exact + residual.double(), peer + residual
    assert worst_ratio(results[0], exact, peer, dtype) <= 1
    if rstd is not None:
        plain = conv_norm(x, weight, bias, None, None, False, torch.float64)
        expected = (plain.var(-1, unbiased=False) + 1e-6).rsqrt().flatten()
        torch.testing.assert_close(rstd.double(), expected, rtol=5e-3, atol=0)
