"""The latency path (`sm90_latency_*`): small batches, odd maps and launches that overlap."""

import pytest
import torch
from cases import Case, inputs
from test_block_gpu import check_accuracy

import convfirst_kernels as ck
from convfirst_kernels.planner import Device, Problem, plan

pytestmark = pytest.mark.gpu
WIDTHS = {64: 56, 128: 28, 256: 14}
MAPS = [(1, 1), (7, 7), (13, 17), (14, 14), (28, 28), (56, 56), (225, 193)]


def run(case: Case, seed: int) -> None:
    variant = f"sm90_latency_c{case.problem.channels}"
    if not plan(case.problem, Device.of(0), variant)["chosen"]:
        pytest.skip(f"{variant} does not cover {case}")
    with ck.force_path(variant):
        check_accuracy(case, seed)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("height, width", MAPS)
@pytest.mark.parametrize("channels", WIDTHS)
def test_maps(channels, height, width, dtype, seed):
    run(Case(Problem(1, height, width, channels, 4 * channels, 3, 8, dtype, "silu", True), sample_scale=True), seed)


@pytest.mark.parametrize("norm, affine", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("channels", WIDTHS)
def test_batches(channels, batch, activation, norm, affine, seed):
    side = WIDTHS[channels]
    problem = Problem(batch, side, side, channels, 4 * channels, 3, 8, "float16", activation, norm)
    run(Case(problem, affine=affine, sample_scale=True), seed)


@pytest.mark.parametrize("channels", WIDTHS)
def test_chained(channels, seed):
    """Blocks that follow one another overlap, and give what they give one at a time."""
    side = WIDTHS[channels]
    case = Case(Problem(1, side, side, channels, 4 * channels, 3, 8, "float16", "silu", True))
    variant = f"sm90_latency_c{channels}"
    if not plan(case.problem, Device.of(0), variant)["chosen"]:
        pytest.skip(f"{variant} does not run here")
    blocks = [inputs(case, seed + i)[1:] for i in range(6)]
    first = inputs(case, seed)[0]

    def chain(between) -> torch.Tensor:
        y = first
        for weights in blocks:
            y = torch.ops.convfirst.conv_first_block(y, *weights)
            between()
        return y

    with ck.force_path(variant):
        expected = chain(torch.cuda.synchronize)
        chain(lambda: None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(lambda: None)
        for _ in range(3):
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, expected)
