"""The kernels between residual blocks on a CPU, their own code, as test_emulation.py does for the blocks'."""

import ctypes

import pytest
import torch
from cases import guards_intact, worst_ratio
from emulated import ACTIVATIONS, DTYPES, built
from patch_cases import Patch, module, parts_of, patch_inputs

import convfirst_kernels as ck
from convfirst_kernels import patches

_POINTER, _INT, _LONG, _FLOAT, _BOOL = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_bool


class CDevice(ctypes.Structure):
    _fields_ = [("multiprocessors", _INT), ("max_shared_memory", _INT)]


class CImage(ctypes.Structure):
    _fields_ = [("data", _POINTER), *((n, _INT) for n in ("batch", "height", "width"))]
    _fields_ += [(f"stride_{n}", _LONG) for n in "nchw"]


class CStem(ctypes.Structure):
    _fields_ = [("x", CImage), ("dim", _INT), ("dtype", _INT), ("activation", _INT), ("has_norm", _BOOL)]
    _fields_ += [("eps1", _FLOAT), ("eps2", _FLOAT), *((f"tensor{i}", _POINTER) for i in range(8))]


class CPatchStem(ctypes.Structure):
    _fields_ = [("x", CImage), ("dim", _INT), ("dtype", _INT), ("has_norm", _BOOL), ("eps", _FLOAT)]
    _fields_ += [(f"tensor{i}", _POINTER) for i in range(5)]


class CDownsample(ctypes.Structure):
    _fields_ = [("x", _POINTER), *((n, _INT) for n in ("batch", "height", "width", "channels", "columns", "dtype"))]
    _fields_ += [("has_norm", _BOOL), ("eps", _FLOAT), *((f"tensor{i}", _POINTER) for i in range(3))]


class CGather(ctypes.Structure):
    _fields_ = [("x", _POINTER), *((n, _INT) for n in ("batch", "height", "width", "channels", "dtype"))]
    _fields_ += [("has_norm", _BOOL), ("eps", _FLOAT), ("patches", _POINTER)]


H100 = CDevice(2, 232448)  # two multiprocessors: several tiles a block
A100 = CDevice(2, 166912)
RTX_3090 = CDevice(2, 101376)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return ctypes.CDLL(str(built("patch", tmp_path_factory)))


def image(x: torch.Tensor) -> CImage:
    return CImage(x.data_ptr(), x.shape[0], *x.shape[2:], *x.stride())


def emulate(library, kind: str, x, packed: tuple, device=H100, at_once=False, backwards=False) -> torch.Tensor | None:
    """The kernel's result between NaNs, or None where it does not cover the case."""
    dtype = DTYPES.index(str(x.dtype).split(".")[1])
    pointers = [a.data_ptr() for a in packed if isinstance(a, torch.Tensor)]
    reference = {"gather": patches.normalised_patches}.get(kind) or getattr(patches, kind)
    y = reference(x, *packed)
    if y.dim() == 4:
        y = y.contiguous(memory_format=torch.channels_last)
    y = torch.full_like(y, float("nan"))
    if kind == "stem":
        activation, eps1, eps2, has_norm = packed[-4:]
        arguments = CStem(
            image(x), y.shape[1], dtype, ACTIVATIONS.index(activation), has_norm, eps1, eps2, *pointers, y.data_ptr()
        )
    elif kind == "patch_stem":
        arguments = CPatchStem(image(x), y.shape[1], dtype, packed[-1], packed[-2], *pointers, y.data_ptr())
    elif kind == "downsample":
        n, c, h, w = x.shape
        arguments = CDownsample(
            x.data_ptr(), n, h, w, c, y.shape[1], dtype, packed[-1], packed[-2], *pointers, y.data_ptr()
        )
    else:
        n, c, h, w = x.shape
        arguments = CGather(x.data_ptr(), n, h, w, c, dtype, packed[-1], packed[-2], y.data_ptr())
    status = getattr(library, f"emulate_{kind}")(ctypes.byref(arguments), ctypes.byref(device), at_once, backwards)
    assert status in (0, -1)
    return y if status == 0 else None


CASES = [
    (Patch("stem", 32, 2, 37, 40), True, False),
    (Patch("stem", 64, 1, 40, 72), False, True),
    (Patch("stem", 64, 2, 35, 33, "bfloat16", "batchnorm", "gelu"), True, True),
    (Patch("stem", 64, 1, 1, 2, layout="contiguous"), False, False),
    (Patch("stem", 96, 1, 32, 34, "bfloat16", activation="relu", layout="contiguous"), False, False),
    (Patch("stem", 128, 1, 9, 40), False, True),
    (Patch("patch_stem", 48, 1, 9, 40), False, False),
    (Patch("patch_stem", 64, 3, 17, 22, "bfloat16"), True, True),
    (Patch("patch_stem", 80, 1, 4, 7, layout="contiguous"), False, False),
    (Patch("patch_stem", 96, 2, 31, 25, norm="batchnorm"), False, True),
    (Patch("patch_stem", 128, 1, 33, 36, layout="contiguous"), True, False),
    (Patch("downsample", 32, 3, 25, 26), False, False),
    (Patch("downsample", 64, 2, 23, 33, "bfloat16"), False, True),
    (Patch("downsample", 64, 1, 3, 2, norm="batchnorm"), True, False),
]


@pytest.mark.parametrize(("case", "at_once", "backwards"), CASES, ids=str)
def test_a_kernel_computes_the_layer(library, case, at_once, backwards):
    x = patch_inputs(case, 5, device="cpu")
    network = module(case, 4)
    truth = network(x.double())
    _, packed = parts_of(network, x.dtype)
    peer = network(x)
    if case.kind == "downsample":
        packed = (*packed[:2], *packed[3:5])
    result = emulate(library, case.kind, x, packed, H100, at_once, backwards)
    assert result is not None
    assert worst_ratio(result, truth, peer) <= 1
    assert torch.equal(emulate(library, case.kind, x, packed, H100, not at_once, not backwards), result)
    if case.layout == "channels_last":
        assert guards_intact(x)


@pytest.mark.parametrize(
    ("channels", "size", "dtype", "norm"),
    [
        (8, (2, 3), "float16", True),
        (72, (5, 9), "bfloat16", True),
        (256, (4, 6), "float16", True),
        (384, (3, 2), "float16", False),
        (768, (2, 2), "bfloat16", True),
    ],
)
def test_patches(library, channels, size, dtype, norm):
    case = Patch("downsample", channels, 2, *size, dtype)
    x = patch_inputs(case, 5, device="cpu")
    result = emulate(library, "gather", x, (1e-6, norm))
    truth, peer = (patches.normalised_patches(value, 1e-6, norm) for value in (x.double(), x))
    assert worst_ratio(*(value[:, :, None, None] for value in (result, truth, peer))) <= 1


def test_shared_memory_decides_what_is_covered(library):
    """Of a stem, how many teams share a block; of the widest, whether it runs at all."""
    for device, stems, layers in (
        (H100, (32, 64, 96, 128), (32, 64)),
        (A100, (32, 64, 96), (32, 64)),
        (RTX_3090, (32, 64), (32,)),
    ):
        for kind, channels, covered in (
            *(("stem", c, c in stems) for c in (32, 64, 96, 128)),
            *(("downsample", c, c in layers) for c in (32, 64)),
        ):
            case = Patch(kind, channels, 1, 4, 4)
            x, network = patch_inputs(case, 5, device="cpu"), module(case, 4)
            _, packed = parts_of(network, x.dtype)
            packed = (*packed[:2], *packed[3:5]) if kind == "downsample" else packed
            assert (emulate(library, kind, x, packed, device) is not None) == covered, (kind, channels)
            columns, c = (2 * channels, channels) if kind == "downsample" else (channels, 3)
            with ck.force_path("sm80"):
                reason = torch.ops.convfirst.patch_refusal(kind, c, columns, 80, device.max_shared_memory)
            assert (reason == "") == covered, reason


def test_outside_the_image_conv2_sees_zeros(library):
    """conv1's bias there must not reach the result: the padding is of its result, not of the image."""
    case = Patch("stem", 64, 2, 3, 5)
    x, network = patch_inputs(case, 5, device="cpu"), module(case, 4)
    with torch.no_grad():
        network.norm1.bias.add_(4)
    truth = network(x.double())
    _, packed = parts_of(network, x.dtype)
    assert worst_ratio(emulate(library, "stem", x, packed), truth, network(x)) <= 1
