"""A stage in one launch against float64, repeated, poisoned, in graphs, and in a network."""

import convfirst.models  # noqa: F401
import pytest
import timm
import torch
from cases import Case, guarded, guards_intact, inputs, worst_ratio

import convfirst_kernels as ck
from convfirst_kernels import acceleration, patches, reference, stages
from convfirst_kernels.block import BlockWeights
from convfirst_kernels.planner import Problem

pytestmark = pytest.mark.gpu
SIDES = {64: 56, 128: 28, 256: 14, 512: 7}


class Stage:
    """Random blocks, and a downsampling before them where ``begins``."""

    def __init__(self, problem: Problem, count: int, begins: bool, seed: int, biases: bool = True):
        p = problem
        case = Case(p, biases=biases, affine=False, layer_scale=biases)
        drawn = [list(inputs(case, seed + i)) for i in range(count)]
        for arguments in drawn:
            arguments[7] = (arguments[7] * 0.3).contiguous()  # many blocks, and values stay of one size
        self.x, self.blocks, self.down = drawn[0][0], [arguments[1:] for arguments in drawn], None
        self.weights = stages.pack_stage([BlockWeights(*b[:9], *b[11:]) for b in self.blocks])
        if begins:
            dtype, half = self.x.dtype, p.channels // 2
            generator = torch.Generator("cuda").manual_seed(seed)
            self.x = guarded(p.batch, half, 2 * p.height + 1, 2 * p.width, dtype, "cuda")
            self.x.copy_(torch.randn(self.x.shape, generator=generator, device="cuda") + 0.5)
            weight = torch.randn(p.channels, 4 * half, generator=generator, device="cuda") * (4 * half) ** -0.5
            bias = torch.randn(p.channels, generator=generator, device="cuda")
            self.first = weight.to(dtype), bias, 1e-6, p.has_norm
            self.down = stages.pack_down(*self.first)
        self.workspace = stages.workspace(self.x.device)
        self.workspace[256:] = 255  # what an exchange left behind is no flag of this launch

    def run(self) -> torch.Tensor:
        return stages.run_stage(self.x, self.weights, self.down, self.workspace)

    def chain(self, dtype: torch.dtype) -> torch.Tensor:
        """By the reference, block by block, in PyTorch's own rounding of each."""

        def wide(tensor):
            return tensor.double() if torch.is_tensor(tensor) and dtype == torch.float64 else tensor

        y = wide(self.x)
        if self.down is not None:
            y = patches.downsample(y, *map(wide, self.first))
        for arguments in self.blocks:
            y = reference.conv_first_block(y, *map(wide, arguments))
        return y


def covered(problem: Problem, count: int) -> None:
    p = problem
    reason = stages.refusal(p.batch, p.height, p.width, p.channels, count, p.dtype, p.activation, 0)
    if reason:
        pytest.skip(reason)


def check(problem: Problem, count: int, begins: bool, seed: int, biases: bool = True) -> None:
    covered(problem, count)
    stage = Stage(problem, count, begins, seed, biases)
    torch.full((problem.batch * problem.height * problem.width, problem.channels), float("nan"), device="cuda")
    y = stage.run()
    torch.cuda.synchronize()
    assert guards_intact(stage.x), "wrote outside its input"
    ratio = worst_ratio(y, stage.chain(torch.float64), stage.chain(y.dtype))
    assert ratio <= 1, f"error {ratio:.2f}x its bound (seed {seed})"
    for _ in range(3):
        assert torch.equal(y, stage.run()), "differs from run to run"


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("channels", SIDES)
def test_network_shapes(channels, dtype, begins, seed):
    if begins and channels < stages.DOWN_CHANNELS:
        pytest.skip("such a stage begins with a launch of its own")
    side = SIDES[channels]
    check(Problem(1, side, side, channels, 4 * channels, 3, 8, dtype, "silu", True), 4, begins, seed)


@pytest.mark.parametrize("batch, height, width", [(1, 1, 1), (1, 7, 7), (1, 13, 3), (3, 1, 13), (1, 2, 31), (7, 3, 3)])
@pytest.mark.parametrize("channels", SIDES)
def test_maps(channels, batch, height, width, seed):
    problem = Problem(batch, height, width, channels, 4 * channels, 3, 8, "float16", "gelu", True)
    check(problem, 3, channels >= stages.DOWN_CHANNELS, seed, biases=False)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("channels", SIDES)
def test_activations(channels, activation, norm, seed):
    problem = Problem(1, 5, 7, channels, 4 * channels, 3, 8, "float16", activation, norm)
    check(problem, 2, channels >= stages.DOWN_CHANNELS, seed)


@pytest.mark.parametrize("channels", SIDES)
def test_many_launches_of_changing_size(channels, seed):
    """Stages of other sizes and counts leave flags in one workspace, and no launch takes another's for its own."""
    found = []
    for height, width, count in ((7, 7, 5), (2, 9, 1), (5, 8, 4)):
        problem = Problem(1, height, width, channels, 4 * channels, 3, 8, "float16", "silu", True)
        covered(problem, count)
        found.append(Stage(problem, count, False, seed + count))
    expected = [stage.run() for stage in found]
    for stage in found:
        stage.workspace = found[0].workspace
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [stage.run() for _ in range(3) for stage in found]
    for _ in range(20):
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        for i, y in enumerate(results):
            assert torch.equal(y, expected[i % 3])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("channels", SIDES)
def test_not_a_number(channels, dtype, seed):
    """It spreads no further than the convolutions reach, and is not taken for what is not there yet, all ones."""
    problem = Problem(1, 7, 7, channels, 4 * channels, 3, 8, dtype, "silu", True)
    covered(problem, 2)
    stage = Stage(problem, 2, False, seed)
    expected, number = stage.run(), stage.x[0, 0, 0, 0].item()
    stage.x[0, 0, 0, 0] = float("nan")
    y = stage.run()
    assert y[0, :, 0, 0].isnan().all() and torch.equal(y[0, :, 4:, 4:], expected[0, :, 4:, 4:])
    stage.x[0, 0, 0, 0] = number
    assert torch.equal(stage.run(), expected)


def test_more_than_the_workspace_holds():
    """Of 512 channels, each block and tile of a launch has a place of its own for A, and there are sixteen."""
    covered(Problem(1, 7, 7, 512, 2048, 3, 8, "float16", "silu", True), 8)
    assert "workspace" in stages.refusal(1, 7, 7, 512, 9, "float16", "silu", 0)


@pytest.mark.parametrize(
    ("outside", "norm"), [("eager", "layernorm"), ("inductor", "layernorm"), ("eager", "batchnorm")]
)
def test_network(outside, norm, seed):
    """ConvFirst-T for one image: every stage is one launch, and the logits are within twice PyTorch's own error."""
    torch.manual_seed(seed)
    model = timm.create_model("convfirst_tiny", norm=norm).cuda().half().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(0.3)  # every block counts
    x = torch.randn(1, 3, 224, 224, device="cuda", dtype=torch.float16)
    fast = ck.compile_for_inference(model, x, outside=outside)
    taken = [
        m.forward for m in fast.model.modules() if isinstance(m.__dict__.get("forward"), acceleration.StageForward)
    ]
    assert len(taken) == 4 and all(forward.weights is not None for forward in taken)
    y = fast(x)
    for _ in range(3):
        assert torch.equal(fast(x), y)
    with torch.inference_mode():
        own = model(x).double()
        truth = model.double()(x.double())
    bound = 2 * (own - truth).abs().max() + 2 * torch.finfo(torch.float16).eps * truth.abs().max()
    assert (y.double() - truth).abs().max() <= bound
