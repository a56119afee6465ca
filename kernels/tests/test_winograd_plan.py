"""How Winograd's convolution would run on a device, asked without one."""

import pytest
import torch

import convfirst_kernels

LIMIT = 256 << 20  # bytes of the workspace
H200 = (132, 232448)  # multiprocessors, bytes of shared memory a block
RTX_3090 = (82, 101376)


def plan(batch, side, channels, outputs, algorithm, dtype="float32", device=H200):
    shape = (batch, side, side, channels, outputs, 1)
    return torch.ops.convfirst.plan_winograd(*shape, dtype, algorithm, *device)


@pytest.mark.parametrize("algorithm", ["f2", "f4"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "problem",
    [(1, 14, 512, 512), (8, 28, 512, 512), (64, 224, 64, 64), (64, 112, 128, 70), (1, 1, 20, 1), (3, 9, 2048, 8)],
)
def test_split_plans_fit(problem, dtype, algorithm):
    batch, side, channels, outputs = problem
    answer = plan(*problem, algorithm, dtype, RTX_3090)  # too little shared memory for the fused kernel
    path, *numbers = answer.split()
    rows, columns, splits, chunk = map(int, numbers)
    assert path == "split" and chunk % rows == 0
    padded, m, slice = -(-outputs // 64) * 64, int(algorithm[1]), 16 if dtype == "float32" else 32
    assert padded % columns == 0 and 1 <= splits <= 4
    slices = -(-channels // slice)
    assert splits <= slices
    transformed = slices * 64 + splits * padded * 4  # bytes of a tile and point
    assert chunk * (m + 2) ** 2 * transformed <= LIMIT or chunk == rows
    tiles = batch * (-(-side // m)) ** 2
    assert chunk - rows < tiles


def test_the_fused_kernel_is_for_few_channels():
    assert plan(8, 224, 3, 64, "f4") == "fused"
    assert plan(8, 224, 64, 64, "f2") == "fused"
    assert plan(8, 224, 64, 64, "f4").startswith("split")
    assert plan(8, 224, 3, 64, "f2", "float16").startswith("split")
    assert plan(8, 224, 3, 64, "f4", device=RTX_3090).startswith("split")
    assert plan(1, 14, 3, 64, "f4").startswith("split")  # one block would run on one multiprocessor


def test_the_fused_kernel_of_16_bits_runs_on_its_path():
    problem = (8, 56, 256, 256)
    assert plan(*problem, "f2", "float16").startswith("split")
    with convfirst_kernels.force_path("sm90"):
        assert plan(*problem, "f2", "float16") == "fused"
        assert plan(*problem, "f2", "float16", RTX_3090).startswith("split")  # too little shared memory
        assert plan(8, 56, 256, 20, "f2", "float16").startswith("split")  # no multiple of 8
        assert plan(8, 56, 3, 64, "f2", "float16").startswith("split")
        assert plan(8, 1, 64, 64, "f2", "float16").startswith("split")  # one column
        assert plan(*problem, "f2").startswith("split")  # float32's kernels are the same on every path
    with convfirst_kernels.force_path("sm80"):
        assert plan(*problem, "f2", "float16").startswith("split")
