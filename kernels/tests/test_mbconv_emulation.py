"""The portable MBConv kernel's own code on a CPU, as test_emulation.py does for the conv-first block's."""

import ctypes

import pytest
import torch
from cases import guards_intact, worst_ratio
from emulated import A100, ACTIVATIONS, DTYPES, H100, RTX_3090, CDevice, Emulated, emulated
from mbconv_cases import MBConv, mbconv_inputs, mbconv_oracle

from convfirst_kernels import reference


class CProblem(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "height", "width")]
    _fields_ += [(n, ctypes.c_int) for n in "channels hidden kernel_size group_width dtype activation".split()]


class CTensors(ctypes.Structure):
    _fields_ = [(f"tensor{i}", ctypes.c_void_p) for i in range(9)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Emulated:
    return emulated("mbconv", tmp_path_factory)


def emulate(rows: Emulated, name: str, case: MBConv, arguments: tuple, device: CDevice, at_once: bool, backwards: bool):
    """The row's result, or None where it doesn't cover the case."""
    problem = CProblem(
        case.batch, case.height, case.width, case.channels, case.hidden, 3, case.group_width,
        DTYPES.index(case.dtype), ACTIVATIONS.index(case.activation),
    )  # fmt: skip
    y = torch.full_like(arguments[0], float("nan"))
    pointers = [None if a is None else a.data_ptr() for a in (*arguments[:8], y)]
    return y if rows.launch(name, problem, CTensors(*pointers), device, at_once, backwards) else None


CASES = [
    ("depthwise_c32_p128", MBConv(2, 13, 17, 24, 144), False, False),
    ("depthwise_c32_p128", MBConv(3, 1, 1, 8, 32, activation="gelu", dtype="bfloat16"), True, True),
    ("depthwise_c64_p128", MBConv(3, 7, 7, 40, 240, sample_scale=True), False, True),
    ("depthwise_c64_p128", MBConv(1, 1, 29, 64, 256, activation="relu"), True, False),
    ("depthwise_c96_p128", MBConv(1, 23, 1, 72, 80, dtype="bfloat16"), False, False),
    ("depthwise_c96_p64", MBConv(2, 7, 5, 96, 64, biases=False), True, True),
    ("depthwise_c128_p128", MBConv(3, 7, 7, 112, 112), False, True),
    ("depthwise_c128_p64", MBConv(1, 13, 17, 104, 48, activation="relu"), True, False),
    ("depthwise_c192_p128", MBConv(1, 9, 3, 160, 80, dtype="bfloat16"), True, True),
    ("depthwise_c192_p64", MBConv(2, 5, 7, 192, 64), False, False),
    ("depthwise_c256_p128", MBConv(1, 7, 7, 232, 80, activation="gelu"), False, False),
    ("depthwise_c256_p64", MBConv(2, 3, 5, 256, 48, sample_scale=True), False, True),
    ("depthwise_c384_p64", MBConv(1, 7, 7, 320, 48), True, False),
    ("grouped_c32_p128", MBConv(3, 7, 7, 32, 192, 8), False, False),
    ("grouped_c32_p128", MBConv(1, 13, 17, 16, 80, 16, dtype="bfloat16"), True, True),
    ("grouped_c64_p128", MBConv(1, 6, 90, 64, 64, 8, sample_scale=True), False, True),
    ("grouped_c64_p128", MBConv(5, 1, 1, 48, 192, 16, activation="gelu"), True, False),
    ("grouped_c96_p128", MBConv(1, 1, 29, 96, 112, 16), False, False),
    ("grouped_c96_p64", MBConv(2, 13, 7, 80, 80, 8, activation="relu"), True, True),
    ("grouped_c128_p128", MBConv(1, 23, 1, 128, 96, 8, dtype="bfloat16"), False, True),
    ("grouped_c128_p64", MBConv(1, 13, 17, 112, 48, 16, biases=False), False, False),
    ("grouped_c192_p128", MBConv(2, 7, 7, 160, 80, 8), True, False),
    ("grouped_c192_p64", MBConv(1, 9, 20, 192, 32, 16), False, True),
    ("grouped_c256_p128", MBConv(1, 5, 9, 256, 80, 16, dtype="bfloat16"), False, False),
    ("grouped_c256_p64", MBConv(3, 7, 7, 232, 48, 8), True, True),
    ("grouped_c384_p64", MBConv(1, 6, 11, 384, 48, 8, activation="gelu"), False, False),
]


@pytest.mark.parametrize(("row", "case", "at_once", "backwards"), CASES, ids=lambda value: str(value))
def test_a_kernel_computes_the_block(rows, row, case, at_once, backwards):
    arguments = mbconv_inputs(case, seed=7, device="cpu")
    result = emulate(rows, f"sm80_mbconv_{row}", case, arguments, H100, at_once, backwards)
    assert result is not None
    assert guards_intact(arguments[0])
    assert worst_ratio(result, mbconv_oracle(arguments), reference.mbconv_block(*arguments)) <= 1


def test_every_row_is_tried(rows):
    assert {f"sm80_mbconv_{row}" for row, *_ in CASES} == set(rows.names)


def test_hidden_units_outside_the_image_are_zero(rows):
    """The convolution pads the hidden tensor: a bias there, or another image's pixels, must not reach the result."""
    case = MBConv(2, 2, 2, 16, 32)
    x, expand, expand_bias, *rest = mbconv_inputs(case, seed=3, device="cpu")
    arguments = (x, expand, expand_bias + 4, *rest)
    result = emulate(rows, "sm80_mbconv_depthwise_c32_p128", case, arguments, H100, False, False)
    assert worst_ratio(result, mbconv_oracle(arguments), reference.mbconv_block(*arguments)) <= 1


@pytest.mark.parametrize(
    ("row", "channels", "covered"),
    [
        ("depthwise_c96_p128", 96, {"h100": True, "a100": True, "rtx3090": True}),
        ("grouped_c96_p128", 96, {"h100": True, "a100": True, "rtx3090": False}),
        ("grouped_c96_p64", 96, {"h100": True, "a100": True, "rtx3090": True}),
        ("depthwise_c192_p64", 192, {"h100": True, "a100": True, "rtx3090": True}),
        ("depthwise_c256_p64", 256, {"h100": True, "a100": True, "rtx3090": False}),
        ("depthwise_c256_p128", 256, {"h100": True, "a100": False, "rtx3090": False}),
    ],
)
def test_shared_memory_decides_what_is_covered(rows, row, channels, covered):
    case = MBConv(1, 2, 3, channels, 32, 8 if row.startswith("grouped") else 1)
    arguments = mbconv_inputs(case, seed=9, device="cpu")
    devices = {"h100": H100, "a100": A100, "rtx3090": RTX_3090}
    results = {n: emulate(rows, f"sm80_mbconv_{row}", case, arguments, d, False, False) for n, d in devices.items()}
    assert {name: result is not None for name, result in results.items()} == covered
