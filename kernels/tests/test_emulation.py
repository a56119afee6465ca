"""The portable kernels' own code on a CPU: threads as fibers, ldmatrix and mma.sync in C++ (folder emulation).

It checks indexing, bounds, waits and barriers of every kernel without a GPU: copies land either at once or as late as
the waits allow, and the warps run in either order. It says nothing about speed or about the hardware's tanh.
"""

import pytest
import torch
from cases import Case, guards_intact, inputs, oracle, worst_ratio
from emulated import ACTIVATIONS, DTYPES, H100, RTX_3090, CBlockProblem, CBlockTensors, CDevice, Emulated, emulated

from convfirst_kernels import reference
from convfirst_kernels.planner import Problem


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Emulated:
    return emulated("block_fusion", tmp_path_factory)


def emulate(rows: Emulated, name: str, case: Case, arguments: tuple, device: CDevice, at_once: bool, backwards: bool):
    """The row's result, or None where it doesn't cover the case."""
    p = case.problem
    problem = CBlockProblem(
        p.batch, p.height, p.width, p.channels, p.hidden, p.kernel_size, p.group_width,
        DTYPES.index(p.dtype), ACTIVATIONS.index(p.activation), p.has_norm,
    )  # fmt: skip
    y = torch.full_like(arguments[0], float("nan"))
    pointers = [None if a is None else a.data_ptr() for a in (*arguments[:11], y)]
    covered = rows.launch(name, problem, CBlockTensors(*pointers, arguments[13]), device, at_once, backwards)
    return y if covered else None


def problem(size, channels, hidden, kernel_size, group_width, dtype=0, activation=1, norm=True, batch=1) -> Problem:
    names = DTYPES[dtype], ACTIVATIONS[activation]
    return Problem(batch, *size, channels, hidden, kernel_size, group_width, *names, norm)


CASES = [
    ("sm80_conv_first_c32", problem((3, 5), 32, 192, 5, 8, batch=9), True, True),
    ("sm80_conv_first_c64", problem((6, 90), 64, 256, 3, 8), False, False),
    ("sm80_conv_first_c64", problem((4, 100), 64, 256, 5, 16, 1, 2), True, True),
    ("sm80_conv_first_c96", problem((7, 11), 96, 384, 3, 16, 0, 0, False), False, True),
    ("sm80_conv_first_c128", problem((1, 1), 128, 512, 5, 8, 1, 1, batch=3), True, False),
    ("sm80_conv_first_c192", problem((3, 4), 192, 1152, 3, 8), False, False),
    ("sm80_conv_first_c256", problem((5, 7), 256, 1024, 5, 16, 0, 2, batch=3), False, True),
    ("sm80_conv_first_c384", problem((2, 3), 384, 1536, 3, 8, 1), True, False),
    ("sm80_conv_first_split_128x128", problem((3, 5), 512, 2048, 3, 8), False, False),
    ("sm80_conv_first_split_96x128", problem((2, 2), 512, 2048, 5, 16, 1, 0, False), True, True),
    ("sm80_convnext_c48", problem((7, 7), 40, 160, 7, 1, 1, 2, batch=5), False, True),
    ("sm80_convnext_c64", problem((9, 1), 64, 256, 7, 1, 0, 2, batch=2), True, False),
    ("sm80_convnext_c96", problem((6, 70), 96, 384, 7, 1, 0, 2), False, False),
    ("sm80_convnext_c128", problem((1, 30), 104, 416, 7, 1, 0, 2, False), True, True),
    ("sm80_convnext_c192", problem((5, 9), 160, 640, 7, 1, 1, 2), False, False),
    ("sm80_convnext_c256", problem((3, 2), 256, 1024, 7, 1, 0, 2), False, True),
    ("sm80_convnext_c384", problem((2, 3), 320, 1280, 7, 1, 0, 2), True, False),
    ("sm80_convnext_split_128x128", problem((3, 5), 520, 2080, 7, 1, 1, 2), False, True),
    ("sm80_conv_first_split_persistent", problem((14, 14), 256, 1024, 3, 8, batch=2), False, True),
    ("sm80_convnext_split_persistent", problem((13, 5), 200, 808, 7, 1, 1, 2, batch=4), False, False),
    ("sm80_conv_first_split_persistent", problem((15, 13), 128, 768, 3, 8, batch=2), False, False),
    ("sm80_conv_first_split_persistent", problem((14, 14), 128, 64, 3, 8, batch=4), False, True),  # one slice a tile
    ("sm80_conv_first_split_persistent", problem((20, 10), 192, 768, 5, 8, 1, 2), True, True),
    ("sm80_conv_first_split_persistent", problem((7, 7), 160, 640, 3, 16, 0, 0, False, batch=5), False, True),
    ("sm80_convnext_split_persistent", problem((9, 17), 136, 544, 7, 1, 0, 2), True, False),
    ("sm80_convnext_split_persistent", problem((14, 14), 136, 64, 7, 1, 1, 2, batch=3), False, True),
    ("sm80_convnext_split_persistent", problem((7, 7), 136, 64, 7, 1, 0, 2, False, batch=3), False, False),
    ("sm80_convnext_split_persistent", problem((7, 7), 520, 64, 7, 1, 0, 2, batch=2), False, True),
    ("sm80_convnext_split_persistent", problem((2, 14), 128, 64, 7, 1, 0, 2), True, True),
    ("sm80_convnext_split_persistent", problem((1, 7), 1032, 64, 7, 1, 1, 2), False, False),
    ("sm80_convnext_split_persistent", problem((28, 28), 128, 64, 7, 1, 0, 2, batch=1), False, True),
    ("sm80_convnext_split_persistent", problem((5, 8), 192, 64, 7, 1, 1, 2, batch=9), False, True),
    # W stays in the ring, in tiles of 256 columns, and the projection has tiles of 256 rows
    ("sm80_convnext_split_persistent", problem((16, 16), 192, 512, 7, 1, 0, 2, batch=2), False, True),
    ("sm80_conv_first_split_persistent", problem((16, 31), 192, 512, 3, 8, 1, 1), True, False),
    ("sm80_conv_first_split_persistent", problem((16, 31), 160, 480, 3, 8, 0, 0), False, True),
    # the activation under a tile's own last slice
    ("sm80_conv_first_split_persistent", problem((24, 32), 512, 256, 3, 8), True, False),
    # depthwise taps as diagonal matrices (no other covers such channels): parts of a tile side by side, and in a column
    ("sm80_convnext_split_persistent", problem((13, 33), 520, 64, 7, 1, 0, 2), False, False),
    ("sm80_convnext_split_persistent", problem((26, 9), 520, 64, 7, 1, 1, 2, batch=1), True, True),
]
TWO_MULTIPROCESSORS = CDevice(90, 2, 232448)  # every block of a persistent kernel has several tiles


@pytest.mark.parametrize(("row", "problem", "at_once", "backwards"), CASES)
def test_a_kernel_computes_the_block(rows, row, problem, at_once, backwards):
    case = Case(problem, affine=problem.has_norm, sample_scale=problem.batch > 1)
    arguments = inputs(case, seed=7, device="cpu")
    result = emulate(rows, row, case, arguments, TWO_MULTIPROCESSORS, at_once, backwards)
    assert result is not None
    peer = reference.conv_first_block(*arguments)
    assert worst_ratio(result, oracle(arguments), peer) <= 1


def test_without_optional_tensors(rows):
    case = Case(problem((4, 4), 64, 256, 3, 8), biases=False, affine=False, layer_scale=False)
    arguments = inputs(case, seed=8, device="cpu")
    result = emulate(rows, "sm80_conv_first_c64", case, arguments, H100, False, False)
    assert worst_ratio(result, oracle(arguments), reference.conv_first_block(*arguments)) <= 1


def test_less_shared_memory_splits_the_block(rows):
    """At 99 KB a block, C = 256 does not fit one launch; three launches take its place."""
    case = Case(problem((2, 3), 256, 1024, 3, 8))
    arguments = inputs(case, seed=9, device="cpu")
    assert emulate(rows, "sm80_conv_first_c256", case, arguments, RTX_3090, False, False) is None
    assert emulate(rows, "sm80_conv_first_split_96x128", case, arguments, H100, False, False) is None
    result = emulate(rows, "sm80_conv_first_split_96x128", case, arguments, RTX_3090, False, False)
    assert worst_ratio(result, oracle(arguments), reference.conv_first_block(*arguments)) <= 1
    assert guards_intact(arguments[0])
